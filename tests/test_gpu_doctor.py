"""`kvcat train doctor --gpu`: every part on the CPU (all but the launch of GPU kernels), and what the report makes of it."""

import dataclasses
import functools
import importlib.util
import json
import sys
import time
import types

import pytest
import torch
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.doctor import compare, gpu, kernel_cases, nemo_training, parts, report, small_model
from kvcat_nemo.doctor.report import FAILED, OK, SKIPPED, Check, PartResult, Skip

pytest.importorskip("megatron.core")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return parts.Host("cpu", tmp_path_factory.mktemp("doctor"))


def ran(host, name):
    result = report.run_part(name, parts.CHECKS[name], host)
    assert result.status == OK, (result.text, result.checks)
    return {check.name: check for check in result.checks}


# --- every part on the CPU ---


def test_kernels(host, monkeypatch):
    """A few cases; tests/kernels/test_gpu.py runs all of them."""
    few = ["gates D 64, plain", "packed documents, short", "packed documents, long"]
    monkeypatch.setattr(kernel_cases, "CASES", {name: kernel_cases.CASES[name] for name in few})
    checks = ran(host, "kernels")
    assert set(checks) == {f"cpu: {name}" for name in few}


def test_losses(host):
    result = report.run_part("losses", parts.CHECKS["losses"], host)
    assert result.status == OK, (result.text, result.checks)
    checks = {check.name: check for check in result.checks}
    assert checks.pop("forms that runs take").figures == {"losses": "torch", "columns": "torch"}
    by_torch = [check for name, check in checks.items() if name.startswith("torch: ")]
    assert len(by_torch) == 4 and all(0 < check.figures["d weight"] < 1e-2 for check in by_torch)
    others = [check for name, check in checks.items() if not name.startswith("torch: ")]
    assert len(others) == 6  # four cases, and each module's own
    assert all(c.status == SKIPPED and c.text == "Triton's kernels run on CUDA alone" for c in others)


def test_every_part_has_its_checks_and_every_module_named_by_text_is_there():
    assert set(parts.CHECKS) == set(gpu.NAMES)
    for module in parts.losses.TRITON.values():
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize(("missing", "skipped"), [("triton", True), ("kvcat_nemo.kernels.gone", False)])
def test_a_module_of_our_own_that_is_gone_is_no_skip(missing, skipped, monkeypatch):
    def gone(name):
        raise ModuleNotFoundError(missing, name=missing)

    monkeypatch.setattr(parts.losses.importlib, "import_module", gone)
    here = parts.Host("cuda", None)
    with pytest.raises(Skip if skipped else ModuleNotFoundError):
        parts.losses._triton(here, "columns_triton")


@pytest.mark.parametrize("why", ["", "dense: differs from the plain form by 0.1"])
def test_triton_that_runs_would_not_take_is_a_failure(host, monkeypatch, why):
    module = types.SimpleNamespace(failure=lambda device: why)
    monkeypatch.setattr(parts.losses, "_triton", lambda host, name: module)
    found = report.checked("row_losses_triton", lambda: parts.losses._triton_works(host, "row_losses_triton"))
    assert (found.status, why in found.text) == (FAILED if why else OK, True)


def test_a_case_runs_with_the_kernel_that_its_name_says(host, monkeypatch):
    from kvcat_nemo.kernels.losses import token_loss

    asked, right = [], token_loss.token_losses
    monkeypatch.setattr(parts.losses, "_triton", lambda *_: None)
    monkeypatch.setattr(
        token_loss,
        "token_losses",
        lambda *x, kernel, **y: asked.append(kernel) or right(*x, kernel="torch", **y),
    )
    monkeypatch.setattr(parts.losses, "_triton_works", lambda *_: None)
    assert all(check.status == OK for check in parts.CHECKS["losses"](host))
    assert asked == ["torch"] * 4 + ["triton"] * 4


@pytest.mark.parametrize(
    ("refuses", "auto", "status", "said"),
    [
        (True, "torch", SKIPPED, "te: no kernel for head dims (136, 136) (auto: torch)"),
        (True, None, FAILED, "auto: no kernel fits"),
        (False, "torch", FAILED, "an illegal value inside the kernel"),
    ],
)
def test_a_kernel_that_refuses_a_width_is_skipped_where_auto_has_another(
    host, monkeypatch, refuses, auto, status, said
):
    asked = []

    def case(host, D):
        raise ValueError("an illegal value inside the kernel")

    def select(name, **wanted):
        asked.append(wanted)
        if name == "auto" and auto is None:
            raise ValueError("auto: no kernel fits")
        if name != "auto" and refuses:
            raise ValueError("te: no kernel for head dims (136, 136)")
        return auto if name == "auto" else name

    monkeypatch.setattr(kernel_cases, "CASES", {"gates D 128, plain": functools.partial(case, D=128)})
    monkeypatch.setattr(kernel_cases, "select_backend", select)
    (check,) = parts.CHECKS["kernels"](host)
    assert check.status == status and said in check.text, check
    assert asked[0]["head_dim"] == 128 and asked[0]["gated"]


GATED = ("gate", "every", "dropped", "a dropped", "packed", "memory", "which")


def test_what_a_case_asks_of_a_kernel():
    """Every case's question is one that select_backend can answer; the CPU's kernel serves all of them."""
    for name, case in kernel_cases.CASES.items():
        wanted = kernel_cases.asked_of(case)
        assert kernel_cases.select_backend("cpu", device="cpu", dtype=torch.bfloat16, **wanted) == "cpu"
        assert wanted["packed"] == name.startswith("packed") and wanted["spans"] == ("cut" in name)
        assert wanted["split"] == name.startswith("split") and wanted["gated"] == name.startswith(GATED)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_megatron(host):
    checks = ran(host, "megatron")
    assert set(checks) == {"D 64, tied", "D 128, untied"}
    assert all(check.figures["clear decisions"] > 0.5 for check in checks.values())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_converted(host):
    (check,) = ran(host, "converted").values()
    assert 0 < check.figures["mean KL"] < 1e-2 and check.figures["tokens"] > 200


@pytest.mark.slow
@pytest.mark.multiprocess
def test_step(host):
    (check,) = ran(host, "step").values()
    assert check.figures["operators per layer and micro-batch"] > 100
    assert check.figures["paired / plain"] > 1


@pytest.mark.slow
@pytest.mark.multiprocess
def test_parallel_and_reshard(host):
    assert set(ran(host, "parallel")) == {"TP2 SP", "PP2", "CP2", "DP2"}
    ran(host, "reshard")


@pytest.mark.slow
@pytest.mark.nemo
def test_nemo_and_resume(host):
    """Through NeMo, with the distributed optimizer in the form that GPU hosts save, asynchronously. Both parts' runs share
    one process' imports here, as two processes of half a minute less."""
    name = next(iter(small_model.SHAPES))
    straight, killed = host.folder / f"nemo {name}", host.folder / f"nemo {name} killed"
    jobs = [
        parts.nemo.nemo_job(host, name, straight),
        parts.nemo.nemo_job(host, name, killed, kill=True),
        parts.nemo.nemo_job(host, name, killed),
    ]
    nemo_training.run_jobs(jobs, "cpu", host.folder / "nemo log")
    kept, run_jobs = [], nemo_training.run_jobs
    nemo_training.run_jobs = lambda given, *_: kept.append(given)
    try:
        assert set(ran(host, "nemo")) == {name}
        (check,) = ran(host, "resume").values()
    finally:
        nemo_training.run_jobs = run_jobs
    assert [len(given) for given in kept] == [1, 1]  # killed, resumed: as above
    assert kept == [[jobs[1]], [jobs[2]]]
    assert check.figures["lines"] == parts.nemo.NEMO_STEPS + 2  # two validations
    killed_lines = nemo_training.lines_of(killed)
    assert [line["step"] for line in killed_lines if line["kind"] == "train"] == list(range(1, 11))
    from torch.distributed.checkpoint import FileSystemReader

    saved = sorted((killed / nemo_training.RUN / "checkpoints").glob("*/weights"))
    keys = FileSystemReader(str(saved[0])).read_metadata().state_dict_metadata
    moments = [key for key in keys if key.startswith("optimizer.state.exp_avg_sq.")]
    assert any(".router.1." in key for key in moments) and not any("dp_group_idx" in key for key in keys)


# --- a fault is seen ---


def test_a_wrong_kernel_fails(host, monkeypatch):
    from kvcat_nemo.kernels.fused import cpu

    forward = cpu.CpuKernel.forward

    def off(self, *tensors, **settings):
        o, lse, saved = forward(self, *tensors, **settings)
        return o, lse + 0.02, saved

    monkeypatch.setattr(cpu.CpuKernel, "forward", off)
    name = "gates D 64, plain"
    monkeypatch.setattr(kernel_cases, "CASES", {name: kernel_cases.CASES[name]})
    result = report.run_part("kernels", parts.CHECKS["kernels"], host)
    assert result.status == FAILED and "relative error" in result.text


def test_wrong_losses_fail(host, monkeypatch):
    from kvcat_nemo.kernels.losses import token_loss

    right = token_loss.token_losses
    monkeypatch.setattr(token_loss, "token_losses", lambda *a, **k: 1.03 * right(*a, **k))
    result = report.run_part("losses", parts.CHECKS["losses"], host)
    assert result.status == FAILED and "bound 1e-2" in result.text


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ([{"loss/total": 1.02}], "step 1: loss/total is 1.02, expected 1"),
        ([{"loss/total": float("nan")}], "loss/total is nan"),
        ([{}], "loss/total is nan"),
        ([], "0 steps, 1 expected"),
        ([{"loss/total": 1.009, "flipped": 0.5}], None),
    ],
)
def test_figures(ours, said):
    found = compare.figures_differ(ours, [{"loss/total": 1.0, "flipped": 0.0}])
    assert (said is None and not found) or said in found[0]


def test_masks_but_for_near_ties():
    expected = {0: torch.tensor([[0.2, 0.8, 0.501, 0.9]])}
    assert compare.masks_differ({0: torch.tensor([[0.1, 0.9, 0.499, 0.9]])}, expected, 0.01) == ([], 0.75)
    wrong, _ = compare.masks_differ({0: torch.tensor([[0.6, 0.9, 0.499, 0.9]])}, expected, 0.01)
    assert "1 of 3 clear decisions differ" in wrong[0]
    assert compare.masks_differ({}, expected, 0.01)[0]
    assert "shows little" in compare.masks_differ(expected, expected, 0.35)[0][0]


def test_the_first_bit_that_differs_is_named():
    lines = [{"kind": "train", "step": s, "loss/total": 1.0 / s} for s in range(1, 7)]
    assert parts.resume.bitwise_differences(lines, lines, saved=4) == []
    for at, hint in ((2, True), (5, False)):
        other = [dict(line) for line in lines]
        other[at]["loss/total"] += 1e-16 * 2
        (text,) = parts.resume.bitwise_differences(other, lines, saved=4)
        assert f"train step {at + 1}: loss/total" in text and ("two ways" in text) == hint
    assert "5 lines" in parts.resume.bitwise_differences(lines[:5], lines, saved=4)[0]


# --- parts, report, exit code ---


def result(status):
    return PartResult("x", status, "", 0.0, [Check("x", status)])


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ([OK], 0),
        ([OK, OK], 0),
        ([OK, SKIPPED], 3),
        ([SKIPPED], 3),
        ([], 3),
        ([OK, FAILED], 1),
        ([SKIPPED, FAILED], 1),
    ],
)
def test_exit_code(statuses, code):
    assert report.exit_code([result(status) for status in statuses]) == code


@pytest.mark.parametrize(
    ("statuses", "code"), [([OK], 0), ([SKIPPED], 3), ([FAILED], 1), ([], 3), ([OK, SKIPPED], 3)]
)
def test_a_part_for_more_gpus_than_there_are_does_not_count(statuses, code):
    more = dataclasses.replace(result(SKIPPED), expected=False)
    assert report.exit_code([*map(result, statuses), more]) == code


@pytest.mark.parametrize(("found", "code"), [(0, 3), (1, 0), (2, 0)])
def test_all_parts_of_a_machine(monkeypatch, tmp_path, found, code):
    """With one GPU the plain command can end with 0; the parts for two are there, and skipped."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.setattr(gpu, "_in_a_process", lambda part, *_: PartResult(part.name, OK, "", 0.0))
    results = list(gpu.run_parts(list(gpu.PARTS), tmp_path, say=lambda _: None))
    assert [r.name for r in results] == list(gpu.NAMES) and report.exit_code(results) == code
    assert sum(r.status == SKIPPED for r in results) == {0: len(gpu.PARTS), 1: 2, 2: 0}[found]


def test_a_part_of_skipped_checks_is_no_pass():
    def part(host):
        yield Check("te", SKIPPED, "transformer_engine is not installed")

    assert report.run_part("kernels", part, None).status == SKIPPED

    def nothing(host):
        yield from ()

    assert report.run_part("kernels", nothing, None).status == SKIPPED

    def needs(host):
        raise Skip("nemo is not installed")
        yield

    found = report.run_part("nemo", needs, None)
    assert found.status == SKIPPED and found.text == "nemo is not installed"

    def breaks(host):
        yield Check("one", OK)
        raise MemoryError("no")

    assert report.run_part("step", breaks, None).status == FAILED


def test_errors_of_checks():
    assert report.checked("x", lambda: {}["missing"]).status == FAILED  # a KeyError is no skip
    assert (
        report.checked("x", lambda: (_ for _ in ()).throw(LookupError("nothing is claimed"))).status
        == SKIPPED
    )
    assert report.checked("x", lambda: {"error": 0.5}).figures == {"error": 0.5}


def test_a_part_in_a_process_of_its_own(tmp_path):
    said = []
    (found,) = gpu.run_parts(gpu.chosen("losses"), tmp_path, device="cpu", say=said.append)
    assert found.status == OK and len(found.checks) == 11
    assert said[0].startswith("[1/1] losses") and any("paired, temperature 2" in line for line in said)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its process ended with -11"),
        ("import time; time.sleep(60)", "did not end in"),
        ("raise SystemExit('no CUDA context')", "no CUDA context"),
        ("pass", "its process ended with 0"),
    ],
)
def test_a_process_that_ends_badly_is_a_failed_part(tmp_path, monkeypatch, program, reason):
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(script))
    part = gpu.Part("losses", 0.0, "")
    began = time.monotonic()
    found = gpu._in_a_process(part, tmp_path, "cpu", None, print, seconds=3.0)
    assert found.status == FAILED and reason in found.text, found.text
    assert time.monotonic() - began < 30


def test_what_cannot_run_says_why(monkeypatch):
    two = next(part for part in gpu.PARTS if part.gpus == 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu.why_not(two, "cuda") == "it needs 2 GPUs, this machine has 1"
    assert gpu.why_not(gpu.PARTS[0], "cuda") is None


def invoke(*arguments):
    return CliRunner().invoke(main, ["train", "doctor", *map(str, arguments)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_every_part_says_so(tmp_path):
    listed = invoke("--gpu", "--dry-run")
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines()] == [*gpu.NAMES, "together"]
    assert float(listed.output.splitlines()[-1].split()[1]) < 10
    out = tmp_path / "made" / "report.json"
    run = invoke("--gpu", "--report", out)
    assert run.exit_code == 3
    written = json.loads(out.read_text())
    assert written["exit_code"] == 3 and written["machine"]["devices"] == []
    assert [part["status"] for part in written["parts"]] == [SKIPPED] * len(gpu.PARTS)
    assert all("no CUDA device" in part["text"] for part in written["parts"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "--parts", "kernels,loses"], "no part 'loses'"),
        (["--gpu", "--parts", ","], "name at least one"),
        (["--parts", "kernels"], "--parts goes with --gpu"),
        (["--dry-run"], "--dry-run goes with --gpu"),
        (["--gpu", "--model", "/does/not/exist"], "does not exist"),
    ],
)
def test_options_that_do_not_fit(arguments, said):
    found = invoke(*arguments)
    assert found.exit_code == 2 and said in found.output


# --- weights of other layers ---


class WithExtraState(torch.nn.Linear):
    """A layer as Transformer Engine's, whose state has one entry more."""

    def get_extra_state(self):
        return torch.zeros(1)

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"0._extra_state": torch.zeros(1)}, None),
        ({"1.weight": None}, "the model misses 1.weight: the checkpoint is another model's"),
        ({"2.weight": torch.zeros(1)}, "the model does not know 2.weight: the checkpoint is another"),
        ({f"{i}.weight": torch.zeros(1) for i in range(2, 7)}, "2.weight, 3.weight, 4.weight and 2 more: "),
    ],
)
def test_weights_that_other_layers_wrote(change, said):
    """The CPU's layers write no extra states; whatever else is missing or too much is said."""
    from kvcat_nemo.doctor.weights import load_into

    state = {
        f"{i}.{name}": torch.ones(2) if name == "bias" else torch.ones(2, 2)
        for i in (0, 1)
        for name in ("weight", "bias")
    }
    state = {name: x for name, x in (state | change).items() if x is not None}
    model = torch.nn.Sequential(WithExtraState(2, 2), WithExtraState(2, 2))
    if said is None:
        load_into(model, state)
        assert all(torch.equal(x, torch.ones_like(x)) for x in model.parameters())
        return
    with pytest.raises(ValueError, match=said):
        load_into(model, state)
