"""Attention kernels, each case against float64."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator

from kvcat_nemo.doctor.parts.host import Host
from kvcat_nemo.doctor.report import SKIPPED, Check, checked


def checks(host: Host) -> Iterator[Check]:
    """Every case of kernel_cases.py on every attention kernel that is installed."""
    from kvcat_nemo.doctor.kernel_cases import CASES, HOSTS, run_case
    from kvcat_nemo.kernels.fused.selection import PACKAGES

    for backend, where in HOSTS.items():
        if where.device != host.device:
            continue
        package = PACKAGES.get(backend)
        if package and importlib.util.find_spec(package) is None:
            yield Check(backend, SKIPPED, f"{package} is not installed")
            continue
        for name, case in CASES.items():
            yield checked(f"{backend}: {name}", functools.partial(run_case, where, case))
