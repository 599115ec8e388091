"""Names of models and datasets: local folders, hub ids, the cache. A server here stands for the hub; nothing leaves the machine."""

import json
import re
import shutil
from pathlib import Path

import pytest

from kvcat_nemo.models.hub import model_folder, own_name, pinned, recorded_name
from tests.models.hub_server import Hub, run, serve
from tests.models.tiny_models import make

SUFFIXES = [".jsonl", ".jsonl.gz", ".txt", ".parquet"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Models: whole, sharded, pickled, gated, private, of both kinds of files, too large. Datasets: one split, two."""
    root = tmp_path_factory.mktemp("hub")
    hub = Hub()
    whole, _ = make(root, root / "whole")
    (whole / "README.md").write_text("no part of the model")
    (whole / "modeling_own.py").write_text("raise SystemExit('remote code was run')")
    (whole / "tokenizer_own.py").write_text("raise SystemExit('remote code was run')")
    (whole / "pytorch_model.bin").write_bytes(b"pickle")
    (whole / "original").mkdir()
    (whole / "original" / "params.json").write_text("{}")
    sharded, _ = make(root, root / "sharded", shard=60_000)
    pickled = shutil.copytree(whole, root / "pickled")
    (pickled / "model.safetensors").unlink()
    both = shutil.copytree(sharded, root / "both")
    shutil.copy(whole / "model.safetensors", both)
    (root / "empty").mkdir()
    (root / "empty" / "README.md").write_text("nothing")
    large = shutil.copytree(whole, root / "large")
    (large / "model.safetensors").rename(large / "x")
    shutil.copytree(sharded, large, dirs_exist_ok=True)
    for name, folder in (("whole", whole), ("sharded", sharded), ("pickled", pickled), ("both", both)):
        hub.add(f"lab/{name}", folder)
    for name in ("gated", "private", "broken"):
        hub.add(f"lab/{name}", whole)
        getattr(hub, name).add(f"models/lab/{name}")
    hub.add("lab/empty", root / "empty")
    huge = shutil.copytree(whole, root / "huge")
    (huge / "vocab.txt").write_text("a")
    hub.sizes["vocab.txt"] = 10**18
    hub.add("lab/huge", huge)
    for name, files in {
        "texts": ["data/part-0.jsonl", "data/part-1.jsonl"],
        "splits": ["data/train-0.jsonl", "data/test-0.jsonl"],
        "tables": ["a.csv"],
    }.items():
        for file in files:
            path = root / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"text": f"{file} number {i}"}) + "\n" for i in range(20)))
        (root / name / "LICENSE.txt").write_text("free")
        hub.add(f"lab/{name}", root / name, "datasets")
    with serve(hub) as address:
        hub.address = address
        yield hub


def test_what_is_fetched_and_what_is_refused(hub, tmp_path):
    (tmp_path / "lab" / "local").mkdir(parents=True)
    commit = hub.commit("models/lab/whole")
    expected = {
        "lab/whole": "models--lab--whole/snapshots/" + commit,
        "lab/whole@v1": "models--lab--whole/snapshots/" + commit,
        f"lab/whole@{commit}": "models--lab--whole/snapshots/" + commit,
        "lab/sharded": "models--lab--sharded/snapshots/",
        "lab/local": "lab/local",
        "lab/whole@v9": "ERROR .* has no revision 'v9'; name a branch, a tag or a commit",
        "lab/none": "ERROR model 'lab/none': no such folder here, and the hub shows no model 'lab/none'; correct",
        "lab/gated": "ERROR .*gated: .*HF_TOKEN",
        "lab/private": "ERROR .*shows no model.*HF_TOKEN",
        "lab/pickled": r"ERROR .*no model.safetensors \(it has pytorch_model.bin\); pickled",
        "lab/both": "ERROR .*holds both model.safetensors and model.safetensors.index.json",
        "lab/empty": "ERROR .*holds no config.json",
        "lab/huge": "ERROR .*'lab/huge' needs 1000000000.0 GB more, and the disk of .* has .* GB left; make room",
        "lab/broken": "ERROR .*the hub could not be asked .*500.*does not hold the model",
        "lab/a..b": "ERROR .*hub id",
        "./lab/whole": "ERROR model './lab/whole': no such folder; give a Hugging Face model folder, or a hub id",
        "nowhere": "ERROR model 'nowhere': no such folder; give",
        "a/b/c": "ERROR .*no such folder; give",
    }  # fmt: skip
    hub.asked.clear()
    found = run([["model", name] for name in expected], hub.address, tmp_path / "cache", tmp_path)
    for (name, wanted), got in zip(expected.items(), found, strict=True):
        assert re.search(wanted, got, re.S), f"{name}: {got}"
    # No request for what is local or no hub id; of the whole model its parts alone.
    assert not [line for line in hub.asked if "local" in line or "nowhere" in line]
    fetched = {p.name for p in Path(found[0]).rglob("*") if p.is_file()}
    assert "model.safetensors" in fetched and "tokenizer.json" in fetched
    assert not fetched & {
        "README.md",
        "modeling_own.py",
        "tokenizer_own.py",
        "pytorch_model.bin",
        "params.json",
    }
    assert len(list(Path(found[3]).glob("model-*.safetensors"))) > 2

    # With a token, the gated and the private one too; HF_TOKEN alone gives it.
    calls = [["model", "lab/gated"], ["model", "lab/private", {"weights": False}]]
    gated, private = run(calls, hub.address, tmp_path / "cache", tmp_path, HF_TOKEN="good")
    assert (Path(gated) / "model.safetensors").is_file()
    assert (Path(private) / "tokenizer.json").is_file() and not (Path(private) / "model.safetensors").exists()

    # Offline: what is in the cache, whole, and without a single request. So too where nobody answers.
    hub.asked.clear()
    calls = [
        ["model", n] for n in ("lab/whole", "lab/whole@v1", f"lab/whole@{commit}", "lab/pickled", "lab/never")
    ]
    calls += [["model", "lab/private"], ["model", "lab/private", {"weights": False}]]
    for offline, endpoint in (({"HF_HUB_OFFLINE": "1"}, hub.address), ({}, "http://127.0.0.1:9")):
        again = run(calls, endpoint, tmp_path / "cache", tmp_path, **offline)
        why = "HF_HUB_OFFLINE is set" if offline else "the hub could not be asked"
        assert again[:3] == [found[0]] * 3
        assert all(line.startswith("ERROR") and why in line for line in again[3:5]), again
        assert "the cache holds only a part of it" in again[5] and again[6] == private
    assert hub.asked == []


def test_datasets(hub, tmp_path):
    expected = {
        "lab/texts": ["part-0.jsonl", "part-1.jsonl"],
        "hf://datasets/lab/texts": ["part-0.jsonl", "part-1.jsonl"],
        "hf://datasets/lab/texts/data/*-1.jsonl": ["part-1.jsonl"],
        "hf://datasets/lab/splits@v1/*train*": ["train-0.jsonl"],
        "hf://datasets/lab/splits/LICENSE.txt": ["LICENSE.txt"],
        "lab/splits": r"ERROR .*several splits \(test, train\); choose among them: hf://datasets/lab/splits/\*train\*",
        "lab/tables": "ERROR .*no .jsonl, .jsonl.gz, .parquet files; it holds LICENSE.txt, a.csv",
        "lab/none": "ERROR source 'lab/none': no such file or folder here, and the hub shows no dataset 'lab/none'",
        "hf://models/lab/whole": "ERROR .*no hub dataset; write hf://datasets/owner/name@revision/PATTERN",
    }  # fmt: skip
    calls = [["dataset", name, {"suffixes": SUFFIXES}] for name in expected]
    found = run(calls, hub.address, tmp_path / "cache", tmp_path)
    for (name, wanted), got in zip(expected.items(), found, strict=True):
        if isinstance(wanted, str):
            assert isinstance(got, str) and re.search(wanted, got, re.S), f"{name}: {got}"
        else:
            assert [Path(file).name for file in got] == wanted
    assert pinned(found[0][0]) == f"lab/texts@{hub.commit('datasets/lab/texts')}"
    (again,) = run(calls[:1], hub.address, tmp_path / "cache", tmp_path, HF_HUB_OFFLINE="1")
    assert again == found[0]


def test_a_document_is_compressed_and_asked_by_a_hub_id(hub, tmp_path):
    (tmp_path / "paper.txt").write_text("The cache of a long text grows. " * 4)
    window = {"source": "own", "doc": "a", "start": 0, "ids": [4 + i % 250 for i in range(32)]}
    (tmp_path / "windows.json").write_text(json.dumps([window]))
    ask = ["kvcat", "generate", "lab/whole", "--cache", "c.safetensors", "--prompt", "It", "--tokens", "3"]
    calls = [
        ["kvcat", "compress", "lab/whole", "--text", "paper.txt", "--keep", "0.5", "--out", "c.safetensors"],
        ask,
        ["kvcat", "model", "generate", "lab/sharded", "--tokens", "2"],
        ["kvcat", "compress", "lab/none", "--text", "paper.txt", "--keep", "0.5", "--out", "d.safetensors"],
        ["kvcat", "evaluate", "continuation", "base=lab/whole", "lab/sharded", "--windows", "windows.json",
         "--compressors", "recent", "--keep", "0.5", "--prefix", "24", "--continuation", "8", "--out", "results"],
    ]  # fmt: skip
    done = run(calls, hub.address, tmp_path / "cache", tmp_path)
    assert [code for code, _ in done] == [0, 0, 0, 1, 0], done
    assert "no such folder here, and the hub shows no model" in done[3][1] and "Traceback" not in done[3][1]
    models = json.loads((tmp_path / "results" / "run.json").read_text())["facts"]["models"]
    assert models["base"]["hub"] == f"lab/whole@{hub.commit('models/lab/whole')}" and "sharded" in models
    # The same model offline, and as a plain folder: its fingerprint does not depend on where it came from.
    hub.asked.clear()
    plain = [*ask[:2], str(hub.folders["models/lab/whole"]), *ask[3:]]
    resumed = [*calls[4][:3], f"base={hub.folders['models/lab/whole']}", *calls[4][4:]]
    again = run([ask, plain, resumed], hub.address, tmp_path / "cache", tmp_path, HF_HUB_OFFLINE="1")
    assert again[0][0] == 0 and again[0][1].splitlines()[-1] == done[1][1].splitlines()[-1]
    assert again[2][0] == 0, again[2]  # results are gone on with, wherever the model is had from
    assert hub.asked == []


@pytest.mark.parametrize(
    ("path", "name", "recorded"),
    [
        ("/c/hub/models--Qwen--Qwen2.5-0.5B/snapshots/" + "a" * 40, "Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B@" + "a" * 40),
        ("/c/hub/datasets--o--n/snapshots/" + "0" * 40 + "/data/x.parquet", "n", "o/n@" + "0" * 40),
        ("/models/mine", "mine", "/models/mine"),
        ("/models/models--a--b/other/" + "a" * 40, "a" * 40, "/models/models--a--b/other/" + "a" * 40),
    ],
)  # fmt: skip
def test_what_manifests_call_a_path(path, name, recorded):
    assert own_name(Path(path)) == name and recorded_name(path) == recorded


def test_a_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("Qwen/Qwen2.5-0.5B").mkdir(parents=True)
    assert model_folder("Qwen/Qwen2.5-0.5B") == Path("Qwen/Qwen2.5-0.5B")
    Path("a").mkdir()
    Path("a/file").touch()  # a file of that name: no hub id either
    with pytest.raises(ValueError, match="'a/file': no such folder; give"):
        model_folder("a/file")
