"""Results on disk: every measured item is kept, so that a killed evaluation goes on and ends with the same file.

A results folder holds

    run.json         what the items were measured with: settings, models, data, versions; fixed by the first start
    items/ID.jsonl   one file per key; its first line is the key, then one line per item, appended and synced
    results.json     {"protocol", "rows", "manifest"}, written when everything asked for is there
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvcat_nemo.common.files import new_file
from kvcat_nemo.compress.budget import Budget
from kvcat_nemo.runs.provenance import manifest

NONE = "none"
"""The compressor's name in the key of what was measured over the full cache."""
_DECIDING = ("torch", "transformers", "tokenizers", "kvpress", "lm_eval")


@dataclass(frozen=True)
class Key:
    """What one row of results is about. Items of one key differ in the data alone."""

    protocol: str
    model: str
    """Name of the model; its fingerprint is one of the folder's facts."""
    compressor: str = NONE
    """Specification string of the compressor."""
    budget: str = "1"
    """As `budget_label` writes it: "0.1" is a kept fraction, "76t" are kept slots."""
    question_aware: bool = False
    """Whether the compressor saw the question behind the context."""
    extra: tuple[tuple[str, str], ...] = ()
    """What else tells rows of a protocol apart, such as (("task", "niah-single"),)."""

    def __str__(self) -> str:
        parts = [self.protocol, self.model, self.compressor, self.budget]
        parts += ["question-aware"] * self.question_aware + [f"{name}={value}" for name, value in self.extra]
        return " ".join(parts)

    @property
    def id(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:24]


def budget_label(budget: Budget | None) -> str:
    """The budget as keys and users write it; None (no compression) is "1"."""
    if budget is None:
        return "1"
    return f"{budget.tokens}t" if budget.tokens is not None else f"{budget.keep_fraction:.12g}"


def parse_budget(text: str | float) -> Budget:
    """A budget from "0.1" (kept fraction) or "76t" (kept slots per layer and KV head).

    Raises:
        ValueError: when it is neither, or out of range.
    """
    word = str(text).strip()
    try:
        if word.endswith("t"):
            return Budget(tokens=int(word[:-1]))
        return Budget(keep_fraction=float(word))
    except ValueError as error:
        if "keep" in str(error):
            raise
        raise ValueError(
            f"keep {word!r}: give a kept fraction such as 0.1, or a number of slots such as 76t"
        ) from None


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    # "hub" tells where a model was had from, which decides nothing: the same files may come from a folder.
    parts = (_flat(part, f"{name}.{key}".strip(".")) for key, part in value.items() if key != "hub")
    return {k: v for part in parts for k, v in part.items()}


def _differences(there: Mapping, now: Mapping) -> list[str]:
    old, new = _flat(there), _flat(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name, 'nothing')} there, {new.get(name, 'nothing')} now" for name in names]


class Store:
    """The items of one results folder.

    Args:
        out: folder; made when it is not there.
        facts: JSON values that decide every item: settings, fingerprints of the data, and under "models" the facts of
            each model by name. More models may join later; everything else must be as it was.

    Raises:
        ValueError: when the folder was made with other facts or other versions (the message names what differs), when
            another process is at work in it, or when a file in it is damaged.
    """

    def __init__(self, out: str | Path, facts: Mapping[str, Any]):
        self.out = Path(out)
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out={str(out)!r} is a file; give a folder")
        (self.out / "items").mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.out)
        self._items: dict[Key, dict[str, dict]] = {}
        facts = json.loads(json.dumps(facts))  # as it will be read back
        self._open(facts)

    def _open(self, facts: dict) -> None:
        path, now = self.out / "run.json", manifest()
        if not path.exists():
            if any((self.out / "items").glob("*.jsonl")):
                raise ValueError(f"{self.out}: has items but no run.json; give another folder")
            if (self.out / "results.json").exists():
                raise ValueError(
                    f"{self.out}: has a results.json but no run.json, so it is not ours; give another folder"
                )
            self.run = {"facts": facts, "manifest": now}
        else:
            self.run = _read_json(path)
            if not isinstance(self.run, dict) or not {"facts", "manifest"} <= self.run.keys():
                raise ValueError(f"{path}: not of an evaluation of kvcat; give another folder")
            there = self.run["facts"]
            models = {**there.get("models", {}), **facts.get("models", {})}
            compared = {**facts, "models": {k: models[k] for k in there.get("models", {})}}
            problems = _differences({"models": {}, **there}, compared)
            versions = self.run["manifest"]["versions"]
            problems += _differences(
                *({k: v[k] for k in _DECIDING if k in v} for v in (versions, now["versions"]))
            )
            if problems:
                more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
                raise ValueError(
                    f"{self.out}: its results were made otherwise: {'; '.join(problems[:4])}{more}. Give another"
                    " folder, or delete this one to start anew"
                )
            if models:
                there["models"] = models
            revisions = self.run["manifest"].setdefault("resumed_at", [])
            if now["git_revision"] not in [self.run["manifest"]["git_revision"], *revisions]:
                revisions.append(now["git_revision"])
            if not revisions:
                del self.run["manifest"]["resumed_at"]
        with new_file(path) as temporary:
            temporary.write_text(json.dumps(self.run, indent=1, ensure_ascii=False), encoding="utf-8")

    def _path(self, key: Key) -> Path:
        return self.out / "items" / f"{key.id}.jsonl"

    def _of(self, key: Key) -> dict[str, dict]:
        if key not in self._items:
            self._items[key] = _read_items(self._path(key))
        return self._items[key]

    def get(self, key: Key, item: str) -> dict | None:
        """The result of an item, or None when it has not been measured."""
        return self._of(key).get(item)

    def put(self, key: Key, item: str, result: dict) -> None:
        """Keep the result of an item; it is on disk when this returns.

        Raises:
            ValueError: when a figure is not finite.
        """
        for name, value in _flat(result).items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{key}, {item}: {name} is {number}; its logits are not finite numbers")
        items = self._of(key)
        lines = "" if items or self._path(key).exists() else json.dumps({"key": asdict(key)}) + "\n"
        lines += json.dumps({"item": item, "result": result}, ensure_ascii=False) + "\n"
        with open(self._path(key), "ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        # As read back, so that a resumed run works on the very same values.
        items[item] = json.loads(lines.split("\n")[-2])["result"]

    def close(self) -> None:
        """Let others open the folder."""
        self._lock.close()


def _lock(out: Path):
    import fcntl

    file = open(out / ".lock", "w")  # noqa: SIM115 (held until close; the system lets it go when we are killed)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(f"{out}: another evaluation is at work in this folder; wait for it") from None
    return file


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); delete the folder to start anew") from error


def _read_items(path: Path) -> dict[str, dict]:
    """Items of a key's file. A last line that a kill cut short goes, on disk too."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if not whole:
        path.unlink()
        return {}
    if len(whole) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    items = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            if "key" not in record:
                items[record["item"]] = record["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: damaged ({error}); delete the file to measure it anew"
            ) from None
    return items


def write_results(out: str | Path, protocol: str, rows: list[dict], facts: Mapping[str, Any]) -> Path:
    """Write OUT/results.json, one row a line.

    Args:
        facts: joins the manifest that was made when the folder was first opened (settings, models, data, versions).
    """
    path = Path(out) / "results.json"
    run = _read_json(Path(out) / "run.json")
    whole = {**run["manifest"], **run["facts"], **facts}
    # What a user has on disk may hold any name: no ASCII escapes. NaN is refused, it would not be JSON.
    text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    with new_file(path) as temporary:
        temporary.write_text(
            f'{{\n"protocol": {json.dumps(protocol)},\n"rows": [\n{lines}\n],\n"manifest": {text}\n}}\n',
            encoding="utf-8",
        )
    return path
