"""A hub model imported, and a hub dataset built with a hub tokenizer; then all of it again without the hub."""

import json

import pytest

from tests.models.hub_server import Hub, run, serve
from tests.models.tiny_models import make


@pytest.mark.slow
def test_build_and_import_record_the_commit(tmp_path):
    hub = Hub()
    model, _ = make(tmp_path / "made", tmp_path / "model")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(20)))
    source = f"lab/model@{hub.add('lab/model', model)}"
    dataset = f"lab/texts@{hub.add('lab/texts', texts, 'datasets')}"
    calls = [
        ["kvcat", "data", "build", "lab/texts", "--tokenizer", "lab/model", "--out", "built"],
        ["kvcat", "data", "inspect", "built/train"],
        ["kvcat", "convert", "import", "lab/model", "imported"],
        ["kvcat", "convert", "import", "lab/none", "other"],
    ]
    with serve(hub) as address:
        done = run(calls, address, tmp_path / "cache", tmp_path)
    assert [code for code, _ in done] == [0, 0, 0, 1], done
    manifest = json.loads((tmp_path / "built" / "manifest.json").read_text())
    assert manifest["tokenizer"]["path"] == source and manifest["source"]["revisions"] == [dataset]
    assert manifest["source"]["documents"] == 20
    card = json.loads((tmp_path / "imported" / "kvcat_checkpoint.json").read_text())
    assert card["source"]["hub"] == source and card["source"]["name"] == "model"
    assert not (tmp_path / "other").exists()
    # Offline, and by the names that the manifests hold: the same inputs, so the dataset is re-used.
    calls = [["kvcat", "data", "build", dataset, "--tokenizer", source, "--out", "built"], calls[1]]
    again = run(calls, "http://127.0.0.1:9", tmp_path / "cache", tmp_path, HF_HUB_OFFLINE="1")
    assert [code for code, _ in again] == [0, 0], again
    assert "re-used" in again[0][1] and done[1][1] in again[1][1]
