"""Protocols over windows of text: where the windows come from, and their batches."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcat_nemo.data.assets import registry_assets
from kvcat_nemo.data.reading import names_dataset
from kvcat_nemo.data.tokenizer import load_tokenizer
from kvcat_nemo.evaluate.cells import Cell, fed_by_compressors
from kvcat_nemo.evaluate.models import ModelFolder
from kvcat_nemo.evaluate.protocol import CompressionProtocol, Group
from kvcat_nemo.evaluate.results import Store
from kvcat_nemo.evaluate.settings import WindowSettings
from kvcat_nemo.evaluate.windows import (
    DEFAULT_CORPORA,
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
class WindowProtocol(WindowSettings, CompressionProtocol):
    """A protocol whose items are windows: a prefix that is compressed, and what follows it."""

    @abstractmethod
    def check_own(self, cells: list[Cell]) -> list[str]:
        """Check the protocol's own settings; lines of the plan."""

    @abstractmethod
    def batch(self, number: int, windows: list[Window]) -> Group:
        """Windows that go through the model together; `number`: the first one's place among all."""

    @abstractmethod
    def row(self, head: dict[str, Any], slots: int, items: list[dict[str, Any]]) -> dict[str, Any]:
        """A row of the results.

        Args:
            head: its first fields; slots: asked for; items: figures of each window.
        """

    @property
    def file(self) -> Path | None:
        """The file of windows, None when they are to be cut. A string of digits is a count."""
        return None if str(self.windows).isdigit() else Path(str(self.windows))

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.prefix + self.continuation

    @property
    def count(self) -> int:
        """Windows that will be measured, at most."""
        whole = len(self._loaded) if self.file else int(self.windows)
        return whole if self.limit is None else min(whole, self.limit)

    def prepare(self, models: list[ModelFolder]) -> list[str]:
        if self.prefix < 1 or self.continuation < 2:
            raise ValueError(
                f"prefix={self.prefix}, continuation={self.continuation}: give at least 1 token to compress and 2 that"
                " follow, as the first of them is not scored"
            )
        cells = self.cells()
        for model in models:
            model.check_reads(self.prefix, self.continuation, "give a smaller prefix")
            for what, tokens in self.fed_after(cells):
                model.check_reads(self.prefix, tokens, f"give a smaller prefix, or fewer tokens of {what}")
        source = self._check_source(models)
        return [
            f"windows      {source}: {self.prefix} tokens compressed, {self.continuation - 1} predictions each",
            *self.plan_of(cells),
            *self.check_own(cells),
        ]

    def cells(self) -> list[Cell]:
        return self.cells_of(self.prefix)

    def fed_after(self, cells: list[Cell]) -> Iterator[tuple[str, int]]:
        """What is fed behind the prefix besides the continuation, in words, and how many tokens at most."""
        yield from fed_by_compressors(cells, self.prefix)

    def _check_source(self, models: list[ModelFolder]) -> str:
        """Check where windows come from without tokenising text; says in words what it is.

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
            self._loaded = load_windows(self.file, length=self.length, vocab_size=vocabulary)
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

    def load_data(self, models: list[ModelFolder]) -> None:
        if self.file:
            self._whole = self._loaded
            return
        if self.text:
            corpora = corpora_from_files(self.text)
        else:
            corpora = standard_corpora(self.corpora_folder, self.corpora or DEFAULT_CORPORA)
        tokenizer = load_tokenizer(models[0].path, rules=IdRules(self.bos))
        options = {"seed": self.seed, "min_chars_per_token": self.min_chars_per_token}
        self._whole = cut_windows(corpora, tokenizer, int(self.windows), length=self.length, **options)

    def data_facts(self) -> dict[str, Any]:
        return {"windows": windows_fingerprint(self._whole)}

    def measure_model(self, store: Store, model: ModelFolder) -> None:
        if not self.file:  # beside the results, so that another run can take the very same
            write_windows(self._whole, Path(self.out) / "windows.json")
        super().measure_model(store, model)

    def groups(self) -> Iterator[Group]:
        windows = self._whole[: self.limit]
        for first in range(0, len(windows), self.batch_size):
            yield self.batch(first, windows[first : first + self.batch_size])

    def rows(self, store: Store, models: list[str]) -> list[dict[str, Any]]:
        names = item_ids(0, self._whole[: self.limit])
        rows = []
        for model in models:
            for cell in self._measured_cells():
                key = self.key(model, cell)
                items = [store.get(key, name) for name in names]
                slots = cell.budget.slots(self.prefix) if cell else self.prefix
                rows.append(self.row(self.head(model, cell, [self.prefix]), slots, items))
        return rows

    def told(self) -> dict[str, Any]:
        windows = [{"source": w.source, "doc": w.doc, "start": w.start} for w in self._whole[: self.limit]]
        return {"windows": windows, "question_aware": False}


def item_ids(first: int, windows: list[Window]) -> list[str]:
    """Names on disk: place among all windows and tokens; both, so that a window that is there twice is measured twice."""
    digests = [hashlib.sha256(json.dumps(w.ids).encode()).hexdigest()[:12] for w in windows]
    return [f"{first + i}-{digest}" for i, digest in enumerate(digests)]
