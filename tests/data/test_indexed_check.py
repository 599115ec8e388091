"""A broken indexed dataset is refused before anything starts; benchmarks/fault_cases.py has the ways to break one."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")


def test_every_way_to_break_one_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import fault_cases

    record = fault_cases.bad_data(tmp_path / "data")
    for name in ("fault_cases", "fault_server"):
        sys.modules.pop(name, None)
    assert record.tried >= 9 and record.survived == record.tried, record.failures
