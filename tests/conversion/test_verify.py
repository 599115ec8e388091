"""`verify` and the command line: it passes what is the same, and says what is not."""

import json
import re
import shutil
import time

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from kvcat_nemo.cli import main
from kvcat_nemo.conversion import ranks
from kvcat_nemo.conversion.arch import load_architecture
from kvcat_nemo.conversion.exporting import export_hf
from kvcat_nemo.conversion.importing import import_hf
from kvcat_nemo.conversion.verify import judge
from kvcat_nemo.conversion.verify_rank import RankJob
from tests.conversion.conversion_models import LLAMA3_ROPE, edit_config, tensors_of


def _kvcat(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_commands_from_import_to_export(hf_models, tmp_path):
    source = hf_models["qwen2-untied"]
    result = _kvcat("convert", "import", source, tmp_path / "mid")
    assert result.exit_code == 0, result.output
    report_file = tmp_path / "report.json"
    result = _kvcat("convert", "verify", source, tmp_path / "mid", "--json", report_file)
    assert result.exit_code == 0 and "the same model" in result.output, result.output
    report = json.loads(report_file.read_text())
    assert report["ok"] and report["tensors"] == len(tensors_of(source)) and len(report["decoded"]) == 32
    result = _kvcat("convert", "export", tmp_path / "mid", tmp_path / "out", "--max-shard-size", "50KB")
    assert result.exit_code == 0 and len(list((tmp_path / "out").glob("*.safetensors"))) > 1, result.output
    result = _kvcat("export", tmp_path / "mid", tmp_path / "out", "--base", source)
    assert result.exit_code == 1 and "--force" in result.output
    result = _kvcat("export", tmp_path / "mid", tmp_path / "out", "--base", source, "--force")
    assert result.exit_code == 0, result.output


def test_verify_tells_another_model_apart(copy_of, tmp_path):
    source = copy_of("llama3")
    mid = import_hf(source, tmp_path / "mid")
    tensors = tensors_of(source)
    tensors["model.layers.1.self_attn.k_proj.weight"][0] += 0.05
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    edit_config(
        source, rope_scaling=LLAMA3_ROPE | {"factor": 2.0}
    )  # it would rule both sides: logits cannot show it
    report_file = tmp_path / "report.json"
    result = _kvcat("convert", "verify", source, mid, "--json", report_file, "--tokens", "4")
    assert result.exit_code == 1
    assert re.search(r"1 of \d+ tensors differ, first model.layers.1.self_attn.k_proj.weight", result.output)
    assert re.search(r"logits differ by 0\.\d+, tolerance 0.0001", result.output), result.output
    assert re.search(r"rope_scaling is .*'factor': 4.0.* in .*mid/hf/config.json", result.output)
    report = json.loads(report_file.read_text())
    assert not report["ok"] and report["max_abs_difference"] > 1e-4 and report["mean_kl"] > 1e-9


def test_verify_sees_a_rope_that_weights_cannot_show(hf_models, imported, tmp_path):
    """Same weights, other frequencies: only the logits can tell."""
    source = tmp_path / "other-rope"
    shutil.copytree(hf_models["llama3"], source)
    arch = load_architecture(source)
    wrong = RankJob(
        str(imported["llama3"] / "weights"),
        type(arch)(**(vars(arch) | {"rope_scaling": None})),
        1,
        1,
        tuple(range(40)),
        8,
        2,
    )
    right = RankJob(wrong.weights, arch, 1, 1, wrong.token_ids, 8, 2)
    with_rope, without = ranks.run_ranks([right, wrong], timeout=100)
    assert (with_rope["logits"] - without["logits"]).abs().max() > 1e-2


_KNOWN = dict(
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    tensors=3,
    different_tensors=(),
    stored_dtype="float32",
    text_tokens=2,
    text_source="text",
    precision="float32",
)


@pytest.mark.parametrize(
    "change, decoded, message",
    [
        (0.0, [1, 2], None),
        (9e-5, [1, 2], None),
        (1.1e-4, [1, 2], "logits differ by 0.00011"),
        (float("nan"), [1, 2], "logits differ by nan"),
        (0.0, [1, 3], "decoded tokens differ from token 1 on"),
    ],
)
def test_judge(change, decoded, message):
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.5, 0.1]])
    other = logits.clone()
    other[1, 2] += change
    report = judge({"logits": other, "decoded": decoded}, logits, [1, 2], tolerance=1e-4, **_KNOWN)
    assert report.ok == (message is None)
    assert message is None or report.failures[0].startswith(message), report.failures
    named = judge(
        {"logits": logits, "decoded": [1, 2]},
        logits,
        [1, 2],
        tolerance=1e-4,
        **(_KNOWN | {"different_tensors": ("a",)}),
    )
    assert named.failures == ("1 of 3 tensors differ, first a",)


def test_impossible_layout_is_refused_before_anything_starts(hf_models, imported, monkeypatch):
    monkeypatch.setattr(ranks.subprocess, "Popen", None)
    result = _kvcat("convert", "verify", hf_models["llama3"], imported["llama3"], "--tp", "4")
    assert result.exit_code == 1 and "num_query_groups 2; sizes that work: 1, 2" in result.output


def test_text_without_a_tokenizer_is_refused(hf_models, imported):
    result = _kvcat("convert", "verify", hf_models["llama2"], imported["llama2"], "--text", "hello")
    assert result.exit_code == 1 and "has no tokenizer" in result.output


@pytest.mark.multiprocess
def test_a_dead_rank_is_named_and_nobody_waits_for_it(hf_models, imported, tmp_path, monkeypatch):
    """The second rank dies at once; the first would wait for it in the rendezvous for the whole time-out."""
    real = ranks.subprocess.Popen

    def popen(command, **options):
        if command[4] == "1":
            command = [
                command[0],
                "-c",
                "import os; print('no memory left', flush=True); os.kill(os.getpid(), 9)",
            ]
        return real(command, **options)

    monkeypatch.setattr(ranks.subprocess, "Popen", popen)
    job = RankJob(
        str(imported["llama2"] / "weights"), load_architecture(hf_models["llama2"]), 2, 1, (1, 2, 3), 2, 1
    )
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"(?s)rank 1 of 2 ended with code -9.*no memory left"):
        ranks.run_ranks([job], timeout=300)
    assert time.monotonic() - start < 60


def test_time_is_bounded(hf_models, imported):
    job = RankJob(
        str(imported["llama2"] / "weights"), load_architecture(hf_models["llama2"]), 1, 1, (1, 2, 3), 2, 1
    )
    with pytest.raises(ValueError, match="rank 0 of 1 did not finish in time"):
        ranks.run_ranks([job], timeout=0.5)


@pytest.mark.parametrize("arguments", [("convert",), ("convert", "import"), ("convert", "export"), ("convert", "verify"), ("export",)], ids=" ".join)  # fmt: skip
def test_help_has_examples(arguments):
    result = _kvcat(*arguments, "--help")
    assert result.exit_code == 0
    assert arguments == ("convert",) or "Examples:" in result.output


@pytest.mark.parametrize("size", ["5XB", "0", "-1", "GB"])
def test_sizes_are_checked(size, imported, tmp_path):
    result = _kvcat("convert", "export", imported["llama2"], tmp_path / "out", "--max-shard-size", size)
    assert result.exit_code == 2


def test_export_dtype(imported, tmp_path):
    out = export_hf(imported["llama2"], tmp_path / "out", dtype="bfloat16")
    assert {t.dtype for t in tensors_of(out).values()} == {torch.bfloat16}
