"""Ten steps through NeMo."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kvcat_nemo.doctor import compare, nemo_training, small_model
from kvcat_nemo.doctor.parts.host import Differs, Host, agree, need
from kvcat_nemo.doctor.report import Check, checked
from kvcat_nemo.runs.layout import RunFolder


def checks(host: Host) -> Iterator[Check]:
    """Ten steps of `nemo llm pretrain` against the same in float32 on the CPU: figures and first masks."""
    need("nemo")
    for name in small_model.SHAPES if host.cuda else list(small_model.SHAPES)[:1]:
        yield checked(name, functools.partial(_nemo_run, host, name))


NEMO_STEPS, NEMO_SAVES = 10, 4


def nemo_job(host: Host, name: str, folder: Path, **more) -> dict[str, Any]:
    shape = small_model.shape_of(name, host.device)
    _, base = small_model.make(shape, host.folder / f"model {name}")
    return nemo_training.job(folder, shape=shape, base=base, steps=NEMO_STEPS, save_every=NEMO_SAVES, **more)


def unbroken_run(host: Host, name: str) -> Path:
    """Folder of an unbroken run; made once."""
    folder = host.folder / f"nemo {name}"
    if not RunFolder(folder / nemo_training.RUN).finished.is_file():
        nemo_training.run_jobs([nemo_job(host, name, folder)], host.device, host.folder / f"nemo {name} log")
    return folder


def _nemo_run(host: Host, name: str) -> dict[str, Any]:
    found = unbroken_run(host, name)
    reference = found
    if host.cuda:
        reference = host.folder / f"nemo {name} on the CPU"
        nemo_training.run_jobs([nemo_job(host, name, reference)], "cpu", host.folder / f"nemo {name} CPU log")
    ours, theirs = (
        [x for x in nemo_training.lines_of(f) if x["kind"] == "train"] for f in (found, reference)
    )
    masks = [torch.load(f / nemo_training.MASKS) for f in (found, reference)]
    shape = small_model.shape_of(name, host.device)
    wrong, clear = compare.masks_differ(*masks, compare.near_tie(shape["layers"], shape["hidden"]))
    agree(compare.figures_differ(ours, theirs), wrong)
    if len(ours) != NEMO_STEPS:
        raise Differs(f"{len(ours)} steps, {NEMO_STEPS} expected")
    return {"clear decisions": clear}
