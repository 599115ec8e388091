"""A broken indexed dataset is refused before anything starts; benchmarks/faults/damage.py has the ways to break one."""

import pytest

pytest.importorskip("megatron.core")


def test_every_way_to_break_one_is_found(tmp_path):
    from benchmarks.faults import damage

    record = damage.bad_files(tmp_path / "data")
    assert record.tried >= 9 and record.survived == record.tried, record.failures
