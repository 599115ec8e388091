"""Small results folders of every protocol, as an earlier version wrote them: `old/results.json` holds their files.

Run as a script it writes the folders anew, which is only right when a format changes on purpose:

    python tests/evaluate/old_runs.py OUT
"""

from __future__ import annotations

import json
from pathlib import Path

OLD = Path(__file__).parent / "old" / "results.json"
COMPRESSED = {"compressors": ["random", "recent+int8"], "keep": ["0.5"]}
RUNS = {
    "continuation": {"windows": "windows.json", "prefix": 40, "continuation": 12, **COMPRESSED},
    "gradient": {"windows": "windows.json", "prefix": 40, "continuation": 12, "steps": 2, "keep": ["0.5"]},
    "needle": {"lengths": ["200"], "depths": ["0", "1"], "samples": 1, "question": "known", **COMPRESSED},
    "ruler": {"tasks": ["niah-single"], "lengths": ["200"], "samples": 1, **COMPRESSED},
    "long-qa": {"questions": "squad", "file": "squad.json", **COMPRESSED},
    "base-ability": {"tasks": ["piqa", "winogrande"], "limit": 2, "data": "benchmarks"},
}


def write_inputs(folder: Path) -> None:
    """The text that the runs read: made of numbers alone, so that it is the same everywhere."""
    windows = [
        {"source": "t", "doc": str(n), "start": 0, "ids": [(7 * n + 3 * i * i) % 97 for i in range(52)]}
        for n in range(2)
    ]
    (folder / "windows.json").write_text(json.dumps(windows))
    questions = [{"id": "q", "question": "Who?", "answers": [{"text": "He"}]}]
    article = {"title": "T", "paragraphs": [{"context": "Some text. " * 12, "qas": questions}]}
    (folder / "squad.json").write_text(json.dumps({"data": [article]}))
    (folder / "benchmarks").mkdir()
    piqa = [{"goal": f"open door {n}", "sol1": "push it", "sol2": "eat it", "label": n % 2} for n in range(3)]
    grande = [
        {"sentence": f"The cup {n} fell, so _ broke.", "option1": "it", "option2": "he", "answer": "1"}
        for n in range(3)
    ]
    for name, records in (("piqa", piqa), ("winogrande", grande)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "benchmarks" / f"{name}.jsonl").write_text(lines)


def settings_of(name: str, model: Path, out: Path) -> dict:
    """What to make a protocol of, in the folder of the inputs."""
    return {"models": [f"m={model}"], "out": str(out), "threads": 1, **RUNS[name]}


def _write(out: Path) -> None:
    import os

    from kvcat_nemo.evaluate.registry import protocol_class
    from tests.support.hf_models import save_model

    out.mkdir(parents=True)
    model = save_model(out / "model").resolve()
    os.chdir(out)
    write_inputs(Path("."))
    for name in RUNS:
        protocol_class(name).of(settings_of(name, model, Path(name))).run()


if __name__ == "__main__":
    import sys

    _write(Path(sys.argv[1]))
