"""What must be right on a machine before a run is worth starting: one check, one verdict, one line on what to do.

No NeMo is imported: the whole of it takes seconds, the fast form less, so that it can be a container's health check.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvcat_nemo.runs import integrity
from kvcat_nemo.runs.checkpoints import survey
from kvcat_nemo.runs.integrity import Standing, has_manifest
from kvcat_nemo.runs.layout import CARD, WEIGHTS, RunFolder
from kvcat_nemo.runs.pickles import check_index

GOOD, NOTE, BROKEN = "ok", "note", "BROKEN"

PINS = {"nemo-toolkit": "2.7.3", "megatron-core": "0.15.3", "nemo-run": "0.11.1", "leptonai": "0.27.3"}
"""Versions that work together; another NeMo or Megatron-core fails in ways that do not say so."""

OPTIONAL = {
    "transformer_engine": "gated attention in its fused kernels and fused layers; without it: flash-attn's or PyTorch's kernels, Megatron's local layers",
    "apex": "fused optimizer and gradient accumulation; without it: Megatron's own, with a little more memory traffic",
    "flash_attn": "kvcat.attention_backend=flash, and te's head dim 128 on A100 and B200; without it: te or PyTorch's",
}


@dataclass(frozen=True)
class Verdict:
    """One line of the report."""

    check: str
    status: str
    """ok, note (works, but know this) or BROKEN."""
    text: str
    elsewhere: bool = False
    """What is broken is not this machine: others of the job do not answer."""


def examine(
    *,
    folder: Path,
    data: str | None = None,
    checkpoints: str | None = None,
    fast: bool = False,
    disk_gb: float = 10.0,
    shm_gb: float = 1.0,
    seconds: float = 60.0,
) -> Iterator[Verdict]:
    """All checks, one after the other, each yielded as soon as it is known.

    Args:
        folder: where a run would write.
        data: dataset folder or prefix; checkpoints: a run's folder, its checkpoints/ or one checkpoint.
        fast: no hashes, no ports, no other ranks.
        disk_gb, shm_gb: free space that is expected; seconds: limit of the all-reduce.
    """
    yield from _guarded("python", _versions)
    yield from _guarded("packages", _optional)
    yield from _guarded("devices", _devices)
    yield from _guarded("disk", lambda: _space(folder, disk_gb, "disk"))
    yield from _guarded("shared memory", lambda: _space(Path("/dev/shm"), shm_gb, "shared memory"))
    if data is not None:
        yield from _guarded("data", lambda: _data(data, hashes=not fast))
    if checkpoints is not None:
        yield from _guarded("checkpoint", lambda: _checkpoint(Path(checkpoints), hashes=not fast))
    if not fast:
        yield from _guarded("ports", _ports)
        yield from _guarded("ranks", lambda: _ranks(seconds))


def _guarded(name: str, check: Callable[[], Iterator[Verdict]]) -> Iterator[Verdict]:
    """A check that raises is a verdict, not the end of the others."""
    try:
        yield from check()
    except (ValueError, OSError) as error:
        yield Verdict(name, BROKEN, str(error))


def _versions() -> Iterator[Verdict]:
    found, wrong = [], []
    for name, pin in PINS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed (pip install -c constraints.txt 'kvcat-nemo[train]')")
            continue
        found.append(f"{name} {version}")
        if version != pin:
            wrong.append(
                f"{name} {version} is installed, {pin} is what works (pip install -c constraints.txt …)"
            )
    for name in ("kvcat-nemo", "torch", "numpy"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed")
    yield Verdict("versions", BROKEN if wrong else GOOD, "; ".join(wrong) or ", ".join(found))


def _optional() -> Iterator[Verdict]:
    for name, use in OPTIONAL.items():
        there = importlib.util.find_spec(name) is not None
        yield Verdict(name, GOOD if there else NOTE, f"{'present' if there else 'not installed'}: {use}")


def _devices() -> Iterator[Verdict]:
    import torch

    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        built = torch.version.cuda
        why = (
            f"torch is built for CUDA {built}, but finds no device (driver?)"
            if built
            else "torch is a CPU build"
        )
        yield Verdict("devices", NOTE, f"no GPU: {why}; runs use {cores} CPU core(s), float32 and gloo")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        busy = free < 0.9 * total
        yield Verdict(
            f"device {index}",
            NOTE if busy else GOOD,
            f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free{': another process is using it' if busy else ''}",
        )


def _space(folder: Path, wanted_gb: float, name: str) -> Iterator[Verdict]:
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    fix = {
        "disk": "free some, or give --dir another place",
        "shared memory": "docker run --shm-size=…, or --ipc=host",
    }[name]
    if free < wanted_gb:
        yield Verdict(name, BROKEN, f"{place}: {free:.1f} GB free, {wanted_gb:g} GB wanted: {fix}")
        return
    if name == "disk" and not os.access(place, os.W_OK):
        yield Verdict(name, BROKEN, f"{place}: this user (id {os.getuid()}) may not write there")
        return
    yield Verdict(name, GOOD, f"{place}: {free:.1f} GB free")


def _data(where: str, hashes: bool) -> Iterator[Verdict]:
    from kvcat_nemo.common.files import sha256_of
    from kvcat_nemo.data.dataset_manifest import MANIFEST, read_manifest
    from kvcat_nemo.data.indexed_check import check_indexed

    folder = Path(where)
    if not folder.is_dir():
        facts = check_indexed(where)
        yield Verdict("data", GOOD, f"{where}: {facts.documents:,} documents, {facts.tokens:,} tokens")
        return
    parts = sorted(p.with_suffix("") for p in folder.glob("*.idx"))
    if not parts:
        raise ValueError(
            f"{folder} holds no dataset (no .idx): kvcat data build SOURCE --tokenizer HF_DIR --out {folder}"
        )
    total = sum(check_indexed(part).tokens for part in parts)
    if (folder / MANIFEST).is_file() and hashes:
        for name, entry in read_manifest(folder).files.items():
            if sha256_of(folder / name) != entry["sha256"]:
                raise ValueError(f"{folder / name}: its contents changed since it was built (sha256 differs)")
    yield Verdict(
        "data",
        GOOD,
        f"{folder}: {', '.join(p.name for p in parts)}; {total:,} tokens{', hashes agree' if hashes else ''}",
    )


def _checkpoint(where: Path, hashes: bool) -> Iterator[Verdict]:
    if not where.is_dir():
        raise ValueError(f"{where} is not a folder")
    if where.is_symlink():
        where = where.resolve()
    if has_manifest(where) or (where / WEIGHTS).is_dir():
        one = integrity.examine(where, hashes=hashes)
        imported = (where / CARD).is_file()
        if imported and not has_manifest(where):
            yield Verdict(
                "checkpoint",
                NOTE,
                f"{where}: a base model that an older kvcat imported: nothing tells whether it is whole",
            )
            return
        if one.whole and (where / WEIGHTS / ".metadata").is_file():
            check_index(where / WEIGHTS)
        yield Verdict("checkpoint", GOOD if one.whole else BROKEN, one.why_not or _good(one, hashes))
        return
    folder = RunFolder(where).checkpoints if RunFolder(where).checkpoints.is_dir() else where
    found = survey(folder)
    if not found:
        raise ValueError(f"{folder} holds no checkpoint")
    whole = 0
    for one in found:
        # Names and sizes are known to agree; what was never complete has no hashes.
        one = integrity.examine(one.path) if hashes and one.whole else one
        # One that is incomplete is what a kill during a save leaves; the run passes over it.
        status = {"whole": GOOD, "incomplete": NOTE, "damaged": BROKEN}[one.state]
        yield Verdict(f"checkpoint {one.path.name}", status, one.why_not or _good(one, hashes))
        whole += one.whole
    if not whole:
        yield Verdict(
            "checkpoint",
            BROKEN,
            f"{folder}: none is complete: a run would start anew, or fail with resume.mode=must",
        )


def _good(one: Standing, hashes: bool) -> str:
    assert one.manifest is not None
    kind = {"import": "a converted base model", "export": "an exported model"}.get(
        one.manifest.facts.get("kind")
    )
    files = f"{len(one.manifest.files)} files, {one.manifest.bytes / 1e6:,.1f} MB, {'hashes' if hashes else 'sizes'} agree"
    return f"{kind or f'step {one.step}'}, {files}"


def _ports() -> Iterator[Verdict]:
    """The port of rank 0, where this process would be rank 0 and no launcher holds it already."""
    from kvcat_nemo.engine.preflight import place_from_environment

    place = place_from_environment()
    if place is not None and (place.rank or place.agent_store):
        return
    port = int(os.environ.get("MASTER_PORT") or 29500)
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
        except OSError as error:
            yield Verdict(
                "ports", BROKEN, f"port {port} (MASTER_PORT): {error.strerror}: set MASTER_PORT to a free one"
            )
            return
    yield Verdict("ports", GOOD, f"port {port} is free")


def _ranks(seconds: float) -> Iterator[Verdict]:
    from kvcat_nemo.engine.preflight import RanksMissing, check_all_ranks, place_from_environment

    place = place_from_environment()
    if place is None:
        yield Verdict(
            "ranks",
            NOTE,
            "one process: start this with torchrun, or with WORLD_SIZE and RANK set, to try all ranks",
        )
        return
    import torch

    backends = ["gloo"]
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
        backends.append("nccl")
    try:
        yield Verdict("ranks", GOOD, check_all_ranks(place, seconds=seconds, backends=backends))
    except RanksMissing as error:
        yield Verdict("ranks", BROKEN, str(error), elsewhere=True)
