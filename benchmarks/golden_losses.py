"""The losses of kvcat_tiny bit for bit, for a change that must not change any: a refactor, a new library version, a faster form.

A few steps of every policy go through the recipe, as `nemo llm pretrain` runs it. One process imports NeMo and forks each run.
A CPU rounds as the machine and the number of threads have it: bit for bit holds on one machine, with one thread.

    python -m benchmarks.golden_losses --compare ../before       # another checkout against this one, on this machine
    python -m benchmarks.golden_losses --out losses.json         # keep the figures …
    python -m benchmarks.golden_losses --compare losses.json     # … and compare with them later
    python -m benchmarks.golden_losses --golden                  # measure golden_losses.json again, and how far it may be missed

The committed golden_losses.json is what a test holds every machine to. Its tolerance is derived, see `tolerances`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).with_suffix(".json")
STEPS = 4
SETTINGS = {
    "trainer.max_steps": STEPS,
    "trainer.val_check_interval": STEPS,
    "log.ckpt.every_n_train_steps": STEPS,
}
"""Validation before and after; the one save is at the end."""
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "kvcat_tiny": ("kvcat_tiny", {}),
    "kvcat_tiny_prefix": ("kvcat_tiny_prefix", {}),
    "a mask for each KV head": ("kvcat_tiny", {"model.config.kvcat.mask_per": "kv_head"}),
    "random": ("kvcat_tiny", {"model.config.kvcat.policy": "random"}),
    "attention": ("kvcat_tiny", {"model.config.kvcat.policy": "attention"}),
    "none": ("kvcat_tiny", {"model.config.kvcat.policy": "none"}),
}
"""Name → recipe and overrides."""
CLOCK = ("time", "tokens_per_second", "tflops", "step_seconds", "peak_memory")
"""Figures of the machine, by how their names begin. Not imported: an older checkout has them elsewhere."""
KEPT = ("loss/", "weighted/", "ce_masked", "keep_rate", "grad_norm/")
"""What golden_losses.json keeps of the figures, by how their names begin."""

NOISE = 2.0**-12
"""What `tolerances` multiplies every module's output by, at most, but for 1."""
ROUNDING = 2.0**-24
LOGITS = 32 * ROUNDING
"""Of KL(dense ‖ masked), which is small because two logarithms of about ln 128 ≈ 5 cancel: each of them is rounded about three
times, and so are the logits under it, of which the loss makes no module's output."""
LONGEST_SUM = 256
"""No sum of kvcat_tiny that a library may order otherwise has more terms, but for means over tokens: 176 in the MLP."""


def figures(folder: Path) -> dict[str, float]:
    """'train 3 loss/total' → value, of a run's metrics file; all but those of the clock."""
    (path,) = folder.glob("runs/*/kvcat/metrics.jsonl")
    found = {}
    for line in map(json.loads, path.read_text().splitlines()):
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step" and not name.startswith(CLOCK):
                found[f"{line['kind']} {line['step']} {name}"] = float(value)
    return found


def package_of(checkout: Path, place: Path) -> Path:
    """A folder in which kvcat_nemo is the checkout's, recipes/, conversion/ and launch/ inside as when it is installed."""
    package = place / "kvcat_nemo"
    package.mkdir(parents=True)
    inside = [
        *(checkout / "kvcat_nemo").iterdir(),
        *(checkout / n for n in ("recipes", "conversion", "launch")),
    ]
    for one in inside:
        if one.name != "__pycache__":
            (package / one.name).symlink_to(one)
    return place


def measure(
    checkout: Path, *, noise: float = 0.0, seeds: tuple[int, ...] = (0,)
) -> list[dict[str, dict[str, float]]]:
    """For every seed of the noise: run → figures, by a checkout's code.

    Raises:
        RuntimeError: a run failed; with the end of its output.
        ValueError: the folder is no checkout.
    """
    checkout = checkout.resolve()
    if not (checkout / "recipes" / "tiny.py").is_file():
        raise ValueError(
            f"--compare={checkout}: no file of figures and no checkout of this project (no recipes/tiny.py)"
        )
    with tempfile.TemporaryDirectory(prefix="kvcat-golden-") as name:
        place = Path(name)
        jobs = [(run, seed, place / f"run-{i}-{seed}") for seed in seeds for i, run in enumerate(RUNS)]
        package = package_of(checkout, place / "package")
        work = {
            "package": str(checkout / "kvcat_nemo"),
            "noise": noise,
            "jobs": [(run, seed, str(folder)) for run, seed, folder in jobs],
        }
        (place / "work.json").write_text(json.dumps(work))
        environment = os.environ | {
            "PYTHONPATH": f"{package}{os.pathsep}{ROOT}",
            "PYTHONWARNINGS": "ignore",
            "NEMORUN_HOME": str(place / ".nemo_run"),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        for variable in ("MLFLOW_TRACKING_URI", "RANK", "WORLD_SIZE", "LOCAL_RANK", "KVCAT_STOP_FILE"):
            environment.pop(variable, None)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.golden_losses", "--work", str(place / "work.json")],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{checkout}:\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
        return [{run: figures(folder) for run, s, folder in jobs if s == seed} for seed in seeds]


def tolerances(
    exact: dict[str, dict[str, float]], noisy: list[dict[str, dict[str, float]]]
) -> dict[str, dict[str, float]]:
    """How far another machine's figure may be from the golden one.

    Its libraries sum in another order. A sum of n terms moves by n·u of its size at most (u = 2⁻²⁴, float32), and what this does to
    a figure is linear in it, so it is measured with a larger cause: every module's output times 1 + NOISE·x, x in [−1, 1]. The
    largest change over the seeds, times n·u / NOISE, is the tolerance; at least n·u of the figure, for the last sum, and LOGITS.
    """
    scale = LONGEST_SUM * ROUNDING
    return {
        run: {
            name: max(
                scale / NOISE * max(abs(one[run][name] - value) for one in noisy), scale * abs(value), LOGITS
            )
            for name, value in values.items()
        }
        for run, values in exact.items()
    }


def differences(mine: dict[str, dict[str, float]], other: dict[str, dict[str, float]]) -> list[str]:
    """What is not the same to the last bit, in words."""
    found = []
    for run in mine:
        if run not in other:
            found.append(f"{run}: the other side has no such run")
            continue
        for name in sorted(mine[run].keys() | other[run].keys()):
            a, b = mine[run].get(name), other[run].get(name)
            if a is None or b is None:
                found.append(f"{run}: {name} is {'missing' if a is None else 'new'} here")
            elif a.hex() != b.hex():
                found.append(f"{run}: {name} = {a!r} here, {b!r} there ({a.hex()}, {b.hex()})")
    return found


# --- the process that imports NeMo, and its forks ---


def work(path: Path) -> None:
    from kvcat_nemo.recipes import RECIPES  # first: it prepares the host for NeMo

    from nemo.collections import llm  # noqa: F401  # isort: skip
    import nemo_run.cli.cli_parser  # noqa: F401

    import kvcat_nemo

    asked = json.loads(path.read_text())
    used = Path(kvcat_nemo.__file__).resolve().parent
    if used != Path(asked["package"]):
        sys.exit(f"kvcat_nemo was imported from {used}, not from {asked['package']}")
    RECIPES["kvcat_tiny"]()  # whatever is imported late
    for run, seed, folder in asked["jobs"]:
        sys.stdout.flush(), sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                train(run, Path(folder), asked["noise"], seed)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            sys.exit(f"{run}: ended with {code}")
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)  # taking NeMo's modules down takes seconds


def train(run: str, folder: Path, noise: float, seed: int) -> None:
    import fiddle as fdl
    from nemo_run.cli.cli_parser import parse_cli_args

    from kvcat_nemo.recipes import RECIPES

    folder.mkdir(parents=True)
    os.chdir(folder)
    recipe, more = RUNS[run]
    made = RECIPES[recipe](dir=str(folder / "runs"), name="golden")
    made = parse_cli_args(made, [f"{key}={value}" for key, value in (SETTINGS | more).items()])
    made.log.extra_loggers = []
    if noise:
        add_noise(noise, seed)
    fdl.build(made)()


def add_noise(size: float, seed: int) -> None:
    """Multiply every innermost module's output by 1 + size·x, x uniform in [−1, 1]; the model's own streams stay as they are."""
    import torch

    stream = torch.Generator().manual_seed(seed)

    def noisy(tensor):
        if not torch.is_tensor(tensor) or not tensor.is_floating_point():
            return tensor
        return tensor * (1 + size * (2 * torch.rand(tensor.shape, generator=stream) - 1)).to(tensor.dtype)

    def hook(module, _, output):
        if next(module.children(), None) is not None:
            return None
        if isinstance(output, tuple) and hasattr(output, "_fields"):
            return None
        return tuple(map(noisy, output)) if isinstance(output, tuple) else noisy(output)

    torch.nn.modules.module.register_module_forward_hook(hook)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--compare", type=Path, metavar="FILE|CHECKOUT", help="exit 1 if any figure differs in a bit"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="keep the figures, as floats that JSON gives back exactly"
    )
    parser.add_argument(
        "--golden", action="store_true", help=f"measure {GOLDEN.name} again, with its tolerances"
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work(args.work)
    began = time.time()
    (mine,) = measure(ROOT)
    for run, values in mine.items():
        for name, value in values.items():
            if "loss/" in name or name.endswith("ce_masked"):
                print(f"{run:24} {name:32} {value.hex():24} {value:.9g}")
    if args.golden:
        write_golden(mine, measure(ROOT, noise=NOISE, seeds=(1, 2, 3, 4)), began)
    if args.out:
        args.out.write_text(json.dumps({"runs": mine}, indent=1) + "\n")
    if not args.compare:
        return 0
    if args.compare.is_file():
        other = json.loads(args.compare.read_text())["runs"]
    else:
        (other,) = measure(args.compare)
    found = differences(mine, other)
    count = sum(map(len, mine.values()))
    print(
        f"{count} figures of {len(mine)} runs: "
        + (f"{len(found)} differ" if found else "the same to the last bit")
    )
    print("\n".join(found[:40]))
    return int(bool(found))


def write_golden(exact: dict, noisy: list[dict], began: float) -> None:
    from kvcat_nemo.common.files import new_file
    from kvcat_nemo.runs.provenance import manifest

    exact = {
        run: {name: value for name, value in values.items() if name.split()[-1].startswith(KEPT)}
        for run, values in exact.items()
    }
    facts = manifest(steps=STEPS, noise=NOISE, seeds=[1, 2, 3, 4], seconds=round(time.time() - began, 1))
    report = {"manifest": facts, "runs": exact, "tolerances": tolerances(exact, noisy)}
    with new_file(GOLDEN) as file:
        file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
