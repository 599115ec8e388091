"""Where the windows of a protocol come from: a file of them, or text they are cut from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvcat_nemo.data.corpora import CORPORA
from kvcat_nemo.data.tokenizer import load_tokenizer
from kvcat_nemo.evaluate.models import ModelFolder
from kvcat_nemo.evaluate.windows import (
    DEFAULT_CORPORA,
    Window,
    corpora_from_files,
    cut_windows,
    load_windows,
    standard_corpora,
    write_windows,
)


@dataclass(kw_only=True)
class WindowSource:
    """Settings of the windows; mixed into protocols (which have `seed`, `limit` and `out`)."""

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
        for name in self.corpora:
            if name not in CORPORA:
                raise ValueError(f"corpora: {name!r} is not known; choose among {', '.join(CORPORA)}")
        for path in self.text:
            if not Path(path).exists():
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
        tokenizer = load_tokenizer(models[0].path)
        options = {"seed": self.seed, "min_chars_per_token": self.min_chars_per_token}
        return cut_windows(corpora, tokenizer, int(self.windows), length=length, **options)

    def keep_windows(self, windows: list[Window]) -> None:
        """Write cut windows beside the results, so that another run can take the very same."""
        if not self.file:
            write_windows(windows, Path(self.out) / "windows.json")
