"""The JSON-lines record of a run."""

import json
import math

from kvcat_nemo.runs.metrics_file import MetricsFile


def write(path, steps):
    file = MetricsFile(path, resumed_at=0)
    for step in steps:
        file.write("train", step, {"loss/total": 1.0 / step, "bad": math.nan, "time": 5.0})
    return file


def test_a_resumed_run_drops_the_steps_it_makes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 13))
    file = MetricsFile(path, resumed_at=10)
    assert [x["step"] for x in MetricsFile.lines(path)] == list(range(1, 11))
    assert file.steps == {("train", s) for s in range(1, 11)}
    file.write("train", 11, {"loss/total": 1.0})
    assert [x["step"] for x in MetricsFile.lines(path)] == list(range(1, 12))


def test_only_finite_figures(tmp_path):
    write(tmp_path / "m", [1])
    assert MetricsFile.lines(tmp_path / "m") == [{"kind": "train", "step": 1, "loss/total": 1.0, "time": 5.0}]


def test_a_line_cut_short_hides_no_other(tmp_path):
    path = tmp_path / "m"
    write(path, [1, 2])
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
        file.write(
            '\n["not", "a", "line"]\n' + json.dumps({"kind": "train", "step": 3}) + "\n" + '{"kind": "tr'
        )
    assert [x["step"] for x in MetricsFile.lines(path)] == [1, 2, 3]
    assert MetricsFile.lines(tmp_path / "missing") == []


def test_a_full_disk_is_one_warning_and_no_end(tmp_path, caplog, monkeypatch):
    path = tmp_path / "m"
    file = write(path, [1])
    opening = type(path).open

    def full(self, mode="r", *args, **options):
        if mode == "a":
            raise OSError(28, "No space left on device")
        return opening(self, mode, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "open", full)
        file.write("train", 2, {"x": 1.0})
        file.write("train", 3, {"x": 1.0})
    with opening(path, "a") as half:
        half.write('{"kind": "tra')  # what a full disk leaves
    file.write("train", 4, {"x": 1.0})
    file.write("train", 5, {"x": 1.0})
    assert [x["step"] for x in MetricsFile.lines(path)] == [1, 4, 5]
    assert len(caplog.records) == 1 and "No space" in caplog.text
