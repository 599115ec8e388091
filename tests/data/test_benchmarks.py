import json
import tarfile

import pytest

from kvcat_nemo.data.benchmarks import BENCHMARKS, load_benchmark
from kvcat_nemo.data.questions import longbench_v2, squad_articles

ITEMS = {
    "hellaswag": {"activity_label": "A", "ctx_a": "He", "ctx_b": "", "endings": list("abcd"), "label": "3"},
    "winogrande": {"sentence": "A saw _ go.", "option1": "B", "option2": "C", "answer": "2"},
    "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
    "openbookqa": {
        "question_stem": "q",
        "choices": {"text": ["x", "y"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "arc_easy": {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
    "arc_challenge": {
        "question": "q",
        "choices": {"text": ["x", "y"], "label": ["A", "B"]},
        "answerKey": "A",
    },
}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_items_in_the_published_fields_are_read(tmp_path, name):
    assert load_benchmark(name, write(tmp_path / "b.jsonl", [ITEMS[name]] * 2)) == [ITEMS[name]] * 2


@pytest.mark.parametrize("name", BENCHMARKS)
def test_any_missing_field_is_named_with_its_record(tmp_path, name):
    for field in ITEMS[name]:
        broken = {key: value for key, value in ITEMS[name].items() if key != field}
        with pytest.raises(ValueError, match=rf"b.jsonl, record 2: not a {name} item: .*{field}"):
            load_benchmark(name, write(tmp_path / "b.jsonl", [ITEMS[name], broken]))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("hellaswag", {"label": ""}, "'label' is '', must be one of '0', '1', '2', '3'"),
        ("hellaswag", {"endings": ["a"]}, "'endings' must be a list of 4 texts"),
        ("winogrande", {"sentence": "no gap"}, "must hold one '_'"),
        ("piqa", {"label": 2}, "'label' is 2, must be one of 0, 1"),
        ("piqa", {"label": True}, "'label' is True"),
        ("openbookqa", {"answerKey": "C"}, "'answerKey' is 'C', must be one of 'A', 'B'"),
        ("arc_easy", {"choices": {"text": ["x"], "label": ["1", "2"]}}, "as many texts as labels"),
        ("arc_easy", {"question": " "}, "must be a text that is not empty"),
    ],
)
def test_unusable_items_are_refused(tmp_path, name, change, message):
    with pytest.raises(ValueError, match=message):
        load_benchmark(name, write(tmp_path / "b.jsonl", [{**ITEMS[name], **change}]))


def test_files_that_are_no_json_lines(tmp_path):
    file = tmp_path / "b.jsonl"
    with pytest.raises(ValueError, match="no such file; `kvcat data fetch piqa"):
        load_benchmark("piqa", file)
    for content, message in (
        (b"\n", "holds no record"),
        (b"{}\n{", "line 2: not JSON"),
        (b"\xff\n", "line 1: not JSON"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_benchmark("piqa", file)
    file.write_bytes(b"[]\n")
    with pytest.raises(ValueError, match="line 1: a JSON list"):
        load_benchmark("piqa", file)
    with pytest.raises(ValueError, match="no benchmark 'mmlu'; known: hellaswag"):
        load_benchmark("mmlu", file)


def squad(**changes):
    qas = [
        {"id": "q1", "question": "Who?", "answers": [{"text": "He"}, {"text": "he"}, {"text": "He"}]},
        {"id": "q2", "question": "Nobody?", "answers": []},
    ]
    article = {"title": "T", "paragraphs": [{"context": "A.", "qas": qas}, {"context": "B.", "qas": []}]}
    return {"data": [{**article, **changes}]}


def test_squad_articles_are_whole_from_either_file(tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps(squad()))
    with tarfile.open(tmp_path / "bigbench-1.0.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "dev.json", "bigbench-1.0.0/tasks/squad_shifts/squaddev_v1.1.json")
    documents = squad_articles(tmp_path / "dev.json")
    assert documents == squad_articles(tmp_path / "bigbench-1.0.0.tar.gz")
    assert documents[0].text == "A.\n\nB." and [q.answers for q in documents[0].questions] == [("He", "he")]


def test_what_is_no_squad_is_refused(tmp_path):
    file = tmp_path / "dev.json"
    with pytest.raises(ValueError, match="no such file; give SQuAD's dev-v1.1.json or .* bigbench"):
        squad_articles(file)
    for content in ("[]", "{", json.dumps(squad(paragraphs=[{"qas": []}]))):
        file.write_text(content)
        with pytest.raises(ValueError, match="not a SQuAD 1.1 file"):
            squad_articles(file)
    (tmp_path / "x.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="damaged archive"):
        squad_articles(tmp_path / "x.tar.gz")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(file, "other.json")
    with pytest.raises(ValueError, match="no squaddev_v1.1.json inside"):
        squad_articles(tmp_path / "x.tar.gz")


LONGBENCH = {
    **{"_id": "66f3", "domain": "Single-Document QA", "sub_domain": "Academic", "difficulty": "easy"},
    **{"length": "short", "question": "Which?", "choice_A": "a", "choice_B": "b", "choice_C": "c"},
    **{"choice_D": "d", "answer": "C", "context": "A long text."},
}


def test_longbench_as_a_list_and_as_lines(tmp_path):
    two = [LONGBENCH, {**LONGBENCH, "_id": "77aa"}]
    (tmp_path / "data.json").write_text(json.dumps(two))
    write(tmp_path / "data.jsonl", two)
    documents = longbench_v2(tmp_path / "data.json")
    assert documents == longbench_v2(tmp_path / "data.jsonl") and len(documents) == 2
    (question,) = documents[0].questions
    assert (question.options, question.right, question.facts["difficulty"]) == (
        ("a", "b", "c", "d"),
        2,
        "easy",
    )


def test_what_is_no_longbench_is_refused(tmp_path):
    file = tmp_path / "data.json"
    with pytest.raises(
        ValueError, match="no such file; LongBench v2 is a JSON list of objects with _id, domain"
    ):
        longbench_v2(file)
    for field in LONGBENCH:
        file.write_text(json.dumps([LONGBENCH, {k: v for k, v in LONGBENCH.items() if k != field}]))
        with pytest.raises(ValueError, match=rf"record 2: no field '{field}'; fields present: "):
            longbench_v2(file)
    for content, message in (
        ("[]", "at least one record"),
        ("[[]]", "record 1: a JSON list"),
        ("{", "not JSON"),
        (json.dumps([LONGBENCH, LONGBENCH]), "1 ids stand there more than once, such as '66f3'"),
        (json.dumps([{**LONGBENCH, "answer": "E"}]), "'answer' is 'E', must be A, B, C or D"),
        (json.dumps([{**LONGBENCH, "context": " "}]), "'context' must be a text"),
        (json.dumps([{**LONGBENCH, "choice_A": 3}]), "'choice_A' must be a text, is 3"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            longbench_v2(file)
