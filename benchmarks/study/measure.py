"""How compressible every model's cache is, by the project's own protocols; what is measured is not measured again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.study.scales import Scale
from benchmarks.study.text import SPLIT_SEED

ROOT = Path(__file__).resolve().parents[2]
# kvpress' compressors (H2O, SnapKV) need an environment of their own, which `make setup` makes.
OTHER = ROOT / ".venv-compress" / "bin" / "kvcat"


def cut(paths: list[Path], tokenizer: Path, scale: Scale, out: Path) -> Path:
    """Windows of held-out documents, cut once for all models."""
    if not out.is_file():
        from kvcat_nemo.data.split import position
        from kvcat_nemo.evaluate.windows import corpora_from_files, make_windows_file

        # Of corpora of a few documents (six novels, one handbook) none may be held out: those give no windows.
        long = 8 * scale.shape.tokens  # characters, surely a window
        corpora = {
            name: documents
            for name, documents in corpora_from_files(paths).items()
            if any(position(d.text, SPLIT_SEED) < scale.held_out and len(d.text) > long for d in documents)
        }
        make_windows_file(
            out,
            tokenizer,
            corpora,
            scale.evaluation.windows,
            length=scale.shape.tokens,
            held_out=scale.held_out,
            split_seed=SPLIT_SEED,
            min_chars_per_token=1.0 if not scale.evidence else 2.5,
        )
    return out


def continuation(models: dict[str, Path], windows: Path, scale: Scale, out: Path, log: Path) -> Path:
    """Compressed-prefix continuation of all models under all compressors and budgets."""
    plan = scale.evaluation
    words = ["--compressors", ",".join(plan.compressors), "--keep", ",".join(plan.keep)]
    return _evaluate("continuation", models, windows, scale, out, log, words)


def gradient(models: dict[str, Path], windows: Path, scale: Scale, out: Path, log: Path) -> Path:
    """Curves of caches optimised by gradient, which start from the most recent slots."""
    plan = scale.evaluation
    words = ["--compressors", "recent", "--keep", ",".join(plan.gradient_keep)]
    words += ["--steps", str(plan.gradient_steps), "--limit", str(plan.gradient_windows)]
    return _evaluate("gradient", models, windows, scale, out, log, words)


def _evaluate(protocol, models, windows, scale: Scale, out: Path, log: Path, words: list[str]) -> Path:
    foreign = {"h2o", "snapkv"} & {c.partition(":")[0] for c in scale.evaluation.compressors}
    program = Path(sys.executable).parent / "kvcat"
    if protocol == "continuation" and foreign:
        program = OTHER
    command = [str(program), "evaluate", protocol, *(f"{name}={path}" for name, path in models.items())]
    command += ["--windows", str(windows), "--prefix", str(scale.evaluation.prefix)]
    command += [
        "--continuation",
        str(scale.shape.tokens - scale.evaluation.prefix),
        "--out",
        str(out),
        *words,
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = log.read_text("utf-8", "replace").replace("\r", "\n").splitlines()[-12:]
        raise RuntimeError(
            f"kvcat evaluate {protocol} ended with code {done.returncode}:\n" + "\n".join(tail)
        )
    return out / "results.json"


def rows(path: Path) -> list[dict]:
    """Rows of a results file."""
    return json.loads(path.read_text())["rows"]
