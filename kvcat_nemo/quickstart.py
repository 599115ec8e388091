"""`make quickstart`: continued pretraining of a real model with KV-CAT, from nothing to the report.

Each stage is a command that a user would type, printed before it is run. A stage whose result is there is not run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvcat_nemo.runs.integrity import examine, has_manifest
from kvcat_nemo.runs.layout import LOSSES_PICTURE, RunFolder
from kvcat_nemo.tracking.mlflow_run import store_uri
from kvcat_nemo.tracking.run_report import attach_to_mlflow, table, write

MODEL = Path("models/smollm2-135m")
BASE = Path("models/smollm2-135m-megatron")
CORPUS = Path("data/qasper.jsonl")
DATA = Path("data/qasper")
RESULTS = Path("results/quickstart")
RUN = RESULTS / "run"
EXPORTED = RESULTS / "model"
REPORT = RESULTS / "report.json"
WINDOWS = RESULTS / "windows.json"
PAGE = RESULTS / "report.html"

STEPS = int(os.environ.get("KVCAT_QUICKSTART_STEPS", "32"))

# Evaluation of both models: windows of held-out papers, 768 tokens compressed and 255 predictions after them.
COMPRESSORS = "attention-matching,rkv,recent:sinks=4"
KEEP = "0.05,0.1,0.2"
COUNT = "6"

# Lines of NeMo's output that are shown; the rest is in the stage's log.
_SHOWN = re.compile(r"(training: |validation at step|step \d+: held-out|kvcat: )")


class StageFailed(RuntimeError):
    """A stage's command failed; the message has its last lines."""


def command(*words: str | Path) -> list[str]:
    """A command of this environment: `kvcat …` or `nemo …`."""
    return [str(Path(sys.executable).parent / str(words[0])), *map(str, words[1:])]


def run(words: list[str], log: Path, *, shown: re.Pattern[str] | None = None) -> None:
    """Run a command; its whole output goes to `log`, the lines that match `shown` (or all) to the terminal.

    Raises:
        StageFailed: when it fails.
    """
    print(f"  $ {shlex.join([Path(words[0]).name, *words[1:]])}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
        "NEMORUN_HOME": str(RESULTS.resolve() / "nemo_run"),
        "COLUMNS": "110",
    }
    # nemo-run starts torchrun and friends by name.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        assert process.stdout is not None
        pending = b""
        while piece := process.stdout.read1(4096):
            file.write(piece)
            *whole, pending = re.split(rb"(?<=[\r\n])", pending + piece)
            for line in whole:
                text = line.decode("utf-8", "replace")
                if shown is None or shown.search(text):
                    print(f"  {text.lstrip()}", end="", flush=True)
        code = process.wait()
    if code:
        tail = "\n".join(log.read_text("utf-8", "replace").replace("\r", "\n").splitlines()[-25:])
        raise StageFailed(
            f"{shlex.join(words)} ended with code {code}. Its last lines ({log} has all):\n{tail}"
        )


def fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


class Stages:
    """Remembers which stages are done, by a fingerprint of what went into them."""

    def __init__(self, path: Path, total: int):
        self.path, self.total, self.number = path, total, 0
        self.done: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def stage(self, name: str, what: str, key: str, result: Path, work: Callable[[], None]) -> None:
        """Run `work` unless `result` exists and was made from the same `key`."""
        self.number += 1
        print(f"\n[{self.number}/{self.total}] {what}", flush=True)
        if self.done.get(name, {}).get("key") == key and result.exists():
            print(f"  done before ({self.done[name]['seconds']:.0f} s), re-used: {result}")
            return
        started = time.time()
        work()
        self.done[name] = {"key": key, "seconds": time.time() - started}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.done, indent=2))
        os.replace(temporary, self.path)
        print(f"  done in {self.done[name]['seconds']:.0f} s", flush=True)


def training_command() -> list[str]:
    factory = f"kvcat_smollm2_135m(base='{BASE}', paths='{DATA}', dir='{RESULTS}', name='{RUN.name}')"
    # Three validations: before, in the middle and after.
    overrides = [
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={max(STEPS // 2, 1)}",
        f"log.ckpt.every_n_train_steps={STEPS}",
    ]
    return command("nemo", "llm", "pretrain", "--factory", factory, "-y", *overrides)


def settings() -> list[str]:
    """The sources that decide what a recipe does: after a change of them a finished run is not re-used."""
    recipes = importlib.util.find_spec("kvcat_nemo.recipes")
    assert recipes is not None and recipes.submodule_search_locations
    folder = Path(recipes.submodule_search_locations[0])
    method = Path(__file__).parent / "method"
    return [path.read_text() for path in sorted([*folder.glob("*.py"), *method.glob("*.py")])]


def main() -> None:
    started = time.time()
    print(
        "KV-CAT quickstart: continued pretraining of SmolLM2-135M on full scientific papers, so that its KV cache\n"
        "compresses better. Everything below runs on the CPU; each line after $ is a command that you can use yourself."
    )
    stages = Stages(RESULTS / "stages.json", total=8)
    logs = RESULTS / "logs"
    try:
        _stages(stages, logs)
    except StageFailed as failure:
        sys.exit(f"\nquickstart stopped: {failure}")
    minutes = (time.time() - started) / 60
    print(
        f"\nAll stages took {minutes:.1f} minutes. Training: {REPORT} and {RESULTS / LOSSES_PICTURE}"
        f"\nCompression, base beside KV-CAT: open {PAGE} in a browser"
    )
    print(
        f"See the run in MLflow:  {Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {store_uri()}"
    )


def _stages(stages: Stages, logs: Path) -> None:
    stages.stage(
        "model",
        "Fetch a real pretrained model, SmolLM2-135M, and write it as a Hugging Face checkpoint with tokenizer",
        fingerprint("model", 1),
        MODEL / "config.json",
        lambda: run(command("kvcat", "model", "fetch", "smollm2-135m", MODEL), logs / "model.log"),
    )

    def data() -> None:
        run(command("kvcat", "data", "fetch", "qasper", CORPUS), logs / "fetch.log")
        run(command("kvcat", "data", "build", CORPUS, "--tokenizer", MODEL, "--out", DATA), logs / "data.log")

    stages.stage(
        "data",
        "Fetch real long documents, the QASPER papers; split by document; build a Megatron indexed dataset",
        fingerprint("data", 1),
        DATA / "manifest.json",
        data,
    )

    def convert() -> None:
        if not examine(BASE).whole:  # not there, of an older version, or damaged
            run(command("kvcat", "convert", "import", MODEL, BASE, "--force"), logs / "import.log")
        verify = command("kvcat", "convert", "verify", MODEL, BASE, "--json", RESULTS / "verify.json")
        run(verify, logs / "verify.log")

    stages.stage(
        "convert",
        "Convert it to a Megatron distributed checkpoint, and prove that it is the same model",
        fingerprint("convert", 1),
        RESULTS / "verify.json",
        convert,
    )
    training = fingerprint(training_command(), settings(), (DATA / "manifest.json").read_text())
    finished = RunFolder(RUN).finished

    def train() -> None:
        if finished.is_file():  # of other settings: a new run must not go on from it
            RUN.rename(RUN.with_name(f"{RUN.name}-{int(finished.stat().st_mtime)}"))
        run(training_command(), logs / "train.log", shown=_SHOWN)
        if not finished.is_file():
            raise StageFailed(f"training ended early; {logs / 'train.log'} says why")

    stages.stage(
        "train",
        f"Train {STEPS} steps: each batch passes dense and masked, dense and masked validation before and after",
        training,
        finished,
        train,
    )

    def export() -> None:
        if EXPORTED.is_dir() and not has_manifest(
            EXPORTED
        ):  # of an older version: --force replaces folders with a manifest alone
            EXPORTED.rename(EXPORTED.with_name(f"{EXPORTED.name}-{int(EXPORTED.stat().st_mtime)}"))
        run(command("kvcat", "export", RUN, EXPORTED, "--base", BASE, "--force"), logs / "export.log")
        say = command("kvcat", "model", "generate", EXPORTED, "--json", RESULTS / "sample.json")
        run(say, logs / "generate.log")

    stages.stage(
        "export",
        "Export a plain Hugging Face model (no router in it), load it with transformers, generate",
        training,
        EXPORTED / "config.json",
        export,
    )

    compression = fingerprint(training, COMPRESSORS, KEEP, COUNT)
    # A folder for each model trained: one that was begun is gone on with, one of other weights would be refused.
    figures = RESULTS / f"continuation-{compression[:8]}"

    def curves() -> None:
        held_out = ["--held-out", str(json.loads((DATA / "manifest.json").read_text())["held_out"])]
        cut = ["--tokenizer", MODEL, *held_out, "--count", COUNT, "--out", WINDOWS]
        run(command("kvcat", "data", "windows", CORPUS, *cut), logs / "windows.log")
        models = [f"base={MODEL}", f"kv-cat={EXPORTED}"]
        what = ["--compressors", COMPRESSORS, "--keep", KEEP, "--windows", WINDOWS, "--out", figures]
        run(command("kvcat", "evaluate", "continuation", *models, *what), logs / "continuation.log")
        title = "Quickstart: compressing the cache of SmolLM2-135M before and after KV-CAT"
        run(command("kvcat", "report", figures, "--out", PAGE, "--title", title), logs / "page.log")

    stages.stage(
        "compress",
        "Compress the cache of held-out papers, base model and KV-CAT model side by side; write the page",
        compression,
        PAGE,
        curves,
    )

    def report() -> None:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        seconds = {name: entry["seconds"] for name, entry in stages.done.items()}
        write(RUN, DATA, RESULTS, stage_seconds=seconds, peak_of_children=peak)

    stages.stage("report", "Report: table, JSON with manifest, picture", training, REPORT, report)

    stages.stage(
        "track",
        "Attach report and picture to the run in MLflow (a local SQLite store)",
        training,
        REPORT,
        lambda: attach_to_mlflow(RUN, RESULTS),
    )
    print(table(json.loads(REPORT.read_text())))
    print(curve_lines(json.loads((figures / "results.json").read_text())["rows"]))


def curve_lines(rows: list[dict[str, Any]]) -> str:
    """ΔPPL of both models by compressor and budget, for a terminal."""
    deltas: dict[tuple[str, float], dict[str, float]] = {}
    for row in rows:
        if row["compressor"] != "none":
            deltas.setdefault((row["compressor"], row["keep"]), {})[row["model"]] = row["delta_ppl"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [f"\n{'perplexity lost by compression':34}" + "".join(f"{name:>10}" for name in models)]
    for (compressor, keep), values in deltas.items():
        lines.append(f"  {compressor:22}{keep:8.0%}  " + "".join(f"{values[name]:10.3f}" for name in models))
    return "\n".join(lines)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
