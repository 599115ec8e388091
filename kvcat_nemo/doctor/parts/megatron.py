"""Ten steps on plain Megatron-core."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

from kvcat_nemo.doctor import compare, small_model
from kvcat_nemo.doctor.parts.host import Host, agree, need
from kvcat_nemo.doctor.ranks import result_of, run_each
from kvcat_nemo.doctor.report import Check, checked


def checks(host: Host) -> Iterator[Check]:
    """Ten steps on plain Megatron-core in bf16, everything on that recipes have on GPUs, against float32 on the CPU."""
    need("megatron.core")
    references, runs = {}, {}
    for name in small_model.SHAPES:
        base = megatron_job(host, name) | {"start": str(host.folder / f"megatron {name}" / "start")}
        base |= {"steps": 10 if host.cuda else 5}
        plain = {"dtype": "float32", "make_start": True, "distributed": False, "overlap": False}
        references[f"{name}, float32"], runs[name] = base | plain, base
    if host.cuda:
        expected = run_each(references, 1, "cpu", host.folder / "megatron cpu")
        found = run_each(runs, 1, host.device, host.folder / "megatron")
    else:
        found = expected = run_each(references | runs, 1, "cpu", host.folder / "megatron")
    for name, job in runs.items():
        yield checked(name, functools.partial(_same_training, job, name, found, expected))


def megatron_job(host: Host, name: str) -> dict[str, Any]:
    shape = small_model.shape_of(name, host.device)
    return {key: value for key, value in shape.items() if key != "vocab"}


def _same_training(job: dict, name: str, found, expected) -> dict[str, Any]:
    ours, theirs = result_of(found, name), result_of(expected, f"{name}, float32")
    tie = compare.near_tie(job["layers"], job["hidden"])
    wrong, clear = compare.masks_differ(ours["masks"], theirs["masks"], tie)
    agree(compare.figures_differ(ours["figures"], theirs["figures"]), wrong)
    return {"clear decisions": clear, "median step, s": statistics.median(ours["seconds"])} | ours["fused"]
