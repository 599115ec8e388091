"""Two GPUs in every layout."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator

import torch

from kvcat_nemo.doctor import compare, small_model
from kvcat_nemo.doctor.parts.host import Host, agree, need
from kvcat_nemo.doctor.parts.megatron import megatron_job
from kvcat_nemo.doctor.ranks import result_of, run_each
from kvcat_nemo.doctor.report import Check, checked

LAYOUTS = {
    "TP2 SP": {"tp": 2},
    "PP2": {"pp": 2},
    "CP2": {"cp": 2},
    "DP2": {"average": True, "bucket": 100_000},
}


def of_two(host: Host):
    """`run_each`'s results of one process and of two. Both parts below look at them: made once, and kept in the folder."""
    folder = host.folder / "two"
    kept = folder / "results.pt"
    if kept.is_file():
        return torch.load(kept, weights_only=False)
    base = megatron_job(host, next(iter(small_model.SHAPES)))
    base |= {"start": str(folder / "start"), "micro": 4, "steps": 10 if host.cuda else 2}
    resumed = base | {"load": str(folder / "saved"), "first_step": base["steps"], "steps": 2}
    one = {"straight": base | {"make_start": True, "save": str(folder / "saved")}, "resumed": resumed}
    two = {name: base | settings for name, settings in LAYOUTS.items()}
    two["resumed"] = resumed | {"tp": 2, "save_again": str(folder / "again")}
    alone = run_each(one, 1, host.device, folder / "one")
    result_of(alone, "straight")  # without it nothing can be compared
    both = run_each(two, 2, host.device, folder / "both")
    torch.save((alone, both), kept)
    return alone, both


def checks(host: Host) -> Iterator[Check]:
    """TP2 with sequence parallelism, PP2, CP2 and DP2 (averaged in the collective) train as one process does."""
    need("megatron.core")
    for layout in LAYOUTS:
        yield checked(layout, functools.partial(_layout, host, layout))


def _layout(host: Host, layout: str) -> dict[str, float]:
    one, two = of_two(host)
    found = result_of(two, layout)
    agree(compare.figures_differ(found["figures"], result_of(one, "straight")["figures"]))
    return {"median step, s": statistics.median(found["seconds"])}
