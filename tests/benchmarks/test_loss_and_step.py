"""What the timings of benchmarks/ rest on: forms that compute the same, and time charged to the right stage."""

import time

import pytest
import torch

from benchmarks import loss, paired_timing, step


@pytest.mark.parametrize("paired", [True, False])
def test_forms_of_the_loss_compute_the_same(paired):
    passes = 1 + paired
    hidden = torch.randn(6, passes, 8).requires_grad_()
    weight = torch.randn(40, 8).requires_grad_()
    labels = torch.randint(0, 40, (1, 6))
    names = {form for *_, many, forms in loss.SIZES.values() if many == passes for form in forms}
    assert len(names) == 3
    results = [[x.clone() for x in loss.form(name, hidden, weight, labels, paired, 1)] for name in names]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Sleeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(2 * ctx.seconds)
        return grad, None


def test_forward_and_backward_are_charged_to_their_stage():
    clock = step.Clock()
    core = step.timed(clock, "core", lambda x: Sleeps.apply(x, 0.05))
    attention = step.timed(
        clock, "attention", lambda x: (Sleeps.apply(core(Sleeps.apply(x, 0.02)), 0.02), None)
    )
    x = torch.ones(2, requires_grad=True)
    clock.begin()
    h = Sleeps.apply(x, 0.01)
    out, _ = attention(h)
    (Sleeps.apply(out, 0.01) + h).sum().backward()
    seconds, _ = clock.end()
    assert (x.grad == 2).all()
    # Sleeps are never shorter than asked for: forward once, backward twice.
    assert (
        seconds["core"] >= 0.15 and seconds["attention"] >= seconds["core"] + 0.12 and seconds["rest"] >= 0.06
    )
    assert clock.stack == ["rest"]


def test_a_workers_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "a_worker.py").write_text(
        "import sys\n"
        "from benchmarks.paired_timing import serve\n"
        "def run():\n"
        "    print('what a library says')\n"
        "    return {'length': len(bytearray(int(sys.argv[1]) << 20))}\n"
        "serve(run)\n"
    )
    answers = paired_timing.take_turns("a_worker", {"small": ["1"], "large": ["64"]}, rounds=3, threads=1)
    assert [a["length"] >> 20 for a in answers["large"]] == [64, 64, 64]
    assert all(63 < a["peak_bytes"] / 2**20 < 70 for a in answers["large"])
    assert all(a["peak_bytes"] / 2**20 < 10 and a["seconds"] > 0 for a in answers["small"])
    with pytest.raises(RuntimeError, match="a_worker x ended with 1"):
        paired_timing.take_turns("a_worker", {"broken": ["x"]}, rounds=1, threads=1)


def off(arguments):
    """A worker whose result is 1, 2, … 100, but for one element that is off by its first argument."""
    result = torch.arange(1.0, 101.0)
    result[50] += float(arguments[0])
    paired_timing.serve(lambda: [result.flip(0) if "flipped" in arguments else result])


@pytest.mark.parametrize("wrong", [["1.0"], ["nan"], ["0", "flipped"]], ids=" ".join)
def test_a_form_that_computes_something_else_is_not_timed(wrong):
    """One wrong element, a NaN, or the right elements in other places; what agrees is timed."""
    forms = {"right": ["0"], "wrong": wrong}
    with pytest.raises(paired_timing.Disagree, match="wrong is not timed: figure"):
        paired_timing.take_turns("", forms, 3, 1, off, [("wrong", "right", 1e-3)])
    same = {"right": ["0"], "also right": ["1e-5"]}
    answers = paired_timing.take_turns("", same, 2, 1, off, [("also right", "right", 1e-3)])
    assert [len(a["check"]) for a in answers["also right"]] == [2, 0]
