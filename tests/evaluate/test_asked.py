"""Needle, RULER-style tasks and long-document questions: what is generated, how it is scored, and whole runs on a small
random model, killed ones included."""

import json
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch

from kvcat_nemo.compress import generate, prefill, select
from kvcat_nemo.compress.baselines import Random
from kvcat_nemo.evaluate import long_qa
from kvcat_nemo.evaluate.haystack import filled, made_up, sentences_of_files, stream
from kvcat_nemo.evaluate.long_qa import LongQA, balanced, cut_middle, exact, f1, option_scores
from kvcat_nemo.evaluate.models import load_model
from kvcat_nemo.evaluate.needle import Needle, greedy_match
from kvcat_nemo.evaluate.question_protocol import Ask
from kvcat_nemo.evaluate.registry import protocol_class
from kvcat_nemo.evaluate.ruler import Ruler, found
from kvcat_nemo.evaluate.ruler_tasks import TASKS
from kvcat_nemo.tokens import beginning
from kvcat_nemo.tokens import following_ids as encode


def by_letter(text):
    return [ord(c) for c in text]


def text_of(ids):
    return "".join(map(chr, ids))


@pytest.fixture(scope="module")
def loaded(model_dir):
    return load_model(model_dir)[:2]


def rows_of(path):
    return json.loads(path.read_text())["rows"]


# What is generated


def test_made_up_sentences_hold_no_digit_and_hardly_repeat():
    sentences = [s for s, _ in zip(made_up(random.Random(0)), range(500), strict=False)]
    assert not any(re.search(r"\d", s) for s in sentences) and all(s.endswith(".") for s in sentences)
    assert len(set(sentences)) > 480


def test_needles_stand_at_their_depths_between_whole_sentences():
    for depth in (0, 0.3, 0.5, 1):
        ids = filled(by_letter, made_up(random.Random(0)), [(depth, "HERE 123.")], 2000)
        text = text_of(ids)
        assert 1880 < len(text) <= 2000
        before, _, after = text.partition(" HERE 123.")
        assert abs(len(before) - depth * (len(text) - 10)) < 60
        assert before[-1:] in ("", ".") and after[:1] in ("", " ") and text.endswith(".")
        # The hay is the same whatever the depth.
        assert (
            before + after
            == text_of(filled(by_letter, made_up(random.Random(0)), [(0, "HERE 123.")], 2000))[10:]
        )


def test_needles_of_one_place_keep_their_order_and_must_fit():
    text = text_of(filled(by_letter, made_up(random.Random(0)), [(0.5, "A."), (0.5, "B."), (1, "C.")], 300))
    assert text.index(" A. B.") < text.index(" C.") == len(text) - 3
    with pytest.raises(ValueError, match="length=8: what is to be hidden alone has 10 tokens"):
        filled(by_letter, made_up(random.Random(0)), [(0, "HERE 123.")], 8)


def test_local_text_is_the_haystack(tmp_path):
    (tmp_path / "a.txt").write_text(
        " ".join(f"Sentence {n:02} of the book is here." for n in range(30)) + " No. Short."
    )
    sentences = sentences_of_files([tmp_path / "a.txt"])
    assert len(sentences) == 30 and sentences[3] == "Sentence 03 of the book is here."
    some = [s for s, _ in zip(stream(sentences, random.Random(1)), range(31), strict=False)]
    first = sentences.index(some[0])
    assert some == (sentences[first:] + sentences)[:31]
    (tmp_path / "a.txt").write_text("Only one sentence is in here.")
    with pytest.raises(ValueError, match="only 1 sentences"):
        sentences_of_files([tmp_path / "a.txt"])


def make(task, length=2000, seed=0):
    return TASKS[task](by_letter, random.Random(seed), length, [])


@pytest.mark.parametrize("task", TASKS)
def test_tasks_fit_their_length_and_are_drawn_by_the_generator_alone(task):
    for length in (1300, 4000):
        assert 0.8 * length < len(make(task, length).ids) <= length
    assert make(task) == make(task) != make(task, seed=1)
    with pytest.raises(ValueError, match="length=30"):
        make(task, 30)


@pytest.mark.parametrize("task", [t for t in TASKS if t.startswith("niah")])
@pytest.mark.parametrize("seed", range(3))
def test_the_codes_can_be_read_in_the_text(task, seed):
    example = make(task, seed=seed)
    pairs = re.findall(r"The code of the ([\w-]+) is (\d{7})\.", text_of(example.ids))
    assert len(pairs) == (1 if task == "niah-single" else 4)
    asked = re.findall(r"the (\w+-\w+)", example.question)
    # In the order of the question: of one key's several codes any order is as good.
    codes = [value for key in asked for name, value in pairs if name == key]
    assert sorted(codes) == sorted(example.answers)
    assert len(codes) == {"niah-single": 1, "niah-multikey": 1}.get(task, 4)
    assert len(by_letter(" " + ", ".join(example.answers))) < example.max_new_tokens


@pytest.mark.parametrize("seed", range(3))
def test_variables_can_be_traced_reading_forwards_once(seed):
    example = make("variable-tracking", seed=seed)
    values = {}
    for name, source in re.findall(r"Set variable (\w+) to (\w+)\.", text_of(example.ids)):
        values[name] = source if source.isdigit() else values[source]
    (wanted,) = re.findall(r"\d{5}", example.question)
    assert {name for name, value in values.items() if value == wanted} == set(example.answers)
    assert len(values) == 10 and len(example.answers) == 5


@pytest.mark.parametrize("length", [1000, 3000, 9000])
def test_common_words_are_the_most_common(length):
    example = make("common-words", length)
    entries = re.findall(r"(\d+)\. ([a-z ]+?)(?= \d|$)", text_of(example.ids))
    assert [int(n) for n, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries).most_common()
    assert {word for word, _ in counts[:10]} == set(example.answers)
    assert counts[9][1] >= 5 * counts[10][1] and len(counts) > 14


def test_frequent_words_are_the_three_most_frequent_by_far():
    counts = Counter(text_of(make("frequent-words").ids).split()).most_common()
    assert tuple(word for word, _ in counts[:3]) == make("frequent-words").answers
    assert counts[0][1] > 3 * counts[1][1] > 3 * counts[2][1] > 3 * counts[3][1]


# How it is scored


def test_answers_are_found_as_whole_words():
    assert found(["1234567", "XYZ"], "it is 1234567, xyz.") == 2
    assert found(["1234567", "XYZ"], "it is 12345678 and WXYZ and XYZ-A") == 0


def test_greedy_match_is_what_greedy_decoding_gives(loaded):
    model, _ = loaded
    cache = prefill(model, [list(range(4, 60))]).cache
    prompt = [70, 80, 90]
    said = generate(model, cache, prompt, max_new_tokens=5)
    match = greedy_match(model, cache, prompt, said)
    assert match["exact"] and match["first"] == 1
    wrong = [*said[:2], (said[2] + 1) % 260, *said[3:]]
    match = greedy_match(model, cache, prompt, wrong)
    assert (
        not match["exact"]
        and match["first"] < 1
        and match["nll"] > greedy_match(model, cache, prompt, said)["nll"]
    )


def test_option_scores_are_log_probabilities_of_the_whole_text(loaded):
    model, _ = loaded
    context, prompt, options = list(range(4, 40)), [50, 60], [[7], [8, 9, 10]]
    scores = option_scores(model, prefill(model, [context]).cache, prompt, options)
    for option, score in zip(options, scores, strict=True):
        ids = context + prompt + option
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(context + prompt)
        assert score == pytest.approx(
            sum(logp[i - 1, ids[i]].item() for i in range(start, len(ids))), abs=1e-4
        )


def test_balanced_accuracy_by_hand():
    # Always "yes": 3 of 4 are right, but none of the "no".
    got = balanced([0, 0, 0, 1], [100.0, 100.0, 100.0, 0.0])
    assert got == {"balanced_accuracy": 50.0, "balanced_accuracy_se": None}
    got = balanced([0, 0, 1, 1], [100.0, 0.0, 100.0, 100.0])
    assert got["balanced_accuracy"] == 75 and got["balanced_accuracy_se"] == pytest.approx(25)


def test_words_are_compared_as_squad_does():
    assert exact("The  Cat!", "cat") == 1 and exact("cats", "cat") == 0
    assert (
        f1("the black cat", "a cat") == pytest.approx(2 / 3) and f1("dog", "cat") == 0 and f1("", "the") == 1
    )
    assert long_qa.best(f1, "cat", ["dog", "cat"]) == 1


def test_the_middle_goes_first():
    assert cut_middle([1, 2, 3, 4, 5], 5) == [1, 2, 3, 4, 5] == cut_middle([1, 2, 3, 4, 5], 9)
    assert cut_middle([1, 2, 3, 4, 5, 6], 3) == [1, 2, 6] and cut_middle([1, 2, 3, 4, 5], 2) == [1, 5]


# Whole runs


def needle(model_dir, out, **settings):
    small = {
        "lengths": ["200"],
        "depths": ["0", "1"],
        "samples": 2,
        "compressors": ["random"],
        "keep": ["0.2", "1"],
    }
    return Needle.of({"models": [f"m={model_dir}"], "out": str(out), "threads": 1, **small, **settings})


def test_needle_contexts_hold_the_key_once_at_its_place(model_dir, loaded, tmp_path):
    run = needle(model_dir, tmp_path)
    run.check()
    _, tokenizer = loaded
    assert beginning(tokenizer) == []
    for context in run._contexts:
        text, (ask,) = tokenizer.decode(context.ids), context.asks
        key = tokenizer.decode(ask.payload["answer"]).strip()
        assert re.fullmatch(r"\d{6}", key) and len(context.ids) <= 200
        at = text.index(f"The pass key is {key}. Keep it in mind: {key} is the pass key.")
        assert (at == 1) == (dict(context.tags)["depth"] == "0") and "Question" not in text
        assert tokenizer.decode(ask.prompt).endswith("Answer: The pass key is")
    known = needle(model_dir, tmp_path, question="known")
    known.check()
    for context, with_question in zip(run._contexts, known._contexts, strict=True):
        assert with_question.ids[: len(context.ids)] == context.ids
        assert tokenizer.decode(with_question.ids).endswith("Answer:")
        assert tokenizer.decode(with_question.asks[0].prompt) == " The pass key is"
        # Compressed or not, the model reads the same text.
        assert with_question.ids + with_question.asks[0].prompt == context.ids + context.asks[0].prompt


def test_needle_rows(model_dir, tmp_path):
    rows = rows_of(needle(model_dir, tmp_path / "a").run())
    assert [(r["compressor"], r["budget"], r["depth"]) for r in rows] == [
        (c, b, d) for c, b in (("none", "1"), ("random", "0.2"), ("random", "1")) for d in (0, 1, "all")
    ]
    by = {(r["budget"], r["compressor"], r["depth"]): r for r in rows}
    assert all(r["question_aware"] is False and r["length"] == 200 for r in rows)
    dense, full, small = by["1", "none", "all"], by["1", "random", "all"], by["0.2", "random", "all"]
    assert full["nll"] == pytest.approx(dense["nll"], abs=1e-5) and full["slots"] == dense["slots"]
    assert (
        small["slots"] == pytest.approx(0.2 * small["context_tokens"], abs=1) and small["nll"] != dense["nll"]
    )
    assert dense["items"] == 4 and by["1", "none", 0]["items"] == 2
    assert dense["nll"] == pytest.approx((by["1", "none", 0]["nll"] + by["1", "none", 1]["nll"]) / 2)
    assert rows_of(needle(model_dir, tmp_path / "b", limit=1).run())[0]["items"] == 1
    # More of everything joins what is there.
    more = rows_of(needle(model_dir, tmp_path / "b", depths=["0", "0.5", "1"]).run())
    alike = [{k: v for k, v in r.items() if k != "seconds"} for r in more if r["depth"] in (0, 1)]
    assert alike == [{k: v for k, v in r.items() if k != "seconds"} for r in rows if r["depth"] in (0, 1)]


def test_known_and_unknown_questions_are_not_mixed(model_dir, tmp_path):
    needle(model_dir, tmp_path, limit=1).run()
    with pytest.raises(ValueError, match="settings.question: unknown there, known now"):
        needle(model_dir, tmp_path, limit=1, question="known").run()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"depths": ["2"]}, "depths=2: each must be from 0"),
        ({"depths": ["x"]}, "depths='x': must be numbers"),
        ({"lengths": ["200", "200"]}, "lengths='200,200': give different numbers"),
        ({"lengths": ["40"]}, "what is to be hidden alone has"),
        (
            {"lengths": ["600"]},
            r"model m: text of 6\d\d tokens .*: the model reads 512 .*give shorter contexts",
        ),
        ({"samples": 0}, "samples=0"),
        ({"question": "maybe"}, "question='maybe': choose among unknown, known"),
        ({"batch_size": 4}, "batch_size=4: needle takes contexts one by one"),
        ({"text": ["/no/such/file"]}, "matches no file"),
        ({"keep": ["0.001"]}, "keeps nothing"),
    ],
)
def test_settings_are_refused_before_any_work(model_dir, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        needle(model_dir, tmp_path / "out", **settings).check()
    assert not (tmp_path / "out").exists()


def test_a_killed_run_goes_on_and_ends_with_the_same_results(model_dir, tmp_path):
    whole = json.loads(needle(model_dir, tmp_path / "whole").run().read_text())
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(tmp_path)!r})
from kvcat_nemo.evaluate import results
from kvcat_nemo.evaluate.needle import Needle
put, count = results.Store.put, []
def put_and_die(self, key, item, result):
    put(self, key, item, result)
    count.append(1)
    if len(count) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
results.Store.put = put_and_die
Needle(models=["m={model_dir}"], out={str(tmp_path / "cut")!r}, threads=1, lengths=["200"], depths=["0", "1"], samples=2,
       compressors=["random"], keep=["0.2", "1"]).run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    lines = [line for file in (tmp_path / "cut/items").iterdir() for line in file.read_text().splitlines()]
    assert sum('"result"' in line for line in lines) == 5
    cut = json.loads(needle(model_dir, tmp_path / "cut").run().read_text())
    for row in whole["rows"] + cut["rows"]:
        assert row.pop("seconds") >= 0
    assert cut["rows"] == whole["rows"]


def test_ruler_rows(model_dir, tmp_path):
    tasks = ["niah-single", "niah-multivalue"]
    shared = {
        "models": [f"m={model_dir}"],
        "threads": 1,
        "compressors": ["recent"],
        "keep": ["0.5"],
        "lengths": ["320"],
    }
    run = Ruler.of({**shared, "out": str(tmp_path / "a"), "tasks": tasks, "samples": 2})
    assert any("2 examples each" in line for line in run.check())
    rows = rows_of(run.run())
    assert [(r["compressor"], r["task"]) for r in rows] == [
        (c, t) for c in ("none", "recent") for t in (*tasks, "average")
    ]
    assert [r["items"] for r in rows] == [2, 2, 4] * 2 and all(r["length"] == 320 for r in rows)
    with pytest.raises(ValueError, match="'qa' is not known; choose among niah-single"):
        Ruler.of({**shared, "out": "x", "tasks": ["qa"]}).check()


def test_ruler_counts_what_the_model_says(loaded, tmp_path):
    model, tokenizer = loaded
    cache = prefill(model, [encode(tokenizer, "some text")]).cache
    said = tokenizer.decode(generate(model, cache, [70], max_new_tokens=6))
    run = Ruler(models=[], out="")
    ask = Ask("q", [70], {"answers": [said, "never said"], "answer_tokens": 6})
    assert run.measure(model, tokenizer, cache, ask) == {
        "found": int(found([said], said)),
        "wanted": 2,
        "said": said,
    }
    items = [{"found": 1, "wanted": 2}, {"found": 4, "wanted": 4}]
    assert run.figures(items, [])["accuracy"] == 75 and run.figures(items, [])["whole"] == 50


def longbench(path, count=3):
    records = [
        {
            **{"_id": f"id{n}", "domain": "d", "sub_domain": "s", "difficulty": ("easy", "hard")[n % 2]},
            **{"length": "short", "question": f"Which one {n}?", "choice_A": "red", "choice_B": "green blue"},
            **{"choice_C": "c", "choice_D": "d", "answer": "ABCD"[n], "context": f"A text {n}. " * 20},
        }
        for n in range(count)
    ]
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("options", ["letters", "texts"])
def test_longbench_rows(model_dir, loaded, tmp_path, options):
    file = longbench(tmp_path / "data.json")
    run = LongQA.of(
        {
            **{
                "models": [f"m={model_dir}"],
                "out": str(tmp_path / "out"),
                "threads": 1,
                "questions": "longbench-v2",
            },
            **{
                "file": str(file),
                "options": options,
                "max_tokens": 100,
                "compressors": ["recent"],
                "keep": ["0.5"],
            },
        }
    )
    run.check()
    model, tokenizer = loaded
    for context in run._contexts:
        assert len(context.ids) == 100 and "Which" not in tokenizer.decode(context.ids)  # never the question
        prompt = tokenizer.decode(context.asks[0].prompt)
        assert ("\nB. green blue\n" in prompt) == (options == "letters") and prompt.endswith("\nAnswer:")
    rows = rows_of(run.run())
    assert [(r["compressor"], r["difficulty"], r["items"]) for r in rows] == [
        (c, d, n) for c in ("none", "recent") for d, n in (("easy", 2), ("hard", 1), ("all", 3))
    ]
    assert all(r["slots"] == 50 for r in rows[3:]) and rows[0]["chance"] == 25
    told = json.loads((tmp_path / "out/results.json").read_text())["manifest"]["options"]
    assert told["documents_cut"] == 3 and told["options"] == options and told["keep"] == ["0.5"]

    first = run._contexts[0]
    cache = prefill(model, [first.ids]).cache
    texts = ["A", "B", "C", "D"] if options == "letters" else ["red", "green blue", "c", "d"]
    scores = option_scores(
        model, cache, first.asks[0].prompt, [encode(tokenizer, f" {text}") for text in texts]
    )
    if options == "texts":
        scores = [score / len(text) for score, text in zip(scores, texts, strict=True)]
    assert rows[2]["correct_by_item"][0] == (scores.index(max(scores)) == 0)


def test_squad_rows(model_dir, tmp_path):
    qas = [
        {"id": f"q{n}", "question": f"Who {n}?", "answers": [{"text": "He"}, {"text": "him"}]}
        for n in range(2)
    ]
    data = {
        "data": [
            {"title": f"T{n}", "paragraphs": [{"context": f"Text {n}. " * 12, "qas": qas}]} for n in range(2)
        ]
    }
    (tmp_path / "dev.json").write_text(json.dumps(data))
    run = LongQA.of(
        {
            **{
                "models": [f"m={model_dir}"],
                "out": str(tmp_path / "out"),
                "threads": 1,
                "questions": "squad",
            },
            **{"file": str(tmp_path / "dev.json"), "limit": 3, "compressors": ["random"], "keep": ["0.5"]},
        }
    )
    rows = rows_of(run.run())
    assert [(r["compressor"], r["contexts"], r["items"]) for r in rows] == [("none", 2, 3), ("random", 2, 3)]
    assert all(0 <= r["exact"] <= r["f1"] <= 100 and r["nll"] > 0 for r in rows)


def test_qasper_rows_balance_the_answers(model_dir, tmp_path, monkeypatch):
    from kvcat_nemo.data.questions import QADocument, Question

    class Papers:
        SHA256 = "0" * 64

        @staticmethod
        def yes_no_questions(say):
            return papers()

    def papers():
        asked = [Question(f"q{n}", f"Do they {n}?", ("Yes", "No"), int(n == 3)) for n in range(4)]
        return [QADocument("p", "# Title\n\nText. " * 10, tuple(asked))]

    def drawn_from_the_global_state(self, prefilled, slots):
        return select(
            prefilled, [torch.rand(layer.bias_BGS.shape) for layer in prefilled.cache.layers], slots
        )

    monkeypatch.setattr(long_qa, "registry_assets", lambda name: {"qasper": Papers}[name])
    monkeypatch.setattr(Random, "compress_row", drawn_from_the_global_state)
    settings = {"models": [f"m={model_dir}"], "threads": 1, "compressors": ["random"], "keep": ["0.5"]}
    row = rows_of(LongQA.of({**settings, "out": str(tmp_path / "out")}).run())[0]
    right = row["correct_by_item"]
    assert row["accuracy"] == 25 * sum(right) and row["items"] == 4 and row["contexts"] == 1
    assert row["balanced_accuracy"] == pytest.approx(50 * (sum(right[:3]) / 3 + right[3]))
    assert row["chance"] == 50

    # A cache is drawn alike whichever of its questions comes first: a kill may leave the later ones alone.
    out = tmp_path / "out"
    before = rows_of(out / "results.json")[1]
    (file,) = (f for f in (out / "items").iterdir() if '"compressor": "random"' in f.read_text())
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]))
    again = rows_of(LongQA.of({**settings, "out": str(out)}).run())[1]
    assert again["nll_by_item"] == before["nll_by_item"]
    for changes, message in (
        ({"questions": "trivia"}, "questions='trivia': choose among qasper, squad, longbench-v2"),
        ({"questions": "squad"}, "for squad, give the set's local file"),
        ({"file": "x.json"}, "for qasper, leave it out"),
        ({"options": "both"}, "options='both': choose among letters, texts"),
        ({"max_tokens": 1}, "max_tokens=1: give at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            LongQA.of({**settings, "out": "x", **changes}).check()


def test_the_names():
    kinds = {name: protocol_class(name) for name in ("needle", "ruler", "long-qa")}
    assert kinds == {"needle": Needle, "ruler": Ruler, "long-qa": LongQA}
    assert all(kind.name == name for name, kind in kinds.items())


def kvcat(*words):
    from click.testing import CliRunner

    from kvcat_nemo.cli import main

    return CliRunner().invoke(main, [str(word) for word in words])


def test_commands_run_and_show_their_rows(model_dir, tmp_path):
    shared = ("--compressors", "random", "--keep", "0.5", "--threads", 1)
    out = tmp_path / "needle"
    words = (
        "evaluate",
        "needle",
        f"m={model_dir}",
        "--lengths",
        200,
        "--depths",
        "0.5",
        *shared,
        "--out",
        out,
    )
    plan = kvcat(*words, "--limit", 1, "--dry-run")
    assert plan.exit_code == 0 and "1 questions × 2 caches × 1 models" in plan.output and not out.exists()
    done = kvcat(*words, "--limit", 1, "--question", "known")
    assert done.exit_code == 0 and "question_aware" in done.output and len(rows_of(out / "results.json")) == 4
    file = longbench(tmp_path / "data.json")
    words = ("evaluate", "long-qa", model_dir, "--questions", "longbench-v2", "--file", file, *shared)
    plan = kvcat(
        *words, "--options", "texts", "--max-tokens", 90, "--limit", 2, "--out", tmp_path / "q", "--dry-run"
    )
    assert plan.exit_code == 0 and "2 of 90 to 90 tokens" in plan.output
    words = (
        "evaluate",
        "ruler",
        model_dir,
        "--tasks",
        "niah-single",
        "--lengths",
        300,
        "--samples",
        1,
        *shared,
    )
    plan = kvcat(*words, "--out", tmp_path / "r", "--dry-run")
    assert plan.exit_code == 0 and "niah-single; 1 examples each" in plan.output
    wrong = kvcat(*words, "--text", tmp_path / "nothing.txt", "--out", tmp_path / "r")
    assert wrong.exit_code == 1 and wrong.output.startswith("Error: ") and "Traceback" not in wrong.output
