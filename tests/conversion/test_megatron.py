"""Megatron-core itself loads what we import, at any layout, and we export what Megatron-core saves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcat_nemo.conversion.arch import load_architecture
from kvcat_nemo.conversion.dist_checkpoint import CheckpointReader, CheckpointWriter
from kvcat_nemo.conversion.exporting import export_hf
from kvcat_nemo.conversion.ranks import run_ranks
from kvcat_nemo.conversion.verify import hf_answer, judge
from kvcat_nemo.conversion.verify_rank import RankJob
from tests.conversion.conversion_models import CONFIGS, same_bits, tensors_of

_IDS = [(17 * i * i + 5 * i + 3) % 128 for i in range(48)]


def _judged(imported, hf_models, layouts):
    """(name, layout) → report; one start of processes for all of them."""
    pairs = [(name, layout) for name in CONFIGS for layout in layouts]
    jobs = [
        RankJob(
            str(imported[name] / "weights"), load_architecture(hf_models[name]), tp, pp, tuple(_IDS), 16, 32
        )
        for name, (tp, pp) in pairs
    ]
    answers = run_ranks(jobs, timeout=200)
    theirs = {name: hf_answer(hf_models[name], _IDS, 32) for name in CONFIGS}
    known = dict(
        tensor_model_parallel_size=0,
        pipeline_model_parallel_size=0,
        tensors=1,
        different_tensors=(),
        stored_dtype="float32",
        text_tokens=len(_IDS),
        text_source="fixed",
        precision="float32",
    )
    return {
        pair: (judge(answer, *theirs[pair[0]], tolerance=1e-4, **known), theirs[pair[0]][0])
        for pair, answer in zip(pairs, answers, strict=True)
    }


def _assert_equal_models(judged):
    for pair, (report, logits) in judged.items():
        assert report.failures == (), pair
        assert report.top1_agreement == 1.0 and abs(report.mean_kl) < 1e-8, pair
        # The models must be able to disagree: flat logits would agree with anything.
        assert logits.std(-1).min() > 0.2, pair
        assert len(report.decoded) == 32


def test_same_model_on_one_process(imported, hf_models):
    _assert_equal_models(_judged(imported, hf_models, [(1, 1)]))


@pytest.mark.multiprocess
def test_same_model_at_tensor_and_pipeline_parallel_two(imported, hf_models):
    _assert_equal_models(_judged(imported, hf_models, [(2, 1), (1, 2)]))


@pytest.fixture(scope="module")
def trained(imported, tmp_path_factory):
    """Checkpoints that Megatron-core saved at TP2 and PP2: (model, layout) → folder."""
    root = tmp_path_factory.mktemp("trained")
    jobs = {
        ("qwen2-untied", "tp2"): dict(tp=2, pp=1, prefix="module."),
        ("qwen3", "pp2"): dict(tp=1, pp=2, prefix="module."),
        ("qwen3", "tp2"): dict(tp=2, pp=1, prefix=""),
    }
    out = {}
    for (name, layout), job in jobs.items():
        out[name, layout] = root / f"{name}-{layout}" / "step=2" / "weights"
        job.update(imported=str(imported[name]), out=str(out[name, layout]))
    spec = root / "spec.json"
    spec.write_text(json.dumps(list(jobs.values())))
    program = Path(__file__).with_name("save_ranks.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ranks = [
        subprocess.Popen(
            [sys.executable, program, spec, str(rank), "2"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            output, _ = process.communicate(timeout=200)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in ranks:
            process.kill()
    return out


@pytest.mark.multiprocess
@pytest.mark.parametrize("which", [("qwen2-untied", "tp2"), ("qwen3", "pp2"), ("qwen3", "tp2")], ids="-".join)
def test_export_of_what_megatron_saved(which, trained, hf_models, imported, tmp_path):
    weights = trained[which]
    shapes = CheckpointReader(weights).shapes
    # The checkpoint holds what a training run's does, or this test would prove little.
    assert any(key.startswith("optimizer.") for key in shapes)
    assert any("router" in key for key in shapes)
    embedding = next(s for k, s in shapes.items() if k.endswith("word_embeddings.weight"))
    assert embedding[0] == (131 if which[1] == "pp2" else 132)
    name = which[0]
    out = export_hf(weights.parent, tmp_path / "out", base=imported[name], unverified=True)
    exported, original = tensors_of(out), tensors_of(hf_models[name])
    assert exported.keys() == original.keys()
    assert [n for n in exported if not same_bits(exported[n], original[n] * 2)] == []


@pytest.mark.multiprocess
def test_export_takes_the_newest_finished_checkpoint_of_a_run(trained, hf_models, imported, tmp_path):
    name = "qwen2-untied"
    run = tmp_path / "run"
    for step, source in ((9, trained[name, "tp2"]), (10, imported[name] / "weights")):
        (run / "checkpoints" / f"m-step={step}").mkdir(parents=True)
        (run / "checkpoints" / f"m-step={step}" / "weights").symlink_to(source)
    (run / "kvcat_base.json").write_text(json.dumps({"base": str(imported[name])}))
    original = tensors_of(hf_models[name])

    def exported(out):
        return tensors_of(export_hf(run, tmp_path / out, unverified=True))["model.norm.weight"]

    assert same_bits(exported("newest"), original["model.norm.weight"])
    (run / "checkpoints" / "m-step=10-unfinished").touch()
    assert same_bits(exported("finished"), original["model.norm.weight"] * 2)
    (run / "checkpoints" / "m-step=9-unfinished").touch()
    with pytest.raises(ValueError, match="2 unfinished"):
        export_hf(run, tmp_path / "none", unverified=True)
    with pytest.raises(ValueError, match="is unfinished"):
        export_hf(run / "checkpoints" / "m-step=9", tmp_path / "none", base=imported[name])


def test_a_run_that_names_no_base_is_refused(imported, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights").symlink_to(imported["qwen3"] / "weights")
    with pytest.raises(ValueError, match="--base"):
        export_hf(tmp_path / "run", tmp_path / "out", unverified=True)


def test_the_base_may_be_relative_and_must_exist(imported, tmp_path, monkeypatch):
    run = tmp_path / "run"
    checkpoint = run / "version" / "checkpoints" / "step=1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").symlink_to(imported["qwen3"] / "weights")
    (tmp_path / "base").symlink_to(imported["qwen3"])
    for base, folder in (("../base", "/"), ("base", tmp_path)):
        (run / "kvcat_base.json").write_text(json.dumps({"base": base}))
        monkeypatch.chdir(folder)
        assert export_hf(checkpoint, tmp_path / "out", force=True, unverified=True).is_dir()
    (run / "kvcat_base.json").write_text(json.dumps({"base": "gone"}))
    with pytest.raises(ValueError, match="names gone, which is not there"):
        export_hf(checkpoint, tmp_path / "none", unverified=True)


def test_layers_that_are_not_stacked_are_exported_too(imported, hf_models, tmp_path):
    """Megatron saves layers that differ from one another under keys of their own."""
    reader = CheckpointReader(imported["qwen3"] / "weights")
    (tmp_path / "weights").mkdir()
    writer = CheckpointWriter(tmp_path / "weights", ("module.",))
    for key, shape in reader.shapes.items():
        if key.startswith("module."):
            continue
        whole = reader.read(key, [0] * len(shape), shape)
        if not key.startswith("decoder.layers."):
            writer.add_tensor(key, whole, shape, [0] * len(shape))
            continue
        for layer, tensor in enumerate(whole):
            name = key.replace("layers.", f"layers.{layer}.")
            writer.add_tensor(name, tensor.clone(), shape[1:], [0] * tensor.ndim)
    writer.close()
    out = export_hf(tmp_path, tmp_path / "out", base=hf_models["qwen3"], unverified=True)
    exported, original = tensors_of(out), tensors_of(hf_models["qwen3"])
    assert [n for n in original if not same_bits(exported[n], original[n])] == []
