"""Base ability on a small random model; the harness' own loglikelihoods are checked against a plain forward pass."""

import json
import math
import subprocess
import sys

import pytest
import torch

from kvcat_nemo.data.benchmarks import BENCHMARKS
from kvcat_nemo.evaluate.base_ability import BaseAbility, drawn, rows
from kvcat_nemo.evaluate.registry import protocol_class

ABC = ["A", "B", "C"]


def items(name, count=5):
    """Items of a benchmark in its published fields, all different."""

    def choices(i):
        return {"text": [f"x{i}", f"yy{i}", f"z z{i}"], "label": ABC}

    make = {
        "hellaswag": lambda i: {
            **{
                "ind": i,
                "activity_label": "Cooking",
                "ctx_a": f"He has {i}.",
                "ctx_b": "he",
                "ctx": "",
                "split": "val",
            },
            **{"endings": [f"runs {i}", "sleeps", "eats it all", "a"], "label": str(i % 4)},
        },
        "winogrande": lambda i: {
            **{
                "sentence": f"A{i} saw B as _ went by.",
                "option1": f"A{i}",
                "option2": "B",
                "answer": str(1 + i % 2),
            }
        },
        "piqa": lambda i: {"goal": f"cut {i}", "sol1": "a knife", "sol2": f"a spoon {i}", "label": i % 2},
        "openbookqa": lambda i: {
            "id": f"{i}",
            "question_stem": f"Sun {i}",
            "choices": choices(i),
            "answerKey": ABC[i % 3],
        },
        "arc_easy": lambda i: {
            "id": f"{i}",
            "question": f"Why {i}?",
            "choices": choices(i),
            "answerKey": ABC[i % 3],
        },
        "arc_challenge": lambda i: {
            "id": f"{i}",
            "question": f"How {i}?",
            "choices": choices(i),
            "answerKey": ABC[i % 3],
        },
    }
    return [make[name](i) for i in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    for name in BENCHMARKS:
        lines = "".join(json.dumps(item) + "\n" for item in items(name))
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def protocol(model_dirs, data, out, **settings):
    models = [f"{name}={path}" for name, path in model_dirs.items()]
    return BaseAbility(models=models, data=str(data), out=str(out), threads=1, **settings)


def read(path):
    value = json.loads(path.read_text())
    return value["rows"], value["manifest"]


@torch.no_grad()
def log_likelihood(folder, context, continuation):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start, ids = (
        tokenizer(text, add_special_tokens=False).input_ids for text in (context, context + continuation)
    )
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(len(start), len(ids)))


def test_all_tasks_before_and_after(model_dir, other_model_dir, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before_after = {"before": model_dir, "after": other_model_dir}
    found, manifest = read(protocol(before_after, data, tmp_path / "out", limit=4).run())
    plain = {(r["model"], r["task"]): r for r in found if "before" not in r}
    assert set(plain) == {(m, t) for m in before_after for t in (*BENCHMARKS, "average")}
    for task in BENCHMARKS:
        for model in before_after:
            row = plain[model, task]
            assert row["n"] == 4 and row["accuracy"] == 25 * sum(row["correct"])
            assert row["accuracy"] == row["acc" if task == "winogrande" else "acc_norm"]
        (difference,) = (r for r in found if "before" in r and r["task"] == task)
        assert (difference["model"], difference["before"], difference["n"]) == ("after", "before", 4)
        assert (
            difference["difference"] == plain["after", task]["accuracy"] - plain["before", task]["accuracy"]
        )
    assert manifest["settings"]["limit"] == 4 and set(manifest["data"]) == set(BENCHMARKS)
    assert manifest["models"]["before"]["fingerprint"] != manifest["models"]["after"]["fingerprint"]
    assert "lm_eval" in manifest["versions"]

    # The first of ARC-Easy's items by hand: the harness' prompt, every option, acc and its length-normalised sibling.
    chosen = drawn(5, 4, "arc_easy", 0)
    item = items("arc_easy")[chosen[0]]
    texts = item["choices"]["text"]
    by_hand = [
        log_likelihood(model_dir, f"Question: {item['question']}\nAnswer:", f" {text}") for text in texts
    ]
    stored = [json.loads(x) for f in (tmp_path / "out/items").iterdir() for x in f.read_text().splitlines()]
    keys = [i for i, line in enumerate(stored) if "key" in line]
    (start,) = (
        i
        for i in keys
        if stored[i]["key"]["model"] == "before" and ["task", "arc_easy"] in stored[i]["key"]["extra"]
    )
    assert stored[start + 1]["result"]["loglikelihood"][:3] == pytest.approx(by_hand, abs=1e-3)
    right = ABC.index(item["answerKey"])
    norm = [value / len(text) for value, text in zip(by_hand, texts, strict=True)]
    assert plain["before", "arc_easy"]["correct"][0] == (norm.index(max(norm)) == right)


def test_a_killed_run_goes_on_and_ends_with_the_same_results(model_dir, data, tmp_path):
    settings = {"tasks": ["piqa", "arc_easy"], "limit": 4}
    whole = read(protocol({"m": model_dir}, data, tmp_path / "whole", **settings).run())
    code = f"""
import os, signal
from kvcat_nemo.evaluate import results
from kvcat_nemo.evaluate.base_ability import BaseAbility
put = results.Store.put
def put_and_die(self, key, item, result):
    put(self, key, item, result)
    os.kill(os.getpid(), signal.SIGKILL)
results.Store.put = put_and_die
run = BaseAbility(models=["m={model_dir}"], data={str(data)!r}, out={str(tmp_path / "cut")!r}, threads=1, **{settings!r})
run.run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    (file,) = (tmp_path / "cut/items").iterdir()
    at_the_kill = file.read_text()
    rest = protocol({"m": model_dir}, data, tmp_path / "cut", **settings)
    cut = read(rest.run())
    assert file.read_text() == at_the_kill and len(list((tmp_path / "cut/items").iterdir())) == 2
    for _, manifest in (whole, cut):  # a commit may be made while the test runs
        manifest.pop("git_revision"), manifest.pop("resumed_at", None)
    assert cut == whole

    with pytest.raises(ValueError, match="settings.limit: 4 there, 3 now"):
        protocol({"m": model_dir}, data, tmp_path / "cut", **{**settings, "limit": 3}).run()
    key, item = map(json.loads, at_the_kill.splitlines())
    item["result"]["requests"] = "0" * 64
    file.write_text(f"{json.dumps(key)}\n{json.dumps(item)}\n")
    with pytest.raises(ValueError, match="answers other questions; give another folder"):
        rest.run()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tasks": ["mmlu"]}, "tasks: 'mmlu' is not known; choose among hellaswag"),
        ({"tasks": ["piqa", "piqa"]}, "give each task once"),
        ({"tasks": []}, "at least one"),
        ({"limit": 0}, "limit=0: give at least 1"),
    ],
)
def test_settings_are_checked_first(model_dir, data, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        protocol({"m": model_dir}, data, tmp_path / "out", **settings).check()
    assert not (tmp_path / "out").exists()


def test_broken_data_is_named_before_anything_is_loaded(model_dir, data, tmp_path):
    (tmp_path / "piqa.jsonl").write_text('{"goal": "g", "sol1": "a", "label": 0}\n')
    with pytest.raises(ValueError, match="record 1: not a piqa item: no field 'sol2'"):
        protocol({"m": model_dir}, tmp_path, tmp_path / "out", tasks=["piqa"]).check()


def test_the_plan_and_the_name(model_dir, data, tmp_path):
    plan = protocol({"m": model_dir}, data, tmp_path / "out", limit=7).check()
    assert any("arc_challenge: 7 items each" in line for line in plan)
    assert protocol_class("base-ability") is BaseAbility


def test_a_smaller_limit_draws_from_a_larger_ones_items():
    assert set(drawn(1000, 20, "piqa", 0)) < set(drawn(1000, 50, "piqa", 0)) < set(range(1000))
    assert drawn(1000, 20, "piqa", 0) != drawn(1000, 20, "piqa", 1) != drawn(1000, 20, "arc_easy", 1)
    assert drawn(5, None, "piqa", 0) == drawn(5, 9, "piqa", 0) == [0, 1, 2, 3, 4]
    assert drawn(9, 4, "piqa", 0) == sorted(drawn(9, 4, "piqa", 0))


def test_rows_by_hand():
    old = {"t": [{"acc": 0.0, "acc_norm": x} for x in (0, 0, 1, 1)], "u": [{"acc": x} for x in (1.0, 0.0)]}
    new = {"t": [{"acc": 1.0, "acc_norm": x} for x in (1, 1, 1, 1)], "u": [{"acc": x} for x in (0.0, 0.0)]}
    found = {(r["model"], r["task"], "before" in r): r for r in rows({"old": old, "new": new})}
    assert found["old", "t", False]["accuracy"] == 50 and found["old", "t", False]["acc"] == 0
    assert found["old", "t", False]["accuracy_se"] == pytest.approx(100 * math.sqrt(1 / 3 / 4))
    assert (
        found["old", "average", False]["accuracy"] == 50 and found["new", "average", False]["accuracy"] == 50
    )
    assert found["new", "t", True]["difference"] == 50 and found["new", "u", True]["difference"] == -50
    average = found["new", "average", True]
    # t's differences 1 1 0 0: se √(1/3/4); u's −1 0: se 1/2. The average halves both and adds their squares.
    assert average["difference"] == 0
    assert average["difference_se"] == pytest.approx(100 * math.sqrt(1 / 12 + 1 / 4) / 2)
    # Of the 8 sign vectors of the differing items (weights ¾ ¾ −1½) all have a sum as far from 0 as the one seen.
    assert average["p"] == 1 and found["new", "t", True]["p"] == 0.5
