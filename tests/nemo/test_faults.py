"""The short form of `make faults`: every kind of fault once or twice, on real training processes."""

import json

import pytest

from benchmarks import golden_losses
from benchmarks.faults import damage, kills, longer, nan, resume, runs
from benchmarks.faults.server import Server

pytestmark = [pytest.mark.nemo, pytest.mark.slow, pytest.mark.multiprocess]


STEPS = 12


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def unbroken(server, tmp_path_factory):
    """layout → trajectory of a run that nothing interrupts, and its folder."""
    known = {}

    def get(layout="TP1", steps=STEPS):
        if (layout, steps) not in known:
            folder = tmp_path_factory.mktemp("straight")
            known[layout, steps] = (runs.straight(server, folder, steps, layout), folder)
        return known[layout, steps]

    return get


def good(record):
    assert record.tried and record.survived == record.tried, "\n".join(record.failures)


@pytest.mark.parametrize("layout", ["TP1", "DP2"])
def test_killed_between_a_save_and_the_validation_of_its_step(server, unbroken, tmp_path, layout):
    good(kills.before_validation(server, tmp_path, {layout: unbroken(layout)[0]}, STEPS))


def test_killed_in_a_step_and_in_a_save(server, tmp_path):
    records = kills.kill_moments(
        server,
        tmp_path,
        {"in a step": 2, "in a save": 2, "while starting": 1},
        seed=3,
        unbroken=runs.straight(server, tmp_path / "straight", 20, "TP1"),
        steps=20,
    )
    for record in records.values():
        good(record)
        assert record.checkpoints_lost == 0 and max(record.steps_lost) <= runs.SAVE_EVERY + 1


@pytest.mark.parametrize("layout", ["TP2", "PP2", "DP2"])
def test_ten_steps_are_five_and_five(server, tmp_path, layout):
    good(resume.resume_exact(server, tmp_path, [layout]))


def test_masks_behind_a_cut_are_drawn_again_after_a_resume(server, tmp_path):
    """Cuts and kept fractions are a function of seed and window: five and five steps are ten, every figure the same."""
    kvcat = {"policy": "random", "mask_span": "prefix"}
    good(
        resume.resume_exact(
            server, tmp_path, ["TP2"], **{f"model.config.kvcat.{k}": v for k, v in kvcat.items()}
        )
    )
    shares = [x["behind"] for x in runs.lines(tmp_path / "TP2-10") if x["kind"] == "train"]
    assert len(set(shares)) > 5 and all(0 < share < 1 for share in shares)


def test_the_same_on_an_indexed_dataset(server, tmp_path):
    good(resume.resume_with_files(server, tmp_path / "files", ["DP2"]))


def test_a_longer_run_reads_the_same_windows(server, tmp_path):
    good(longer.extended(server, tmp_path))


def test_five_steps_at_another_layout(server, tmp_path):
    good(resume.resume_across(server, tmp_path, source="TP2", target="TP1"))


def test_asked_to_stop(server, unbroken, tmp_path):
    good(resume.stops(server, tmp_path, None, STEPS, {"DP2": unbroken("DP2")[0]}))


def test_one_rank_dies_and_one_freezes(server, unbroken, tmp_path):
    reference = unbroken("DP2")[0]
    good(kills.one_dies(server, tmp_path / "killed", "DP2", reference, STEPS, 1, victims=[1]))
    good(kills.one_dies(server, tmp_path / "frozen", "DP2", reference, STEPS, 1, freeze=True, victims=[0]))


def test_disk_full(server, unbroken, tmp_path):
    reference, folder = unbroken()
    good(damage.disk_full(server, tmp_path, reference, STEPS, runs.checkpoint_megabytes(folder)))


def test_damaged_checkpoints(server, unbroken, tmp_path):
    good(damage.damaged_files(server, tmp_path, unbroken()[0], STEPS))


def test_not_a_number(server, tmp_path):
    good(nan.not_a_number(server, tmp_path / "nan", layouts=[("DP2", 1)]))
    good(nan.skipped_step_changes_nothing(server, tmp_path / "weights"))


def test_resume_modes_and_the_suites_own_smoke_form(server, tmp_path, capsys):
    from benchmarks.faults.__main__ import OUT, SMOKE, main

    before = OUT.read_bytes()
    with pytest.raises(SystemExit) as ended:
        main(["--smoke", "--out", str(tmp_path / "faults.json"), "--keep", str(tmp_path / "runs")], server)
    assert ended.value.code == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "faults.json").read_text())["faults"]
    assert set(found) == set(SMOKE) and all(one["survived"] == one["tried"] > 0 for one in found.values())
    assert OUT.read_bytes() == before


def test_keeps_the_newest_and_the_best(server, unbroken, tmp_path):
    _, folder = unbroken()
    validations = {x["step"]: x for x in runs.lines(folder) if x["kind"] == "validation" and x["step"]}
    # A figure that is lowest early: what is best is then not what is newest.
    early = [
        n
        for n, v in validations[8].items()
        if n.endswith(("agreement", "ppl", "rate")) and v < validations[12][n]
    ]
    assert early, validations
    more = {"log.ckpt.best_metric": early[0], "log.ckpt.keep_last": 1, "trainer.val_check_interval": 4}
    run = server.run(tmp_path, runs.settings(STEPS, **more))
    assert run.wait(120) == [0], run.tail()
    steps = {x["step"]: x[early[0]] for x in runs.lines(tmp_path) if x["kind"] == "validation" and x["step"]}
    best = min(steps, key=steps.get)
    assert best != STEPS
    kept = {f.step for f in runs.complete(runs.checkpoints(tmp_path))}
    assert kept == {best, STEPS}
    assert (runs.checkpoints(tmp_path) / "last").resolve().name == f"step={STEPS}"


def test_an_unknown_metric_is_refused_before_training(server, tmp_path):
    run = server.run(tmp_path, runs.settings(STEPS) | {"log.ckpt.best_metric": "perplexity"})
    assert run.wait(60) == [1]
    assert "log.ckpt.best_metric='perplexity'" in run.output() and "masked_ppl" in run.output()
    assert runs.last_step(tmp_path) == 0


STAGES = {
    "model.config.kvcat.num_groups": 4,
    "trainer.strategy.pipeline_model_parallel_size": 2,
    "trainer.strategy.virtual_pipeline_model_parallel_size": 2,
}


@pytest.mark.parametrize(
    ("layout", "exchange"),
    [
        ({"trainer.strategy.pipeline_model_parallel_size": 2}, {}),
        ({"trainer.strategy.context_parallel_size": 2}, {}),
        (STAGES, {"model.config.batch_p2p_comm": False, "model.config.overlap_p2p_comm": True}),
    ],
    ids=["PP2", "CP2", "PP2, two chunks each, which must all begin with a router"],
)
def test_two_processes_train_as_one(server, base, tmp_path, layout, exchange):
    """From a base's weights: the same figures to float32 rounding."""
    settings = {"resume.base": base[1], "trainer.max_steps": 4, "trainer.val_check_interval": 4}
    alone = {name: value for name, value in layout.items() if "strategy" not in name}
    figures = {}
    for ranks, more in ((1, alone), (2, layout | exchange)):
        run = server.run(tmp_path / str(ranks), settings | more, ranks=ranks)
        assert run.wait(200) == [0] * ranks, run.tail()
        figures[ranks] = [x for x in runs.lines(tmp_path / str(ranks)) if x["kind"] == "train"]
        assert [x["step"] for x in figures[ranks]] == [1, 2, 3, 4]
    for line, expected in zip(figures[2], figures[1], strict=True):
        for name in ("loss/anchor", "ce_masked", "grad_norm/backbone"):
            assert line[name] == pytest.approx(expected[name], rel=2e-4), (line["step"], name)


GOLDEN = json.loads(golden_losses.GOLDEN.read_text())


@pytest.mark.parametrize("name", golden_losses.RUNS)
def test_golden_losses(server, tmp_path, name):
    """Every loss part and keep rate of a few steps is what it was; how far another machine may be off is derived."""
    recipe, more = golden_losses.RUNS[name]
    run = server.run(tmp_path, golden_losses.SETTINGS | more, recipe=recipe)
    assert run.wait(120) == [0], run.tail()
    figures = golden_losses.figures(tmp_path)
    expected, allowed = GOLDEN["runs"][name], GOLDEN["tolerances"][name]
    assert expected.keys() <= figures.keys()
    off = {n: (figures[n], x, allowed[n]) for n, x in expected.items() if abs(figures[n] - x) > allowed[n]}
    assert not off, f"{off}; after a change that is meant: python -m benchmarks.golden_losses --golden"


def test_golden_losses_notice_what_changes_the_method(server, tmp_path):
    """A hundredth on one loss' weight is far outside of what the tolerance allows."""
    changed = {"model.config.kvcat.budget_weight": 10.1}  # of 10
    run = server.run(tmp_path, golden_losses.SETTINGS | changed)
    assert run.wait(120) == [0], run.tail()
    figures = golden_losses.figures(tmp_path)
    expected, allowed = GOLDEN["runs"]["kvcat_tiny"], GOLDEN["tolerances"]["kvcat_tiny"]
    off = {n for n in expected if abs(figures[n] - expected[n]) > allowed[n]}
    assert {"train 1 loss/total", "train 1 weighted/budget"} <= off and "train 1 loss/anchor" not in off
