"""Protocols over windows of text: where the windows come from, and the frame of check and run."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcat_nemo.data.assets import registry_assets
from kvcat_nemo.data.reading import names_dataset
from kvcat_nemo.data.tokenizer import load_tokenizer
from kvcat_nemo.evaluate.models import ModelFolder
from kvcat_nemo.evaluate.protocol import Cell, CompressionProtocol, fed_by_compressors
from kvcat_nemo.evaluate.results import Store, write_results
from kvcat_nemo.evaluate.runner import set_threads
from kvcat_nemo.evaluate.windows import (
    CONTINUATION,
    DEFAULT_CORPORA,
    PREFIX,
    Window,
    corpora_from_files,
    cut_windows,
    load_windows,
    standard_corpora,
    windows_fingerprint,
    write_windows,
)
from kvcat_nemo.tokens import IdRules


@dataclass(kw_only=True)
class WindowSource:
    """Settings of the windows; mixed into protocols (which have `seed`, `limit`, `bos` and `out`)."""

    windows: int | str = 20
    """How many to cut, or a JSON file with them: a list of {"source", "doc", "start", "ids"}."""
    text: list[str] = field(default_factory=list)
    """Files or folders to cut from (.txt, .jsonl, .jsonl.gz, .parquet); instead of `corpora`."""
    corpora: list[str] = field(default_factory=list)
    """Named corpora to cut from, as `kvcat data fetch` knows them; fetched when missing. Default: six of them."""
    corpora_folder: str = "data/corpora"
    """Where the named corpora are kept."""

    min_chars_per_token: float = 3.0
    """Windows with fewer characters a token (tables, hexadecimal) are passed over when cutting; 0 takes all."""

    @property
    def file(self) -> Path | None:
        """The file of windows, None when they are to be cut. A string of digits is a count."""
        return None if str(self.windows).isdigit() else Path(str(self.windows))

    @property
    def count(self) -> int:
        """Windows that will be measured, at most."""
        whole = len(self._loaded) if self.file else int(self.windows)
        return whole if self.limit is None else min(whole, self.limit)

    def check_windows(self, models: list[ModelFolder], length: int) -> str:
        """Check the source without tokenising text; says in words what it is.

        Raises:
            ValueError: a file that is missing or wrong, an unknown corpus, text and corpora or a file at once.
        """
        given = [name for name in ("text", "corpora") if getattr(self, name)]
        if self.file:
            if self.bos != "auto":
                raise ValueError(
                    f"bos={self.bos!r}: {str(self.file)!r} holds token ids, which are taken as they are; give bos to"
                    " `kvcat data windows`, which makes such files"
                )
            if given:
                raise ValueError(
                    f"windows={str(self.file)!r} is a file of windows: leave out {' and '.join(given)}"
                )
            vocabulary = min((m.vocab_size for m in models if m.vocab_size), default=None)
            self._loaded = load_windows(self.file, length=length, vocab_size=vocabulary)
            return f"{self.count} of {self.file}"
        if int(self.windows) < 1:
            raise ValueError(f"windows={self.windows}: give at least 1, or a file of windows")
        if len(given) > 1:
            raise ValueError("text and corpora: give one of them")
        known = [] if self.text else registry_assets("corpora").CORPORA
        for name in self.corpora:
            if name not in known:
                raise ValueError(f"corpora: {name!r} is not known; choose among {', '.join(known)}")
        for path in self.text:
            if not Path(path).exists() and not names_dataset(path):
                raise ValueError(f"text: {path!r} does not exist; give a file or folder of text")
        return f"{self.count} from {', '.join(self.text or self.corpora or DEFAULT_CORPORA)}"

    def load(self, models: list[ModelFolder], length: int) -> list[Window]:
        """The windows, before `limit`.

        Raises:
            ValueError: as `check_windows`; too little text.
        """
        self.check_windows(models, length)
        if self.file:
            return self._loaded
        if self.text:
            corpora = corpora_from_files(self.text)
        else:
            corpora = standard_corpora(self.corpora_folder, self.corpora or DEFAULT_CORPORA)
        tokenizer = load_tokenizer(models[0].path, rules=IdRules(self.bos))
        options = {"seed": self.seed, "min_chars_per_token": self.min_chars_per_token}
        return cut_windows(corpora, tokenizer, int(self.windows), length=length, **options)

    def keep_windows(self, windows: list[Window]) -> None:
        """Write cut windows beside the results, so that another run can take the very same."""
        if not self.file:
            write_windows(windows, Path(self.out) / "windows.json")


@dataclass(kw_only=True)
class WindowProtocol(WindowSource, CompressionProtocol):
    """A protocol whose items are windows: a prefix that is compressed, and what follows it."""

    prefix: int = PREFIX
    """Tokens whose cache is compressed."""
    continuation: int = CONTINUATION
    """Tokens that follow, of which all but the first are scored."""

    @abstractmethod
    def check_own(self, cells: list[Cell]) -> list[str]:
        """Check the protocol's own settings; lines of the plan."""

    @abstractmethod
    def own_settings(self) -> dict[str, Any]:
        """Facts that decide every item."""

    @abstractmethod
    def measure_model(
        self, store: Store, model: ModelFolder, windows: list[Window], cells: list[Cell]
    ) -> None:
        """Put a model's items into the store."""

    @abstractmethod
    def rows(self, store: Store, models: list[str], windows: list[Window], cells: list[Cell]) -> list[dict]:
        """Rows of the results, from the store."""

    def check(self) -> list[str]:
        models, cells = self._checked()
        source = self.check_windows(models, self.prefix + self.continuation)
        own = self.check_own(cells)
        return [
            f"{self.name} → {self.out}",
            f"models       {', '.join(self.model_facts(models))}",
            f"windows      {source}: {self.prefix} tokens compressed, {self.continuation - 1} predictions each",
            f"compressors  {', '.join(dict.fromkeys(c.name for c in cells))}",
            f"keep         {', '.join(dict.fromkeys(c.label for c in cells))}",
            *own,
        ]

    def _checked(self) -> tuple[list[ModelFolder], list[Cell]]:
        models = self.check_common()
        if self.prefix < 1 or self.continuation < 2:
            raise ValueError(
                f"prefix={self.prefix}, continuation={self.continuation}: give at least 1 token to compress and 2 that"
                " follow, as the first of them is not scored"
            )
        length = self.prefix + self.continuation
        cells = self.cells(self.prefix)
        for model in models:
            model.check_reads(self.prefix, length - self.prefix, "give a smaller prefix")
            for what, tokens in self.fed_after(cells):
                model.check_reads(self.prefix, tokens, f"give a smaller prefix, or fewer tokens of {what}")
        return models, cells

    def fed_after(self, cells: list[Cell]) -> Iterator[tuple[str, int]]:
        """What is fed behind the prefix besides the continuation, in words, and how many tokens at most."""
        yield from fed_by_compressors(cells, self.prefix)

    def run(self) -> Path:
        self.check()
        models, cells = self._checked()
        windows = self.load(models, self.prefix + self.continuation)
        threads = set_threads(self.threads)
        facts = {
            "protocol": self.name,
            "settings": self.own_settings(),
            "data": {"windows": windows_fingerprint(windows)},
            "models": self.model_facts(models),
        }
        store = Store(self.out, facts)
        self.keep_windows(windows)
        windows = windows[: self.limit]
        for model in models:
            self.measure_model(store, model, windows, cells)
        rows = self.rows(store, [m.name for m in models], windows, cells)
        told = [{"source": w.source, "doc": w.doc, "start": w.start} for w in windows]
        more = {"windows": told, "threads": threads, "question_aware": False}
        path = write_results(self.out, self.name, rows, more)
        store.close()
        return path


def item_id(number: int, window: Window) -> str:
    """Place among the windows and tokens; both, so that a window that is there twice is measured twice."""
    return f"{number}-{hashlib.sha256(json.dumps(window.ids).encode()).hexdigest()[:12]}"


class Lazy:
    """Calls once, when first asked, and keeps the answer."""

    def __init__(self, function):
        self.function = function

    def __call__(self):
        if not hasattr(self, "value"):
            self.value = self.function()
        return self.value
