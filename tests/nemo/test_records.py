"""What a run writes about itself, without a training: the callback's hooks with stand-ins for the trainer."""

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.nemo


@pytest.fixture
def run(tmp_path):
    from nemo.utils import AppState

    before = AppState().log_dir
    AppState().log_dir = tmp_path
    yield tmp_path
    AppState().log_dir = before


def test_the_base_is_named_by_every_process_of_a_run(run):
    """NeMo moves loose files of a run's folder away when it resumes; the export needs this one."""
    from kvcat_nemo.nemo.records import KVCatRecords

    trainer = SimpleNamespace(is_global_zero=True, datamodule=SimpleNamespace(base="/ckpt/base"))
    for _ in range(2):
        (run / "kvcat_base.json").unlink(missing_ok=True)
        KVCatRecords().on_train_batch_end(trainer, None)
        assert (run / "kvcat_base.json").read_text() == '{"base": "/ckpt/base"}\n'
    (run / "kvcat_base.json").unlink()
    trainer.is_global_zero = False
    KVCatRecords().on_train_batch_end(trainer, None)
    assert not (run / "kvcat_base.json").exists()


def test_checkpoint_settings_are_those_that_can_be_set():
    from kvcat_nemo.nemo.checkpoint import KVCatCheckpoint
    from kvcat_nemo.nemo.records import _arguments

    assert _arguments(KVCatCheckpoint(keep_last=3)) == {
        "every_n_train_steps": 1000,
        "keep_last": 3,
        "keep_best": 1,
        "best_metric": "masked_ppl",
        "on_failed_save": "continue",
        "max_failed_saves": 3,
        "dirpath": None,
    }


def test_the_tracker_takes_no_credentials_as_an_argument(monkeypatch):
    from kvcat_nemo.nemo.mlflow_logger import MLflowTracker

    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as error:
        MLflowTracker(tracking_uri="http://ann:s3cret-word@host:5000")
    assert "s3cret-word" not in str(error.value)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:s3cret-word@host:5000")
    assert MLflowTracker()._uri == "http://host:5000"


def test_only_the_first_rank_writes(run, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    from kvcat_nemo.nemo.mlflow_logger import MLflowTracker

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run / 'mlflow.db'}")
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    tracker = MLflowTracker()
    tracker.log_line({"kind": "train", "step": 1, "time": 1.0, "loss/total": 1.0})
    tracker.log_metrics({"x": 1.0}, 1)
    tracker.log_hyperparams({"a": 1})
    tracker.log_files(run / "none")
    tracker.finalize()
    assert tracker._outbox is None and list(run.iterdir()) == []
