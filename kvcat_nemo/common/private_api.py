"""Reaching for what another package does not promise to keep: looked for at once, refused by a clear error where it is gone."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Package:
    """Another package, and the versions in which its private parts were looked at."""

    distribution: str
    checked: str
    """Versions, as words."""

    def reach(self, holder: Any, name: str, why: str, *, takes: Collection[str] = ()) -> Any:
        """`holder.name`.

        Args:
            why: what it is needed for; takes: names of parameters that it must have, where it is a function.

        Raises:
            ImportError: when there is no such name, or it does not take these parameters.
        """
        what = f"{getattr(holder, '__qualname__', getattr(holder, '__name__', holder))}.{name}"
        try:
            found = getattr(holder, name)
        except AttributeError:
            raise self.other(what, "is not there", why) from None
        missing = set(takes) - set(inspect.signature(found).parameters) if takes else None
        if missing:
            raise self.other(what, f"does not take {', '.join(sorted(missing))}", why)
        return found

    def other(self, what: str, how: str, why: str) -> ImportError:
        """The error for an interface that is another one than was looked at."""
        try:
            version = importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        return ImportError(
            f"{what} {how} in {self.distribution} {version}: kvcat-nemo needs it to {why}; install {self.distribution} "
            f"{self.checked}, for which this was checked"
        )
