"""A run's records, damaged in every way, at every reader: each gives an answer, or names the file; none ends with a traceback."""

import json
import shutil

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.models.function import stored_function
from kvcat_nemo.runs.checkpoints import find_checkpoint
from kvcat_nemo.runs.layout import MANIFEST, RECORD, SCORE, RunFolder, read_record
from kvcat_nemo.runs.metrics_file import MetricsFile
from kvcat_nemo.runs.retention import read_score, write_score
from kvcat_nemo.runs.vocabulary import recorded
from kvcat_nemo.tracking.afterwards import bring, register_model
from kvcat_nemo.watch.state import RunWatcher

DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_text(""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00" + path.read_bytes()),
    "a list": lambda path: path.write_text("[1, 2]"),
    "a number": lambda path: path.write_text("7"),
    "nested too deep": lambda path: path.write_text("[" * 100_000),
    "other values": lambda path: path.write_text('{"kind": 1, "step": "x", "trainer": [], "model": 3, "run_id": {}}'),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}  # fmt: skip
RECORDS = ("metrics", "config", "finished", "mlflow_run")


@pytest.fixture
def run(made, tmp_path):
    """A finished run of four steps."""
    run = RunFolder(shutil.copytree(made / "run", tmp_path / "run"))
    run.records.mkdir()
    file = MetricsFile(run.metrics, resumed_at=0)
    for step in range(1, 5):
        file.write("train", step, {"loss/total": 1.0 / step, "time": 1e9 + step, "step_seconds": 1.0})
    run.config.write_text(json.dumps({"trainer": {"max_steps": 4}, "model": {"vocab_size": 40, "kvcat": {}}}))
    run.finished.write_text('{"step": 4}')
    run.mlflow_run.write_text(json.dumps({"training": "0" * 32}))
    return run


def _watch(run, out, monkeypatch):
    said = RunWatcher(run.path).snapshot()
    assert said.checkpoint == "step=4"
    return said.status


def _watch_command(run, out, monkeypatch):
    done = CliRunner().invoke(main, ["train", "watch", str(run.path), "--once"])
    assert done.exit_code == 0 and done.exception is None, done.exception
    assert "step=4" in done.output


def _track(run, out, monkeypatch):
    # The store refuses at once: what is wrong with the records is said before it is asked.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    try:
        bring(run.path)
    except ValueError as error:
        if "127.0.0.1:9" not in str(error):
            raise


def _register(run, out, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    try:
        register_model(out, "name", run=run.path)
    except ValueError as error:
        if "127.0.0.1:9" not in str(error):
            raise


def _function(run, out, monkeypatch):
    stored_function(run.checkpoints / "step=4")


def _vocabulary(run, out, monkeypatch):
    checkpoint = run.checkpoints / "step=4"
    (checkpoint / MANIFEST).unlink()  # with one, it records the vocabulary itself
    recorded(find_checkpoint(checkpoint, unverified=True))


def _resume(run, out, monkeypatch):
    MetricsFile(run.metrics, resumed_at=2)


READERS = {
    "watch": (_watch, set()),
    "kvcat train watch": (_watch_command, set()),
    "track": (_track, {"metrics", "config", "mlflow_run"}),
    "register": (_register, {"mlflow_run"}),
    "stored function": (_function, {"config"}),
    "vocabulary": (_vocabulary, {"config"}),
    "resume": (_resume, set()),
}
"""Reader → the function, and the records that it cannot do without: only of those may it end with an error."""


@pytest.mark.parametrize("reader", READERS)
def test_a_whole_run(reader, run, tmp_path, monkeypatch):
    READERS[reader][0](run, tmp_path / "model", monkeypatch)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("record", RECORDS)
def test_every_reader(record, damage, run, tmp_path, monkeypatch):
    DAMAGES[damage](getattr(run, record))
    told = getattr(run, record).name
    for reader, (read, needs) in READERS.items():
        if (record, damage, reader) == ("metrics", "a folder", "resume"):
            continue  # it writes the file; the operating system's own error names it
        copy = RunFolder(shutil.copytree(run.path, tmp_path / reader))
        try:
            read(copy, tmp_path / "model", monkeypatch)
        except (ValueError, OSError) as error:
            assert record in needs and told in str(error), (reader, error)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_score_is_none(damage, tmp_path):
    write_score(tmp_path, "masked_ppl", 3.0)
    assert read_score(tmp_path, "masked_ppl") == 3.0
    DAMAGES[damage](tmp_path / SCORE)
    assert read_score(tmp_path, "masked_ppl") is None


def test_a_damaged_record_says_what_helps(run):
    run.mlflow_run.write_text('{"run_id": ')
    with pytest.raises(
        ValueError, match=r"mlflow_run.json is damaged .*: put it back from a copy, or move it away"
    ):
        read_record(run.mlflow_run)
    assert read_record(run.path / "not there") == {}


def test_the_checkpoints_record_is_under_its_manifest():
    from kvcat_nemo.runs.checkpoint_manifest import _NOT_LISTED

    assert RECORD not in _NOT_LISTED
