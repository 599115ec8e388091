"""Items on disk: kept whatever happens, and never mixed with those of another run."""

import json

import pytest

from kvcat_nemo.compress import Budget
from kvcat_nemo.evaluate.results import Key, Store, budget_label, parse_budget, write_results
from kvcat_nemo.evaluate.runner import run_items

KEY = Key("continuation", "tiny", "random", "0.1")
FACTS = {
    "settings": {"dtype": "float32", "prefix": 768},
    "data": "abc",
    "models": {"tiny": {"fingerprint": "1"}},
}


def test_items_come_back_from_disk_as_they_were(tmp_path):
    store = Store(tmp_path, FACTS)
    assert store.get(KEY, "0") is None
    result = {"nll": 0.1 + 0.2, "slots": 76, "text": "é\u2028", "parts": [1.5, 1e-300]}
    store.put(KEY, "0", result)
    store.put(KEY, "1", {"nll": 2.0})
    store.close()
    again = Store(tmp_path, FACTS)
    assert again.get(KEY, "0") == result and again.get(KEY, "1") == {"nll": 2.0}
    assert again.get(Key("continuation", "tiny", "random", "0.1", question_aware=True), "0") is None


@pytest.mark.parametrize("cut", [1, 5, 60, 10_000])
def test_a_line_cut_short_is_measured_anew_and_nothing_else(tmp_path, cut):
    store = Store(tmp_path, FACTS)
    for i in range(3):
        store.put(KEY, str(i), {"nll": i / 3})
    store.close()
    path = next((tmp_path / "items").glob("*.jsonl"))
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    store = Store(tmp_path, FACTS)
    left = [i for i in range(3) if store.get(KEY, str(i)) is not None]
    assert left == {1: [0, 1], 5: [0, 1], 60: [0], 10_000: []}[cut]
    for i in range(3):
        if i not in left:
            store.put(KEY, str(i), {"nll": i / 3})
    assert path.read_bytes() == whole


def test_damage_in_the_middle_is_told(tmp_path):
    store = Store(tmp_path, FACTS)
    store.put(KEY, "0", {"nll": 1.0})
    store.put(KEY, "1", {"nll": 1.0})
    store.close()
    path = next((tmp_path / "items").glob("*.jsonl"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-4], lines[2]]) + "\n")
    with pytest.raises(ValueError, match="line 2: damaged"):
        Store(tmp_path, FACTS).get(KEY, "0")


def test_other_facts_are_refused_by_name_and_more_models_are_welcome(tmp_path):
    Store(tmp_path, FACTS).close()
    with pytest.raises(
        ValueError, match=r"settings\.dtype: float32 there, bfloat16 now.*Give another\s+folder"
    ):
        Store(tmp_path, {**FACTS, "settings": {"dtype": "bfloat16", "prefix": 768}})
    with pytest.raises(ValueError, match="data: abc there, abd now"):
        Store(tmp_path, {**FACTS, "data": "abd"})
    with pytest.raises(ValueError, match=r"models\.tiny\.fingerprint: 1 there, 2 now"):
        Store(tmp_path, {**FACTS, "models": {"tiny": {"fingerprint": "2"}}})
    Store(tmp_path, {**FACTS, "models": {"other": {"fingerprint": "3"}}}).close()
    facts = json.loads((tmp_path / "run.json").read_text())["facts"]
    assert facts["models"] == {"tiny": {"fingerprint": "1"}, "other": {"fingerprint": "3"}}
    with pytest.raises(ValueError, match=r"models\.other\.fingerprint: 3 there, 4 now"):
        Store(tmp_path, {**FACTS, "models": {"other": {"fingerprint": "4"}}})


def test_other_versions_are_refused(tmp_path):
    Store(tmp_path, FACTS).close()
    run = json.loads((tmp_path / "run.json").read_text())
    run["manifest"]["versions"]["transformers"] = "4.0"
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=r"transformers: 4\.0 there"):
        Store(tmp_path, FACTS)


def test_two_evaluations_do_not_share_a_folder(tmp_path):
    store = Store(tmp_path, FACTS)
    with pytest.raises(ValueError, match="another evaluation is at work"):
        Store(tmp_path, FACTS)
    store.close()
    Store(tmp_path, FACTS).close()


def test_figures_that_are_not_numbers_are_refused(tmp_path):
    store = Store(tmp_path, FACTS)
    for result in ({"kl": float("nan")}, {"parts": [1.0, float("inf")]}):
        with pytest.raises(ValueError, match="continuation tiny random 0.1, w3: (kl is nan|parts is inf)"):
            store.put(KEY, "w3", result)
    assert store.get(KEY, "w3") is None


def test_runner_measures_what_is_missing_and_draws_the_same_numbers(tmp_path):
    import torch

    def measure():
        return {"x": float(torch.rand(()))}

    work = [(KEY, str(i), measure) for i in range(4)]
    whole = Store(tmp_path / "whole", FACTS)
    run_items(whole, work, total=4, description="test")
    parts = Store(tmp_path / "parts", FACTS)
    run_items(parts, work[:2], total=2, description="test")
    asked = []

    def noted(i):
        def run():
            asked.append(i)
            return measure()

        return run

    run_items(parts, [(KEY, str(i), noted(i)) for i in range(4)], total=4, description="test")
    assert asked == [2, 3]
    values = [whole.get(KEY, str(i))["x"] for i in range(4)]
    assert values == [parts.get(KEY, str(i))["x"] for i in range(4)] and len(set(values)) == 4


def test_results_file(tmp_path):
    Store(tmp_path, FACTS).close()
    rows = [{"model": "tiny", "nll": [0.5, 1.0]}, {"model": "tiny", "nll": []}]
    first = write_results(tmp_path, "continuation", rows, {"limit": 2}).read_bytes()
    value = json.loads(first)
    assert value["protocol"] == "continuation" and value["rows"] == rows
    assert value["manifest"]["settings"] == FACTS["settings"] and value["manifest"]["limit"] == 2
    assert {"torch", "transformers", "numpy", "python"} <= value["manifest"]["versions"].keys()
    Store(tmp_path, FACTS).close()
    run = json.loads((tmp_path / "run.json").read_text())
    if "resumed_at" not in run["manifest"]:  # a commit in the meantime is told there
        assert write_results(tmp_path, "continuation", rows, {"limit": 2}).read_bytes() == first
    with pytest.raises(ValueError):
        write_results(tmp_path, "continuation", [{"nll": float("nan")}], {})


@pytest.mark.parametrize("text, budget", [("0.1", Budget(keep_fraction=0.1)), ("76t", Budget(tokens=76))])
def test_budgets_as_users_write_them(text, budget):
    assert parse_budget(text) == budget and budget_label(budget) == text


@pytest.mark.parametrize("text", ["0", "1.5", "ten", "t", "0t", "7.5t", "-0.1", "nan"])
def test_budgets_that_are_none(text):
    with pytest.raises(ValueError, match="keep"):
        parse_budget(text)
