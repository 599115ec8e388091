"""`nemo llm pretrain` with a KV-CAT recipe, as a user types it: start from a base, resume, export, records."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.nemo, pytest.mark.slow]

BIN = Path(sys.executable).parent
STEPS = 40
SAVE_EVERY = 10


def start(folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "NEMORUN_HOME": str(folder / ".nemo_run"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [*launcher, str(BIN / "nemo"), "llm", "pretrain", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the process and all that it started (the checkpoint writer is a process of its own)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def nemo(folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> tuple[int, str]:
    """Exit code and output of `nemo llm pretrain …`."""
    process = start(folder, *arguments, launcher=launcher)
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        kill(process)
    return process.returncode, output


def training(folder: Path, base: Path) -> tuple[str, ...]:
    return (
        "--factory",
        f"kvcat_tiny(dir='{folder / 'runs'}', name='tiny')",
        "-y",
        f"resume.base={base}",
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={STEPS // 2}",
        f"log.ckpt.every_n_train_steps={SAVE_EVERY}",
    )


def train(folder: Path, base: Path) -> Path:
    code, output = nemo(folder, *training(folder, base))
    run = folder / "runs" / "tiny"
    assert code == 0 and (run / "kvcat" / "finished.json").is_file(), output[-4000:]
    return run


def metrics(run: Path) -> list[dict]:
    from kvcat_nemo.nemo.mlflow_logger import MetricsFile
    from kvcat_nemo.runs.layout import METRICS_FILE

    return MetricsFile.lines(run / "kvcat" / METRICS_FILE)


@pytest.fixture(scope="module")
def straight(base, tmp_path_factory):
    """A run that nothing interrupts."""
    return train(tmp_path_factory.mktemp("straight"), base[1])


@pytest.fixture(scope="module")
def resumed(base, tmp_path_factory):
    """The same run, killed some steps after its first checkpoint, and started again."""
    folder = tmp_path_factory.mktemp("resumed")
    run = folder / "runs" / "tiny"
    process = start(folder, *training(folder, base[1]))
    deadline = time.monotonic() + 300
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if run.is_dir() and max((x["step"] for x in metrics(run)), default=0) >= SAVE_EVERY + 3:
                break
            time.sleep(0.02)
    finally:
        kill(process)
        output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL and not (run / "kvcat" / "finished.json").exists(), output[
        -3000:
    ]
    return train(folder, base[1])


def held_out_ce(folder: Path) -> float:
    """Mean cross-entropy of a Hugging Face model on kvcat_tiny's validation windows."""
    from transformers import AutoModelForCausalLM

    from kvcat_nemo.nemo.data_module import RecallDataset

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = RecallDataset(8, 64, 128, seed=1235)  # two validation batches of four windows
    batch = [windows[i] for i in range(len(windows))]
    ids, labels = (torch.stack([w[name] for w in batch]) for name in ("tokens", "labels"))
    with torch.no_grad():
        logits = model(ids).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


def test_starts_from_the_base_models_weights(straight, base):
    before = next(x for x in metrics(straight) if x["kind"] == "validation" and x["step"] == 0)
    assert before["loss/anchor"] == pytest.approx(held_out_ce(base[0]), abs=1e-5)


def test_checkpoints_say_what_was_trained(straight, base, tmp_path):
    """The record is under the manifest; export compares the base with it."""
    from kvcat_nemo.conversion.exporting import export_hf
    from kvcat_nemo.models.function import differences, function_of_model, stored_function
    from kvcat_nemo.models.hf_config import read_model
    from kvcat_nemo.runs.checkpoint_manifest import read_manifest
    from kvcat_nemo.runs.checkpoints import complete
    from kvcat_nemo.runs.layout import RECORD

    newest = complete(straight / "checkpoints")[0].path
    assert RECORD in read_manifest(newest).files
    function, file = stored_function(newest / "weights")
    described = function_of_model(read_model(base[0]))
    assert file == newest / RECORD and not differences(function, described)
    assert set(function) == set(described)  # nothing is left open
    export_hf(newest, tmp_path / "same", base=base[0])
    other = Path(shutil.copytree(base[0], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    with pytest.raises(ValueError, match=r"rotary_base is 10000.0 in .*kvcat_model.json and 20000.0 in"):
        export_hf(straight, tmp_path / "wrong", base=other)


def test_named_figures(straight):
    train_lines = [x for x in metrics(straight) if x["kind"] == "train"]
    assert [x["step"] for x in train_lines] == list(range(1, STEPS + 1))
    last = train_lines[-1]
    for name in ("anchor", "distill", "budget"):
        assert last[f"loss/{name}"] > 0 and last[f"weighted/{name}"] > 0
    assert last["loss/total"] == pytest.approx(
        sum(last[f"weighted/{n}"] for n in ("anchor", "distill", "budget"))
    )
    for name in (
        "ce_masked",
        "top1_agreement",
        "keep_rate",
        "keep_rate/group0",
        "keep_rate/group1",
        "flipped",
    ):
        assert name in last
    for name in ("grad_norm/backbone", "grad_norm/routers", "tokens_per_second", "peak_memory_bytes"):
        assert last[name] > 0
    assert train_lines[-1]["loss/anchor"] < train_lines[0]["loss/anchor"]


def test_validates_before_and_after_on_the_same_windows(straight):
    held = [x for x in metrics(straight) if x["kind"] == "validation"]
    assert [x["step"] for x in held] == [0, STEPS // 2, STEPS]
    assert len({x["tokens"] for x in held}) == 1 and held[0]["tokens"] == 8 * 64
    assert all({"dense_ppl", "masked_ppl", "keep_rate"} <= set(x) for x in held)


def test_resume_is_exact(straight, resumed):
    """Every figure but times and memory, to the last bit, whatever was lost in the kill."""
    from kvcat_nemo.runs.metrics_file import TIMED

    # Measured on the previous step's window, which a new process does not have.
    fresh = {"flipped", "flipped/group0", "flipped/group1"}

    def comparable(run):
        return [{k: v for k, v in line.items() if k not in TIMED | fresh} for line in metrics(run)]

    assert comparable(resumed) == comparable(straight)


def test_one_mlflow_run_in_which_no_step_stands_twice(resumed):
    from mlflow import MlflowClient

    root = resumed.parent.parent
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(runs) == 1
    run = runs[0]
    assert run.info.run_id == json.loads((resumed / "kvcat" / "mlflow_run.json").read_text())["run_id"]
    assert run.info.status == "FINISHED"
    for name in ("train/loss/total", "train/keep_rate", "train/grad_norm/routers"):
        assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == list(range(1, STEPS + 1))
    assert run.data.params["model.kvcat.policy"] == "router"
    assert {f.path for f in client.list_artifacts(run.info.run_id)} >= {"config.json"}


TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def a_few_steps(folder: Path, base: Path, *more: str, launcher: tuple[str, ...] = ()) -> list[dict]:
    """Figures of four training steps."""
    arguments = [*training(folder, base), *more]
    arguments[arguments.index(f"trainer.max_steps={STEPS}")] = "trainer.max_steps=4"
    arguments[arguments.index(f"trainer.val_check_interval={STEPS // 2}")] = "trainer.val_check_interval=4"
    code, output = nemo(folder, *arguments, launcher=launcher)
    assert code == 0, output[-4000:]
    out = [x for x in metrics(folder / "runs" / "tiny") if x["kind"] == "train"]
    assert [x["step"] for x in out] == [1, 2, 3, 4]
    return out


def assert_same(together: list[dict], alone: list[dict]) -> None:
    for line, expected in zip(together, alone, strict=True):
        for name in ("loss/anchor", "ce_masked", "grad_norm/backbone"):
            assert line[name] == pytest.approx(expected[name], rel=2e-4), (line["step"], name)


@pytest.mark.multiprocess
def test_two_processes_train_as_one(straight, base, tmp_path):
    """The same command under torchrun, at TP2: the same figures to float32 rounding, one writer of records.

    Other layouts are compared in test_faults, whose processes need no import of NeMo each.
    """
    layout = ("trainer.devices=2", "trainer.strategy.tensor_model_parallel_size=2")
    together = a_few_steps(tmp_path, base[1], *layout, launcher=TWO)
    assert_same(together, [x for x in metrics(straight) if x["kind"] == "train"][:4])


def test_a_layout_that_does_not_fit_is_refused_before_a_process_group_starts(base, tmp_path):
    layout = (
        "trainer.devices=2",
        "trainer.strategy.pipeline_model_parallel_size=2",
        "model.config.kvcat.num_groups=1",
    )
    code, output = nemo(tmp_path, *training(tmp_path, base[1]), *layout)
    assert code != 0 and "num_groups=1" in output and "pipeline_model_parallel_size" in output, output[-3000:]
    assert "Initializing distributed" not in output


def test_export_is_the_trained_model_without_routers(straight, base, tmp_path):
    from safetensors import safe_open

    from kvcat_nemo.conversion.exporting import export_hf

    export_hf(straight, tmp_path / "out", base=base[1])
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    with safe_open(base[0] / "model.safetensors", "pt") as file:
        assert names == set(file.keys())
    after = [x for x in metrics(straight) if x["kind"] == "validation"][-1]
    assert held_out_ce(tmp_path / "out") == pytest.approx(after["loss/anchor"], abs=1e-5)
    assert held_out_ce(tmp_path / "out") != pytest.approx(held_out_ce(base[0]), abs=1e-3)


def test_unknown_override_fails_with_the_nearest_name(tmp_path):
    code, output = nemo(tmp_path, "--factory", "kvcat_tiny", "-y", "trainer.max_stepz=5")
    assert code != 0
    assert "did you mean trainer.max_steps" in output
    assert not (tmp_path / "runs").exists()


def test_help_lists_every_recipe(tmp_path):
    from kvcat_nemo.recipes import RECIPES

    code, output = nemo(tmp_path, "--help")
    assert code == 0
    for name in RECIPES:
        assert name in output, name
