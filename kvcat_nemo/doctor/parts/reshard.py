"""A checkpoint at another layout."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from kvcat_nemo.doctor import compare
from kvcat_nemo.doctor.parts.host import Host, agree, need
from kvcat_nemo.doctor.parts.parallel import of_two
from kvcat_nemo.doctor.ranks import result_of
from kvcat_nemo.doctor.report import Check, checked


def checks(host: Host) -> Iterator[Check]:
    """A checkpoint of the distributed optimizer that one process wrote goes on at TP2: the same weights and moments."""
    need("megatron.core")
    yield checked("TP1 → TP2", functools.partial(_reshard, host))


def _reshard(host: Host) -> dict[str, Any]:
    one, two = of_two(host)
    found = result_of(two, "resumed")
    agree(
        compare.checkpoint_differences(host.folder / "two" / "saved", host.folder / "two" / "again"),
        compare.figures_differ(found["figures"], result_of(one, "resumed")["figures"]),
    )
    return {}
