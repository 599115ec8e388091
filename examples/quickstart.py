"""`make quickstart`: the commands of a first run, from nothing to the report. It prints each and runs it.

Run again, it goes on where it stopped: a step is left out when its result is there and it, what it reads and all steps before
it are the same as then. Each step's whole output is in results/quickstart/logs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

BIN, ROOT = Path(sys.executable).parent, Path(__file__).resolve().parents[1]
RESULTS = Path("results/quickstart")
MODEL, BASE = "models/smollm2-135m", "models/smollm2-135m-megatron"
CORPUS, DATA = "data/qasper.jsonl", "data/qasper"
RUN, EXPORTED, FIGURES, PAGE = (
    f"{RESULTS}/{name}" for name in ("run", "model", "continuation", "report.html")
)
STEPS = int(os.environ.get("KVCAT_QUICKSTART_STEPS", "32"))
HELD_OUT = 0.1
FACTORY = f"kvcat_smollm2_135m(base='{BASE}', paths='{DATA}', dir='{RESULTS}', name='run')"
# Lines of training's output that are shown; three validations: before, in the middle and after.
SHOWN = re.compile(r"(training: |validation at step|step \d+: held-out|kvcat: )")


@dataclass(frozen=True)
class Step:
    """Commands with one result."""

    name: str
    what: str
    result: str
    commands: tuple[str, ...]
    reads: tuple[str, ...] = ()
    """More that decides the result: glob patterns below the checkout, or files made before."""
    fresh: tuple[str, ...] = ()
    """What a finished run of other settings left: moved aside first, because a new one must not go on from it."""
    shown: re.Pattern = re.compile("")


PLAN = [
    Step("model", "Fetch a real pretrained model, SmolLM2-135M, as a Hugging Face checkpoint with tokenizer",
         f"{MODEL}/config.json", (f"kvcat model fetch smollm2-135m {MODEL}",)),
    Step("data", "Fetch real long documents, the QASPER papers; split by document; build a Megatron indexed dataset",
         f"{DATA}/manifest.json",
         (f"kvcat data fetch qasper {CORPUS}",
          f"kvcat data build {CORPUS} --tokenizer {MODEL} --held-out {HELD_OUT} --out {DATA}")),
    Step("convert", "Convert the model to a Megatron distributed checkpoint, and prove that it is the same model",
         f"{RESULTS}/verify.json",
         (f"kvcat convert import {MODEL} {BASE} --force",
          f"kvcat convert verify {MODEL} {BASE} --json {RESULTS}/verify.json")),
    Step("train", f"Train {STEPS} steps: each batch passes dense and masked, with validation before and after",
         f"{RUN}/kvcat/finished.json",
         (f'nemo llm pretrain --factory "{FACTORY}" -y trainer.max_steps={STEPS}'
          f" trainer.val_check_interval={max(STEPS // 2, 1)} log.ckpt.every_n_train_steps={STEPS}",),
         reads=("recipes/*.py", "kvcat_nemo/method/**/*.py", f"{DATA}/manifest.json"), fresh=(RUN, FIGURES, PAGE), shown=SHOWN),
    Step("export", "Export a plain Hugging Face model (no router in it), load it with transformers, generate",
         f"{EXPORTED}/config.json",
         (f"kvcat export {RUN} {EXPORTED} --base {BASE} --force",
          f"kvcat model generate {EXPORTED} --json {RESULTS}/sample.json")),
    Step("compress", "Compress the cache of held-out papers, base model and KV-CAT model side by side; write the page",
         PAGE,
         (f"kvcat data windows {CORPUS} --tokenizer {MODEL} --held-out {HELD_OUT} --count 6 --out {RESULTS}/windows.json",
          f"kvcat evaluate continuation base={MODEL} kv-cat={EXPORTED} --compressors attention-matching,rkv,recent:sinks=4"
          f" --keep 0.05,0.1,0.2 --windows {RESULTS}/windows.json --out {FIGURES}",
          f"kvcat report {FIGURES} --out {PAGE} --title 'Quickstart: the cache of SmolLM2-135M before and after KV-CAT'"),
         fresh=(FIGURES,)),
]  # fmt: skip


def run(command: str, log: Path, shown: re.Pattern = re.compile("")) -> None:
    """Print and run a command of this environment; lines that match `shown` go to the terminal, all of them to the log.

    Raises:
        SystemExit: when it fails, with its last lines.
    """
    print(f"  $ {command}", flush=True)
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1", "COLUMNS": "110"}
    environment |= {
        "NEMORUN_HOME": str(RESULTS.resolve() / "nemo_run"),
        "PATH": f"{BIN}:{os.environ.get('PATH', '')}",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file, subprocess.Popen(
        shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:  # fmt: skip
        pending = b""
        while piece := process.stdout.read1(4096):
            file.write(piece)
            *lines, pending = re.split(rb"(?<=[\r\n])", pending + piece)
            for line in (line.decode("utf-8", "replace") for line in lines):
                if shown.search(line):
                    print(f"  {line.lstrip()}", end="", flush=True)
    if process.returncode:
        tail = "\n".join(log.read_text("utf-8", "replace").replace("\r", "\n").splitlines()[-25:])
        sys.exit(
            f"\nquickstart stopped: {command}\nended with code {process.returncode}; its last lines ({log} has all):\n{tail}"
        )


def key_of(step: Step, before: str) -> str:
    """What decides a step's result: its commands, what it reads, and the key of the step before it."""
    files = sorted({f for pattern in step.reads for folder in (Path(), ROOT) for f in folder.glob(pattern)})
    parts = [before, *step.commands, *(file.read_text() for file in files)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def carry_out(plan: list[Step], results: Path) -> dict[str, dict]:
    """Run the steps that are not done yet; returns {"key", "seconds"} of each, as kept in stages.json."""
    state, key = results / "stages.json", ""
    done = json.loads(state.read_text()) if state.is_file() else {}
    for number, step in enumerate(plan, 1):
        print(f"\n[{number}/{len(plan) + 1}] {step.what}", flush=True)
        key, started = key_of(step, key), time.time()
        if done.get(step.name, {}).get("key") == key and Path(step.result).exists():
            print(f"  done before ({done[step.name]['seconds']:.0f} s), re-used: {step.result}")
            continue
        if Path(step.result).exists():
            for folder in filter(Path.exists, map(Path, step.fresh)):
                folder.rename(folder.with_name(f"{folder.name}-{int(folder.stat().st_mtime)}"))
        log = results / "logs" / f"{step.name}.log"
        log.unlink(missing_ok=True)
        for command in step.commands:
            run(command, log, step.shown)
        if not Path(step.result).exists():
            sys.exit(f"\nquickstart stopped: step {step.name} left no {step.result}; {log} says why")
        done[step.name] = {"key": key, "seconds": time.time() - started}
        state.with_suffix(".tmp").write_text(json.dumps(done, indent=2))
        os.replace(state.with_suffix(".tmp"), state)
        print(f"  done in {done[step.name]['seconds']:.0f} s", flush=True)
    return done


def curve_lines(rows: list[dict]) -> str:
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


def main() -> None:
    from kvcat_nemo.tracking.mlflow_run import store_uri
    from kvcat_nemo.tracking.run_report import attach_to_mlflow, table, write

    print("KV-CAT quickstart: continued pretraining of SmolLM2-135M on full scientific papers, so that its KV cache compresses"
          "\nbetter. All of it runs on the CPU; each line after $ is a command that you can use yourself.")  # fmt: skip
    started, done = time.time(), carry_out(PLAN, RESULTS)
    print(
        f"\n[{len(PLAN) + 1}/{len(PLAN) + 1}] Report: table, JSON with manifest, picture; attached to the run in MLflow"
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    seconds = {name: entry["seconds"] for name, entry in done.items()}
    made, trained = RESULTS / "report.json", Path(RUN, "kvcat", "finished.json")
    if not made.exists() or made.stat().st_mtime < trained.stat().st_mtime:
        report = write(Path(RUN), Path(DATA), RESULTS, stage_seconds=seconds, peak_of_children=peak)
        attach_to_mlflow(Path(RUN), RESULTS)
    else:
        report = json.loads(made.read_text())
    print(table(report))
    print(curve_lines(json.loads(Path(FIGURES, "results.json").read_text())["rows"]))
    print(f"\nAll steps took {(time.time() - started) / 60:.1f} minutes. Training: {RESULTS}/report.json and losses.png"
          f"\nCompression, base beside KV-CAT: open {PAGE} in a browser"
          f"\nThe run in MLflow: {BIN / 'mlflow'} ui --backend-store-uri {store_uri()}")  # fmt: skip


if __name__ == "__main__":
    main()
