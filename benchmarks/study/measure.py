"""How compressible every model's cache is, by the project's own protocols; what is measured is not measured again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.study.pool import ROOT
from benchmarks.study.scales import Scale, Sweep
from benchmarks.study.text import SPLIT_SEED

# kvpress' compressors (H2O, SnapKV) need an environment of their own, which `make setup` makes.
FOREIGN = {"h2o", "snapkv"}
OTHER = ROOT / ".venv-compress" / "bin" / "kvcat"


def cut(paths: list[Path], tokenizer: Path, scale: Scale, out: Path) -> Path:
    """Windows of held-out documents, cut once for all models."""
    plan = scale.evaluation
    length = plan.prefix + plan.continuation
    if not out.is_file():
        from kvcat_nemo.data.split import position
        from kvcat_nemo.evaluate.windows import corpora_from_files, make_windows_file

        # Of corpora of a few documents (six novels, one handbook) none may be held out: those give no windows.
        long = 8 * length  # characters, surely a window
        corpora = {
            name: documents
            for name, documents in corpora_from_files(paths).items()
            if any(position(d.text, SPLIT_SEED) < scale.held_out and len(d.text) > long for d in documents)
        }
        make_windows_file(
            out,
            tokenizer,
            corpora,
            plan.windows,
            length=length,
            held_out=scale.held_out,
            split_seed=SPLIT_SEED,
            min_chars_per_token=1.0 if not scale.evidence else 2.5,
        )
    return out


class Measurements:
    """The protocols on the models of one scale, each with a folder and a log of its own.

    Args:
        models: name → exported folder.
    """

    def __init__(self, models: dict[str, Path], windows: Path, scale: Scale, out: Path):
        self.models, self.windows, self.scale, self.out = models, windows, scale, out

    def continuation(self, sweep: Sweep, name: str) -> Path:
        """Compressed-prefix continuation under the compressors and budgets of a sweep."""
        words = ["--compressors", ",".join(sweep.compressors), "--keep", ",".join(sweep.keep)]
        words += [*self._windows(), "--limit", str(sweep.windows)]
        foreign = FOREIGN & {c.partition(":")[0] for c in sweep.compressors}
        return self._evaluate("continuation", name, words, OTHER if foreign else None)

    def gradient(self) -> Path:
        """Curves of caches optimised by gradient, which start from the most recent slots."""
        plan = self.scale.evaluation
        words = ["--compressors", "recent", "--keep", ",".join(plan.gradient_keep), *self._windows()]
        words += ["--steps", str(plan.gradient_steps), "--limit", str(plan.gradient_windows)]
        return self._evaluate("gradient", "gradient", words)

    def needle(self) -> Path:
        plan = self.scale.evaluation.needle
        words = ["--compressors", "attention-matching", "--keep", ",".join(plan.keep)]
        words += ["--lengths", str(plan.length), "--depths", plan.depths, "--samples", str(plan.samples)]
        return self._evaluate("needle", "needle", words)

    def _windows(self) -> list[str]:
        plan = self.scale.evaluation
        return [
            *("--windows", str(self.windows), "--prefix", str(plan.prefix)),
            *("--continuation", str(plan.continuation)),
        ]

    def _evaluate(self, protocol: str, name: str, words: list[str], program: Path | None = None) -> Path:
        program = program or Path(sys.executable).parent / "kvcat"
        command = [str(program), "evaluate", protocol, *(f"{n}={path}" for n, path in self.models.items())]
        command += ["--out", str(self.out / name), "--threads", "1", *words]
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            tail = log.read_text("utf-8", "replace").replace("\r", "\n").splitlines()[-12:]
            raise RuntimeError(
                f"kvcat evaluate {protocol} ended with code {done.returncode}:\n" + "\n".join(tail)
            )
        return self.out / name / "results.json"


def rows(*paths: Path) -> list[dict]:
    """Rows of the results files that are there."""
    return [row for path in paths if path.is_file() for row in json.loads(path.read_text())["rows"]]
