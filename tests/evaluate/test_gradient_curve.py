"""Gradient curves: they start at the compressor, end at what was trained, and compare models by steps."""

import json
import math

import pytest
import torch

from kvcat_nemo.compress import Budget, make, next_logits, prefill
from kvcat_nemo.compress.gradient import optimise, teach
from kvcat_nemo.evaluate.gradient_curve import GradientCurve, speed_up
from kvcat_nemo.evaluate.models import load_model
from kvcat_nemo.evaluate.windows import Window, write_windows
from tests.support.hf_models import tokens

PREFIX, AFTER = 40, 12


@pytest.fixture
def protocol(tmp_path, model_dir):
    windows = [Window("t", str(i), 0, tokens(PREFIX + AFTER, seed=i)) for i in range(3)]
    path = write_windows(windows, tmp_path / "windows.json")

    def make_one(out="out", **settings):
        settings = {"models": [str(model_dir)], "windows": str(path), "keep": ["5t"], "steps": 4, **settings}
        return GradientCurve.of(
            {"out": str(tmp_path / out), "prefix": PREFIX, "continuation": AFTER, "lr": 0.05, **settings}
        )

    make_one.windows = windows
    return make_one


def test_a_curve_is_the_score_after_each_step(protocol, model_dir):
    (row,) = json.loads(protocol(limit=1).run().read_text())["rows"]
    model, _, _ = load_model(model_dir, device="cpu")
    ids = protocol.windows[0].ids
    prefilled = prefill(model, [ids[:PREFIX]])
    lessons = teach(model, prefilled.cache, torch.tensor([[ids[PREFIX:-1]]]))

    def ppl(cache):
        with torch.no_grad():
            logits = next_logits(model, cache, torch.tensor([ids[PREFIX:-1]]))[0]
        return math.exp(torch.nn.functional.cross_entropy(logits.double(), torch.tensor(ids[PREFIX + 1 :])))

    start = make("recent:sinks=4").compress(prefilled, Budget(tokens=5))
    curve = [ppl(start)]
    optimise(model, start, lessons, steps=4, lr=0.05, on_step=lambda step: curve.append(ppl(step.cache)))
    dense = ppl(prefilled.cache)
    assert row["ppl_dense"] == pytest.approx(dense, rel=1e-5) and row["step"] == [0, 1, 2, 3, 4]
    assert row["delta_ppl_by_step"] == pytest.approx([x - dense for x in curve], abs=1e-2)
    assert len(set(row["delta_ppl_by_step"])) == 5  # each step changes something
    assert row["delta_ppl"] == row["delta_ppl_by_step"][-1] and row["slots"] == 5 and row["steps"] == 4
    # The loss of a step is KL(dense ‖ small) before its update, over the very predictions that are scored.
    assert row["loss_by_step"] == pytest.approx(row["kl_by_step"][:-1], rel=1e-4)
    assert row["kl_by_step"][-1] < row["kl_by_step"][0]


@pytest.mark.parametrize("lessons", ["repeat", "sample"])
def test_lessons_other_than_the_scored_tokens(protocol, lessons):
    value = json.loads(protocol(lessons=lessons, lesson_tokens=10, every=3, batch_size=2).run().read_text())
    (row,) = value["rows"]
    assert row["step"] == [0, 3, 4] and row["windows"] == 3 and len(row["loss_by_step"]) == 4
    assert row["loss_by_step"][-1] < row["loss_by_step"][0]
    assert len(row["nll_by_window_and_step"]) == 3


def test_batches_and_single_windows_agree(protocol):
    one, two = (json.loads(protocol(f"b{n}", batch_size=n).run().read_text())["rows"] for n in (1, 2))
    assert one[0]["delta_ppl_by_step"] == pytest.approx(two[0]["delta_ppl_by_step"], abs=2e-2)


def test_two_models_are_compared_by_steps(protocol, model_dir, other_model_dir):
    run = protocol(models=[f"a={model_dir}", f"b={other_model_dir}"], limit=2)
    rows = json.loads(run.run().read_text())["rows"]
    assert [r["model"] for r in rows] == ["a", "b"] and "speed_up" not in rows[0]
    assert rows[1]["reaches"] == rows[0]["delta_ppl"] and "speed_up" in rows[1]


@pytest.mark.parametrize(
    "curve, at, faster", [([9, 7, 5, 3], 2, 1.5), ([9, 8, 7, 6], None, None), ([4, 3, 2, 1], 0, None), ([9, 8, 6, 5], 3, 1)]
)  # fmt: skip
def test_speed_up(curve, at, faster):
    first = {"delta_ppl": 5.0, "steps": 3}
    got = speed_up(first, {"step": [0, 1, 2, 3], "delta_ppl_by_step": curve})
    assert got == {"reaches": 5.0, "reached_at": at, "speed_up": faster}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"compressors": ["recent+int8"]}, "codes cannot be trained"),
        ({"compressors": ["int8@1"]}, "codes cannot be trained"),
        ({"lessons": "books"}, "lessons='books': choose among continuation"),
        ({"steps": 0}, "steps=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lessons": "sample", "lesson_tokens": 41}, "lesson_tokens=41: give 2 to 40"),
    ],
)
def test_bad_settings(protocol, settings, message):
    with pytest.raises(ValueError, match=message):
        protocol(**settings).check()
