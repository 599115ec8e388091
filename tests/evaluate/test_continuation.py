"""Compressed-prefix continuation: against transformers' own forward, and through kills."""

import json
import math

import pytest
import torch

from kvcat_nemo.compress import Budget, make
from kvcat_nemo.evaluate.cells import Cell
from kvcat_nemo.evaluate.continuation import Batch, Continuation, compare, summary
from kvcat_nemo.evaluate.windows import Window, write_windows
from tests.evaluate.killed_runs import kill_after, measured, run_protocol
from tests.support.hf_models import small_model, tokens

PREFIX, AFTER = 40, 12


def windows(count, vocabulary=97):
    return [
        Window("text", f"doc-{i}", 0, [t % vocabulary for t in tokens(PREFIX + AFTER, seed=100 + i)])
        for i in range(count)
    ]


def plain_logits(model, ids, allowed=None):
    """transformers' own forward; allowed [T, T]: which slots a token may see, causal by default."""
    T = len(ids)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    mask = torch.zeros(T, T, dtype=model.dtype).masked_fill(
        ~(causal if allowed is None else allowed), -torch.inf
    )
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(torch.tensor([ids]), attention_mask=mask[None, None]).logits[0]


def by_hand(dense, logits, ids):
    """Token after token: NLL of both, KL, agreement, over targets P+1 … P+C−1."""
    nll, nll_dense, kl, same = [], [], [], []
    for place in range(PREFIX, PREFIX + AFTER - 1):
        p, q = (x[place].double().softmax(-1) for x in (dense, logits))
        nll.append(-math.log(q[ids[place + 1]]))
        nll_dense.append(-math.log(p[ids[place + 1]]))
        kl.append(float((p * (p / q).log()).sum()))
        same.append(float(p.argmax() == q.argmax()))
    assert len(nll) == AFTER - 1
    return {name: sum(x) / len(x) for name, x in zip(("nll", "nll_dense", "kl", "top1"), (nll, nll_dense, kl, same), strict=True)}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_figures_are_those_of_one_forward_with_the_dropped_slots_masked(kind):
    model = small_model(kind, dtype=torch.float64)
    window = windows(1)[0]
    kept = [0, 1, *range(PREFIX - 4, PREFIX)]  # recent:sinks=2 at 6 slots
    allowed = torch.ones(PREFIX + AFTER, PREFIX + AFTER, dtype=torch.bool).tril()
    dropped = [i for i in range(PREFIX) if i not in kept]
    allowed[PREFIX:, dropped] = False  # the prefix itself is read in full
    dense, masked = plain_logits(model, window.ids), plain_logits(model, window.ids, allowed)
    batch = Batch(model, [window], PREFIX, set())
    (full,) = batch.measure(None)
    (got,) = batch.measure(Cell(make("recent:sinks=2"), Budget(tokens=6)))
    for name, value in by_hand(dense, masked, window.ids).items():
        assert got[name] == pytest.approx(value, abs=1e-10), name
    assert full["nll"] == full["nll_dense"] == pytest.approx(got["nll_dense"], abs=1e-10)
    assert full["kl"] == 0 and full["top1"] == 1
    assert got["nll"] != pytest.approx(full["nll"], abs=1e-3)  # the test would see no difference otherwise
    assert (got["slots"], full["slots"]) == (6, PREFIX)
    assert full["bytes"] == 3 * 2 * PREFIX * 2 * 16 * 8 and got["bytes"] * PREFIX == full["bytes"] * 6


def test_everything_kept_costs_nothing():
    batch = Batch(small_model(), windows(2), PREFIX, set())
    for figures in batch.measure(Cell(make("random"), Budget(keep_fraction=1))):
        assert figures["nll"] == pytest.approx(figures["nll_dense"], abs=1e-6)
        assert figures["kl"] == pytest.approx(0, abs=1e-6) and figures["top1"] == 1


def test_kl_is_from_dense_to_compressed():
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    got = compare(p, q, torch.tensor([1]))
    assert got["kl"] == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), abs=1e-6)
    assert got["nll"] == pytest.approx(math.log(2)) and got["nll_dense"] == pytest.approx(math.log(10))


def test_a_batch_gives_what_single_windows_give():
    model, all_windows = small_model(), windows(3)
    cell = Cell(make("recent"), Budget(keep_fraction=0.25))
    together = Batch(model, all_windows, PREFIX, set()).measure(cell)
    for window, figures in zip(all_windows, together, strict=True):
        (alone,) = Batch(model, [window], PREFIX, set()).measure(cell)
        for name in ("nll", "nll_dense", "kl"):
            assert figures[name] == pytest.approx(alone[name], abs=1e-5)
        assert (figures["slots"], figures["bytes"]) == (alone["slots"], alone["bytes"])


def test_summary_by_hand():
    items = [
        {"nll": math.log(6), "nll_dense": math.log(4), "kl": 0.1, "top1": 0.5, "slots": 4.0, "bytes": 8, "seconds": 1.0},
        {"nll": math.log(24), "nll_dense": math.log(9), "kl": 0.3, "top1": 1.0, "slots": 6.0, "bytes": 8, "seconds": 3.0},
    ]  # fmt: skip
    row = summary(items, 11)
    assert row["ppl"] == pytest.approx(12) and row["ppl_dense"] == pytest.approx(6)
    assert row["delta_ppl"] == pytest.approx(6) and row["delta_ppl_windows"] == pytest.approx(8.5)
    # Leaving one out leaves 2 or 15: the jackknife's √(½ · 2 · 6.5²); the mean's is the same here, of 2 and 15.
    assert row["delta_ppl_se"] == pytest.approx(6.5) and row["delta_ppl_windows_se"] == pytest.approx(6.5)
    assert (row["kl"], row["top1"], row["slots"], row["seconds"]) == (pytest.approx(0.2), 75, 5, 2)
    assert row["predictions"] == 22 and row["windows"] == 2
    assert summary(items[:1], 11)["delta_ppl_se"] is None


@pytest.fixture
def protocol(tmp_path, model_dir):
    """A protocol over six windows, results in its own folder."""
    path = write_windows(windows(6, 260), tmp_path / "windows.json")

    def make_one(out="out", **settings):
        settings = {
            "models": [str(model_dir)],
            "compressors": ["random", "recent:sinks=2+int8", "int4:group=8:window=0@1"],
            **settings,
        }
        settings = {
            "keep": ["0.25", "16t"],
            "windows": str(path),
            "prefix": PREFIX,
            "continuation": AFTER,
            **settings,
        }
        return Continuation.of({"out": str(tmp_path / out), **settings})

    return make_one


def results(path):
    """Rows and manifest without what differs by nature: times, and the checkout's commit."""
    value = json.loads(path.read_text())
    for name in ("resumed_at", "git_revision"):
        value["manifest"].pop(name, None)
    for row in value["rows"]:
        assert row.pop("seconds") >= 0
    return value


def test_rows_and_manifest(protocol, model_dir, other_model_dir):
    run = protocol(models=[str(model_dir), f"b={other_model_dir}"], limit=3, threads=1)
    value = results(run.run())
    rows, manifest = value["rows"], value["manifest"]
    about = [(r["model"], r["compressor"], r["budget"], r["keep"], r["slots"]) for r in rows]
    assert about == [
        (model, *rest)
        for model in ("tiny", "b")
        for rest in [
            ("none", "1", 1, 40),
            ("random", "0.25", 0.25, 10),
            ("random", "16t", 0.4, 16),
            ("recent:sinks=2+int8", "0.25", 0.25, 10),
            ("recent:sinks=2+int8", "16t", 0.4, 16),
            ("int4:group=8:window=0", "1", 1, 40),
        ]
    ]
    for row in rows:
        assert len(row["nll_by_window"]) == row["windows"] == 3 and row["question_aware"] is False
        assert row["ppl"] == pytest.approx(math.exp(sum(row["nll_by_window"]) / 3))
        assert row["delta_ppl"] == pytest.approx(row["ppl"] - row["ppl_dense"])
    assert (
        rows[0]["delta_ppl"] == rows[0]["kl"] == 0 and rows[0]["bytes"] > rows[5]["bytes"] > rows[3]["bytes"]
    )
    assert manifest["settings"] == {
        "prefix": PREFIX, "continuation": AFTER, "dtype": "float32", "device": "cpu", "batch_size": 1, "seed": 0,
    }  # fmt: skip
    assert set(manifest["models"]) == {"tiny", "b"} and len(manifest["models"]["b"]["fingerprint"]) == 64
    assert [w["doc"] for w in manifest["windows"]] == ["doc-0", "doc-1", "doc-2"]
    assert manifest["data"]["windows"] and manifest["versions"]["torch"] and manifest["threads"] == 1


def test_more_windows_and_compressors_join_what_is_there(protocol):
    whole = results(protocol("whole").run())
    first = protocol(limit=2, compressors=["random"]).run()
    kept = {p: p.read_bytes() for p in (first.parent / "items").iterdir()}
    assert results(protocol().run()) == whole
    for path, data in kept.items():
        assert path.read_bytes().startswith(data)  # measured once
    with pytest.raises(ValueError, match=r"settings\.dtype: float32 there, bfloat16 now"):
        protocol(dtype="bfloat16").run()


def test_killed_and_started_again_gives_the_same_file(protocol, tmp_path):
    # One thread: with more, a busy machine gets fewer (MKL and OpenMP choose), and sums in another order.
    how = {"batch_size": 2, "threads": 1}
    whole = results(protocol("whole", **how).run())
    settings = {**vars(protocol(**how)), "windows": str(tmp_path / "windows.json")}
    settings = {k: v for k, v in settings.items() if not k.startswith("_")}
    out = tmp_path / "out"
    for items in (3, 29):  # of 36: in the first batch, and near the end
        kill_after(items, out, run_protocol, settings)
        assert items <= measured(out) < 36 and not (out / "results.json").exists()
    last = max((out / "items").glob("*.jsonl"), key=lambda p: p.stat().st_mtime)
    last.write_bytes(last.read_bytes()[:-9])  # as if the last kill had come in the middle of a write
    assert results(protocol(**how).run()) == whole


def test_bf16(protocol):
    value = results(protocol(dtype="bfloat16", limit=1).run())
    assert all(math.isfinite(row["delta_ppl"]) for row in value["rows"])
    assert value["rows"][0]["bytes"] == 3 * 2 * PREFIX * 2 * 16 * 2


def test_windows_from_text(tmp_path, protocol):
    text = tmp_path / "notes.txt"
    text.write_text("".join(f"Line {i} says {i * i}.\n" for i in range(60)))
    run = protocol(windows="3", text=[str(text)], limit=2, compressors=["recent"], min_chars_per_token=1)
    assert any("2 from" in line and "notes.txt" in line for line in run.check())
    value = results(run.run())
    assert len(value["manifest"]["windows"]) == 2
    again = protocol("again", windows=str(tmp_path / "out" / "windows.json"), limit=2, compressors=["recent"])
    assert results(again.run())["rows"] == value["rows"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"compressors": ["nonsense"]}, "compressor 'nonsense': choose among"),
        ({"compressors": ["random:sed=1"]}, "'sed=1' is not a setting"),
        ({"compressors": ["int8"]}, "quantisation drops none: write int8@1, or stack"),
        ({"compressors": ["recent:sinks=30"]}, "keep 0.25 of 40 tokens leaves 10 slots, it needs 31"),
        ({"keep": ["0.01"]}, "keeps nothing: give at least 0.025"),
        ({"keep": ["half"]}, "keep 'half'"),
        ({"keep": []}, "keep: give at least one"),
        ({"models": ["nowhere"]}, "model 'nowhere': no such folder"),
        ({"prefix": 600}, r"model tiny: text of 612 tokens \(600 and 12 more\): the model reads 512"),
        ({"continuation": 1}, "the first of them is not scored"),
        ({"prefix": 41}, r"window 0 \(counted from 0\): has 52 ids, 53 wanted"),
        ({"windows": "missing.json"}, "missing.json: no such file"),
        ({"windows": "0"}, "windows=0"),
        ({"windows": "3", "text": ["nowhere.txt"]}, "text: 'nowhere.txt' does not exist"),
        ({"windows": "3", "corpora": ["bible"]}, "corpora: 'bible' is not known; choose among"),
        ({"text": ["x"]}, "is a file of windows: leave out text"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"limit": 0}, "limit=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"device": "tpu"}, "device='tpu'"),
    ],
)
def test_bad_settings_are_found_before_any_work(protocol, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        protocol(**settings).check()
    assert not (tmp_path / "out").exists()
