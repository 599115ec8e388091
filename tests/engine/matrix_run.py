"""Runs cases of the parallel matrix over gloo processes and says by how much they differ from a single process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.engine.matrix_cases import Case

PROGRAM = "tests.engine.layout_ranks"
ROOT = Path(__file__).resolve().parents[2]
LEAST_GRADIENT = 1e-7
"""A parameter whose largest gradient is smaller was not exercised: comparing it shows nothing."""
PER_RANK_FIGURES = ("flipped",)
"""Measured on the last window of each data-parallel rank, so another figure for another number of ranks."""


def start_rank(arguments: list[str], environment: dict[str, str], log: Path):
    """A process of layout_ranks with its output in `log`. benchmarks/parallel_matrix.py --smoke forks it instead."""
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", PROGRAM, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def run_ranks(jobs: list[dict], processes: int, folder: Path, timeout: float = 240) -> list[list[dict]]:
    """Results of every rank, [job][rank]. Jobs share the processes, whose start costs more than most jobs.

    Raises:
        RuntimeError: with the ends of the ranks' logs, when one fails or does not end in time.
    """
    folder.mkdir(parents=True)
    jobs_file = folder / "jobs.json"
    jobs_file.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ranks, logs = [], [folder / f"rank-{rank}.log" for rank in range(processes)]
    try:
        for rank, log in enumerate(logs):
            ranks.append(start_rank([str(jobs_file), str(rank), str(processes)], environment, log))
        deadline = time.monotonic() + timeout
        while any(rank.poll() is None for rank in ranks):
            # A dead rank leaves its peers waiting: end them all at once.
            if any(rank.poll() for rank in ranks) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        ends = [rank.poll() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    done = sum(1 for number in range(len(jobs)) if Path(f"{jobs_file}.{number}.{processes - 1}.pt").is_file())
    if any(ends) or None in ends:
        what = "ended with" if any(ends) else f"did not end in {timeout:.0f} s, having ended with"
        at = jobs[min(done, len(jobs) - 1)].get("name", "")
        text = "\n---\n".join(log.read_text(errors="replace")[-2500:] for log in logs)
        raise RuntimeError(f"{at!r} or a neighbour: ranks {what} {ends}:\n{text}")
    return [
        [torch.load(f"{jobs_file}.{number}.{rank}.pt", weights_only=False) for rank in range(processes)]
        for number in range(len(jobs))
    ]


def run_cases(
    cases: Iterable[Case], root: Path, timeout: float = 240, unchecked: tuple[str, ...] = ()
) -> dict[str, tuple[list, dict]]:
    """Case name → (every rank's result, the single process' result). `unchecked` ones run although they are refused."""
    cases = list(cases)
    references = {c.reference: c for c in cases}
    folders = {key: str(root / f"training-{number}") for number, key in enumerate(references)}

    def job(c: Case, reference=False):
        mine = {"layout": {}, "options": {}} if reference else {"layout": c.layout, "options": c.options}
        return mine | {
            "name": c.name,
            "recipe": c.recipe,
            "reference": reference,
            "unchecked": c.name in unchecked,
            "folder": folders[c.reference],
        }

    jobs = [job(c, reference=True) for c in references.values()]
    alone = dict(
        zip(
            references, run_ranks(jobs, 1, root / "references", timeout * max(1, len(jobs) / 10)), strict=True
        )
    )
    out = {}
    for processes in sorted({c.processes for c in cases}):
        group = [c for c in cases if c.processes == processes]
        results = run_ranks(
            [job(c) for c in group],
            processes,
            root / f"processes-{processes}",
            timeout * max(1, len(group) / 10),
        )
        for c, ranks in zip(group, results, strict=True):
            out[c.name] = ranks, alone[c.reference][0]
    return out


@dataclass
class Difference:
    """By how much a case differs from its reference: the largest over ranks, steps and elements."""

    figures: dict[str, float] = field(default_factory=dict)
    """Absolute below 1, relative above."""
    gradients: dict[str, float] = field(default_factory=dict)
    """Over the largest gradient of the same parameter (on the same rank)."""
    norms: dict[str, float] = field(default_factory=dict)
    masks: int = 0
    """Masks compared, each of a layer, a micro-batch and a step; all were equal unless `wrong` says otherwise."""
    wrong: list[str] = field(default_factory=list)

    def over(self, tolerance: float) -> list[str]:
        """What exceeds the tolerance, and everything that is wrong at any tolerance."""
        parts = {"figure": self.figures, "gradient": self.gradients, "norm": self.norms}
        return self.wrong + [
            f"{kind} {name} is off by {value:.2g} (allowed: {tolerance:.2g})"
            for kind, values in parts.items()
            for name, value in values.items()
            if not value <= tolerance
        ]

    @property
    def largest(self) -> float:
        return max([0.0, *self.figures.values(), *self.gradients.values(), *self.norms.values()])


def difference(c: Case, ranks: list[dict], reference: dict) -> Difference:
    """Compare every rank of a case with the single process."""
    out = Difference()
    for number, rank in enumerate(ranks):
        _compare_figures(c, out, number, rank, reference)
        for name, norm in reference["norms"].items():
            ours = rank["norms"][name] / c.options.get(
                "loss_scale", 1
            )  # taken before the scale is divided out
            _widen(out.norms, name, abs(ours - norm) / norm if norm else abs(ours))
        for name, (error, scale) in rank["errors"].items():
            if not scale > LEAST_GRADIENT:
                out.wrong.append(f"rank {number}: {name} has no gradient to compare")
            _widen(out.gradients, name, error / scale if scale else math.inf)
    _compare_masks(c, out, ranks, reference)
    routers = {name.partition(".router.")[0] for name in out.gradients if ".router." in name}
    groups = {
        int(name.rpartition("group")[2]) for name in reference["figures"][0] if name.startswith("budget/")
    }
    if len(routers) != len(groups):
        out.wrong.append(f"{len(routers)} routers' gradients were compared, there are {len(groups)}")
    return out


def _widen(values: dict[str, float], name: str, value: float) -> None:
    value = value if math.isfinite(value) else math.inf
    values[name] = max(values.get(name, 0.0), value)


def _compare_figures(c: Case, out: Difference, number: int, rank: dict, reference: dict) -> None:
    for step, (ours, theirs) in enumerate(zip(rank["figures"], reference["figures"], strict=True)):
        if ours.keys() != theirs.keys():
            out.wrong.append(
                f"rank {number}, step {step}: other figures: {sorted(ours.keys() ^ theirs.keys())}"
            )
        for name in ours.keys() & theirs.keys():
            if c.layout.get("dp", 1) > 1 and name.startswith(PER_RANK_FIGURES):
                continue
            _widen(out.figures, name, abs(ours[name] - theirs[name]) / max(1.0, abs(theirs[name])))


def _compare_masks(c: Case, out: Difference, ranks: list[dict], reference: dict) -> None:
    """Every layer's masks in every micro-batch of every step, those of recomputation included, bit for bit."""
    steps, micro = c.recipe.get("updates", 0) + 1, c.recipe.get("micro", 4)
    recompute = c.options.get("recompute", {})
    seen = set()
    for number, rank in enumerate(ranks):
        mine = [s * micro + i for s in range(steps) for i in range(rank["dp_rank"], micro, rank["dp"])]
        for layer, entries in rank["masks"].items():
            seen.add(layer)
            expected = [reference["masks"][layer][i][0] for i in mine]
            if rank["held"] is not None and entries[0][0].shape[1] != expected[0].shape[1]:
                expected = [mask[:, rank["held"]] for mask in expected]
            heads = entries[0][0].shape[2]  # one mask for all, or one for each of this rank's KV heads
            if heads != expected[0].shape[2]:
                own = slice(rank["tp_rank"] * heads, (rank["tp_rank"] + 1) * heads)
                expected = [mask[..., own] for mask in expected]
            first = [mask for mask, with_gradients in entries if with_gradients]
            if recompute and not all(with_gradients for _, with_gradients in entries):
                # Its first run is without gradients; what runs with gradients replays it, in the schedule's order.
                replays, first = first, [mask for mask, with_gradients in entries if not with_gradients]
                if sorted(_bits(m) for m in replays) != sorted(_bits(m) for m in first):
                    out.wrong.append(f"rank {number}, layer {layer}: recomputation saw other masks")
            if len(first) != len(expected):
                out.wrong.append(
                    f"rank {number}, layer {layer}: {len(first)} masks, there should be {len(expected)}"
                )
                continue
            unequal = sum(
                not torch.equal(a.double(), b.double()) for a, b in zip(first, expected, strict=True)
            )
            out.masks += len(first)
            if unequal:
                out.wrong.append(
                    f"rank {number}, layer {layer}: {unequal} of {len(first)} masks are not the single process'"
                )
    if seen != set(reference["masks"]):
        out.wrong.append(
            f"masks of layers {sorted(seen)}, there should be those of {sorted(reference['masks'])}"
        )


def _bits(mask: torch.Tensor) -> bytes:
    return mask.float().numpy().tobytes()
