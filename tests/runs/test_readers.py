"""Is a checkpoint complete and whole? Every reader gives the same answer, whatever is wrong."""

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.conversion.exporting import export_hf
from kvcat_nemo.conversion.verify import verify
from kvcat_nemo.runs import integrity
from kvcat_nemo.runs.checkpoints import complete, find_checkpoint
from kvcat_nemo.runs.layout import MANIFEST
from kvcat_nemo.runs.pickles import check_index
from kvcat_nemo.watch.state import RunWatcher
from tests.runs import damages


def _examine(folder, made, out):
    if not (found := integrity.examine(folder)).whole:
        raise ValueError(found.why_not)


def _find(folder, made, out):
    find_checkpoint(folder).require_whole()


def _export(folder, made, out):
    export_hf(folder, out, base=made / "model")


def _export_command(folder, made, out):
    result = CliRunner().invoke(main, ["export", str(folder), str(out), "--base", str(made / "model")])
    if result.exit_code:
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
        raise ValueError(result.output)


def _verify(folder, made, out):
    # Spoilt as it is, it must not come to the processes that load it.
    verify(made / "model", folder, timeout=0.0)


def _doctor(folder, made, out):
    result = CliRunner().invoke(
        main, ["train", "doctor", "--dir", str(out.parent), "--checkpoint", str(folder)]
    )
    lines = [line for line in result.output.splitlines() if "checkpoint" in line]
    if not any(line.split()[0] == "ok" for line in lines):
        raise ValueError("\n".join(lines))


ROOT = Path(__file__).parents[2]
READERS = {
    "examine": _examine,
    "find": _find,
    "export": _export,
    "kvcat export": _export_command,
    "verify": _verify,
    "doctor": _doctor,
}
FOLDERS = {"imported": "imported", "checkpoint": "run/checkpoints/step=4"}


def _refuses(read, folder, made, out):
    with pytest.raises(ValueError) as caught:
        read(folder, made, out)
    assert not out.exists() and not [p for p in out.parent.iterdir() if ".partial" in p.name]
    return str(caught.value)


@pytest.fixture
def out(tmp_path):
    (tmp_path / "to").mkdir()
    return tmp_path / "to" / "out"


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("reader", [r for r in READERS if r != "verify"])
def test_a_whole_one_is_taken(reader, kind, made, out):
    READERS[reader](made / FOLDERS[kind], made, out)


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("damage", damages.ONE_OF_EACH)
def test_every_file_counts(damage, kind, copy, made, tmp_path, out):
    """One file after the other is spoilt; every reader names it."""
    import shutil

    clean = made / FOLDERS[kind]
    acts = damages.ONE_OF_EACH[damage](clean)
    assert len(acts) == len(damages.files(clean)) >= 5
    for number, act in enumerate(acts):
        name = damages.files(clean)[number].relative_to(clean).as_posix()
        folder = shutil.copytree(clean, tmp_path / str(number) / "step=4")
        act(folder)
        for reader in ("examine", "find", "export", "verify"):
            assert name in _refuses(READERS[reader], folder, made, out), (reader, name)
        if number < 2:
            for reader in ("kvcat export", "doctor"):
                assert name in _refuses(READERS[reader], folder, made, out), (reader, name)


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("damage", damages.WHOLE)
def test_every_reader_refuses(damage, kind, copy, made, out):
    folder = copy(FOLDERS[kind])
    moved = damages.WHOLE[damage](folder)
    folder = moved if damage == "set aside" else folder
    for reader, read in READERS.items():
        if (reader, damage, kind) == ("doctor", "no manifest", "imported"):
            continue  # an older version's: a note, see below
        message = _refuses(read, folder, made, out)
        assert "step=4" in message or "imported" in message, (reader, message)


def test_a_foreign_manifest_is_refused_by_every_reader(copy, made, out):
    import shutil

    folder = copy("imported")
    shutil.copyfile(made / "other" / MANIFEST, folder / MANIFEST)
    for read in READERS.values():
        message = _refuses(read, folder, made, out)
        assert "its contents changed" in message or "saved with" in message


LISTING = {"watch": True, "launch scripts": True, "retention": True, "launch scripts without Python": False}
"""Readers that list a run's checkpoints, and whether they compare sizes; none reads hashes, which takes minutes."""
SEEN_BY_ALL = {"no manifest", "being written", "set aside"}


def _listed(reader, checkpoints):
    if reader == "watch":
        newest = RunWatcher(checkpoints.parent).snapshot().checkpoint
        return [newest] if newest else []
    if reader == "retention":
        return [one.path.name for one in complete(checkpoints)]
    command = [sys.executable, "-m", "kvcat_nemo.runs", str(checkpoints)]
    if reader.endswith("without Python"):
        shell = "source launch/common.sh; python3() { return 127; }; complete_checkpoints"
        command = ["bash", "-c", shell]
    environment = os.environ | {"KVCAT_RUN_DIR": str(checkpoints.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("damage", [*damages.WHOLE, *damages.ONE_OF_EACH])
def test_watch_retention_and_the_launch_scripts_count_what_a_resume_would_take(damage, copy, made):
    """Of one damage in one file of a checkpoint: names, sizes and the manifest tell, but for a flipped bit."""
    folder = copy("run/checkpoints/step=4")
    checkpoints = folder.parent
    for reader in LISTING:
        assert _listed(reader, checkpoints) == ["step=4"], reader
    act = damages.WHOLE.get(damage) or damages.ONE_OF_EACH[damage](folder)[0]
    act(folder)
    for reader, sizes in LISTING.items():
        counted = damage == "flipped" or not (sizes or damage in SEEN_BY_ALL)
        assert _listed(reader, checkpoints) == (["step=4"] if counted else []), reader


def test_forty_flipped_bits_and_none_is_exported(made, copy, out):
    """Anywhere in an imported folder, the manifest included."""
    folder = copy("imported")
    everything = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    places = [(path, at) for path in everything for at in range(path.stat().st_size)]
    random.seed(7)
    # Half of them anywhere, half spread evenly over the files, of which the tensors' is by far the largest.
    chosen = random.sample(places, 20)
    for number in range(20):
        path = everything[number % len(everything)]
        chosen.append((path, random.randrange(path.stat().st_size)))
    exported = []
    for path, at in chosen:
        bit = random.randrange(8)
        damages.flip(path, at, bit)
        try:
            export_hf(folder, out)
            exported.append((path.name, at, bit))
        except ValueError:
            pass
        damages.flip(path, at, bit)
    assert exported == []
    export_hf(folder, out)  # and with every bit back in its place it is


# --- what has no manifest, and what is accepted by name ---


def test_ones_without_a_manifest_are_taken_by_name_alone(copy, made, out):
    for kind in FOLDERS.values():
        folder = copy(kind)
        (folder / MANIFEST).unlink()
        message = _refuses(_export, folder, made, out.with_name(f"no-{folder.name}"))
        assert "--unverified" in message and MANIFEST in message
        export_hf(folder, out, base=made / "model", unverified=True, force=True)
    command = ["convert", "export", str(folder), str(out), "--hf-config", str(made / "model"), "--force"]
    assert CliRunner().invoke(main, command).exit_code == 1
    assert CliRunner().invoke(main, [*command, "--unverified"]).exit_code == 0


def test_unverified_excuses_no_damage_of_one_with_a_manifest(copy, made, out):
    folder = copy("imported")
    damages.flip(folder / "weights" / "__0_0.distcp")
    with pytest.raises(ValueError, match="__0_0.distcp: its contents changed"):
        export_hf(folder, out, unverified=True)
    folder.with_name("imported-unfinished").touch()
    with pytest.raises(ValueError, match="did not end|unfinished"):
        export_hf(folder, out, unverified=True)


def test_an_older_import_is_a_note_for_the_doctor_and_refused_as_a_base(copy, made, out):
    folder = copy("imported")
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match="an older kvcat imported it"):
        export_hf(made / "run", out, base=folder)
    export_hf(made / "run", out, base=folder, unverified=True)
    assert (
        "older kvcat"
        in CliRunner().invoke(main, ["train", "doctor", "--fast", "--checkpoint", str(folder)]).output
    )


def test_the_bases_config_is_compared_too(copy, made, out):
    folder = copy("imported")
    damages.flip(folder / "hf" / "config.json", 30)
    with pytest.raises(ValueError, match="hf/config.json: its contents changed"):
        export_hf(made / "run", out, base=folder)


def test_what_older_runs_wrote_still_opens(copy, made, out):
    import json

    folder = copy("run/checkpoints/step=4")
    value = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({k: value[k] for k in ("step", "files", "facts")}))
    export_hf(folder, out, base=made / "model")


def test_the_newest_of_a_run(copy, made, out):
    import shutil

    run = copy("run/checkpoints/step=4").parents[1]
    newer = shutil.copytree(run / "checkpoints" / "step=4", run / "checkpoints" / "step=8")
    damages.edit_manifest(lambda v: None)(newer)
    (newer / MANIFEST).unlink()
    from kvcat_nemo.runs.checkpoint_manifest import hash_and_write_manifest

    hash_and_write_manifest(newer, 8)
    assert find_checkpoint(run).folder == newer
    (run / "checkpoints" / "last").symlink_to("step=8")
    assert find_checkpoint(run / "checkpoints" / "last").folder == newer
    # A damaged one is said, not passed over: the user asked for the newest.
    os.truncate(newer / "weights" / "__0_0.distcp", 5)
    with pytest.raises(ValueError, match="step=8.*truncated.*step=4: name it"):
        find_checkpoint(run)
    # One whose save never ended is passed over, as a resume does.
    (newer / MANIFEST).unlink()
    assert find_checkpoint(run).folder.name == "step=4"


# --- indexes ---


@pytest.mark.parametrize(
    "name", ["{secret}", "../../secret.distcp", "weights/../../../secret.distcp", "sub/../../x"]
)
@pytest.mark.parametrize("kind", FOLDERS)
def test_an_index_that_names_files_outside(name, kind, copy, made, out):
    folder = copy(FOLDERS[kind])
    damages.outside(name)(folder)
    for reader in ("export", "kvcat export", "verify", "doctor"):
        assert "outside of the folder" in _refuses(READERS[reader], folder, made, out), reader
    with pytest.raises(ValueError, match="outside of the folder"):
        check_index(folder / "weights")


def test_links_out_of_a_checkpoint_without_a_manifest(copy, made, out):
    folder = copy("run/checkpoints/step=4")
    damages.linked_out(folder)
    with pytest.raises(ValueError, match="is a link to .*elsewhere"):
        export_hf(folder, out, base=made / "model", unverified=True)


@pytest.mark.parametrize("how", damages.malicious("x"))
@pytest.mark.parametrize("listed", [True, False])
def test_no_reader_runs_what_an_index_brings(how, listed, copy, made, out, tmp_path):
    told = tmp_path / "it-ran"
    data = damages.malicious(told)[how]
    folder = copy("imported")
    (folder / "weights" / ".metadata").write_bytes(data)
    damages.with_new_manifest(folder)
    accept = {} if listed else {"unverified": True}
    if not listed:
        (folder / MANIFEST).unlink()
    for act in (
        lambda: export_hf(folder, out, **accept),
        lambda: verify(made / "model", folder, timeout=0.0, **accept),
        lambda: check_index(folder / "weights"),
        lambda: listed and _doctor(folder, made, out) or check_index(folder / "weights"),
    ):
        with pytest.raises(ValueError, match="is not read: it asks for|cannot be read"):
            act()
    assert not told.exists() and not out.exists()
    if how in ("plain", "protocol 0", "inst opcode", "eval"):  # or these tests could not fail
        pickle.loads(data)
        assert told.exists()


def test_a_payload_within_a_real_index(copy, made, out, tmp_path):
    from kvcat_nemo.runs.pickles import read_index

    folder, told = copy("imported"), tmp_path / "it-ran"
    metadata = read_index(folder / "weights")
    metadata.planner_data = {"key": damages.Payload(told)}
    (folder / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))
    damages.with_new_manifest(folder)
    for read in (_export, _verify, _doctor):
        assert "it asks for posix.system" in _refuses(read, folder, made, out)
    assert not told.exists()


@pytest.mark.parametrize("data", [b"", b"\x80", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps(None)])
def test_what_is_no_index(data, copy, made, out):
    folder = copy("imported")
    (folder / "weights" / ".metadata").write_bytes(data)
    damages.with_new_manifest(folder)
    for read in (_export, _verify):
        assert ".metadata" in _refuses(read, folder, made, out)


# --- vocabulary ---


@pytest.mark.parametrize("kind", ["imported", "run"])
def test_tokens_are_never_cut_as_padding(kind, made, tmp_path, out):
    from tests.runs.run_models import write_model

    base = write_model(tmp_path / "smaller", vocab_size=32)
    with pytest.raises(ValueError, match="vocab_size = 32 in the base's config.json.*a vocabulary of 40"):
        export_hf(made / kind, out, base=base)
    with pytest.raises(ValueError, match="vocabulary of 40|tensors|has shape"):
        verify(base, made / kind, timeout=0.0)


def test_an_unrecorded_vocabulary(copy, made, tmp_path, out, capsys):
    from tests.runs.run_models import write_model

    folder = copy("run/checkpoints/step=4")
    (folder / MANIFEST).unlink()
    base = write_model(tmp_path / "smaller", vocab_size=37)
    with pytest.raises(ValueError, match="the last 3 are not zero: Megatron would not pad 37 to 40"):
        export_hf(folder, out, base=base, unverified=True)
    # The run's own configuration tells.
    (folder.parents[1] / "kvcat").mkdir()
    (folder.parents[1] / "kvcat" / "config.json").write_text(
        '{"model": {"vocab_size": 40, "true_vocab_size": 37}}'
    )
    export_hf(folder, out, base=base, unverified=True)


@pytest.mark.parametrize(
    ("vocab", "rows", "tp", "zero", "known", "verdict"),
    [
        (131, 132, 2, False, None, "note"),  # this project's own padding
        (50257, 50304, 1, False, None, "note"),  # Megatron's default, 128
        (50257, 50688, 8, False, None, "refused"),  # 128 × 8 would be 51,200
        (50257, 51200, 8, False, None, "note"),
        (100, 120, 1, False, None, "refused"),
        (100, 120, 1, True, None, ""),
        (100, 100, 1, False, None, ""),
        (100, 128, 1, False, 100, ""),
        (100, 128, 1, True, 128, "refused"),  # zero or not, they are tokens
    ],
)
def test_what_counts_as_padding(vocab, rows, tp, zero, known, verdict, tmp_path):
    from kvcat_nemo.runs.vocabulary import check_cut

    def ask():
        return check_cut(
            vocab_size=vocab, rows=rows, known=known, tensor_parallel=tp, zero=zero, where=tmp_path
        )

    if verdict == "refused":
        with pytest.raises(ValueError, match=f"vocab_size = {vocab}"):
            ask()
    else:
        assert ask()[:4] == verdict


@pytest.mark.parametrize("listed", [True, False])
def test_what_is_not_sharded_runs_nothing(listed, copy, made, out, tmp_path, monkeypatch):
    """common.pt, which Megatron reads: even where the environment allows everything."""
    import torch

    from kvcat_nemo.runs.pickles import check_common

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, told = copy("imported"), tmp_path / "it-ran"
    path = folder / "weights" / "common.pt"
    check_common(folder / "weights")
    torch.save({"args": damages.Payload(told)}, path)
    damages.with_new_manifest(folder)
    if not listed:
        (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match="common.pt is not read: it asks for posix.system"):
        verify(made / "model", folder, timeout=0.0, unverified=not listed)
    export_hf(folder, out, unverified=not listed)  # does not read it
    for data in (b"", b"PK\x03\x04", pickle.dumps(damages.Payload(told))):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="common.pt is not read"):
            check_common(folder / "weights")
    path.unlink()
    with pytest.raises(ValueError, match="common.pt"):
        check_common(folder / "weights")
    assert not told.exists()
    torch.load(_saved(told, tmp_path))  # or this test could not fail
    assert told.exists()


def test_an_object_shard_of_a_foreign_checkpoint_runs_nothing(tmp_path, monkeypatch):
    """torch's planner reads object shards with weights_only=False, whatever the default."""
    import io

    import torch
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

    from kvcat_nemo.runs.pickles import plain_values_only

    told = tmp_path / "told"
    item = ReadItem(
        LoadItemType.BYTE_IO,
        MetadataIndex("x"),
        torch.Size([0]),
        MetadataIndex("x"),
        torch.Size([0]),
        torch.Size([0]),
    )

    def load(path):
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.state_dict = {}
        planner.load_bytes(item, io.BytesIO(path.read_bytes()))
        return planner.state_dict["x"]

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with plain_values_only():
        with pytest.raises(Exception, match="Weights only load failed|weights_only"):
            load(_saved(told, tmp_path))
        torch.save({"extra": io.BytesIO(b"state"), "step": torch.tensor(3)}, tmp_path / "fine.pt")
        assert load(tmp_path / "fine.pt")["extra"].read() == b"state"
    assert not told.exists() and os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    load(_saved(told, tmp_path))  # or this test could not fail
    assert told.exists()


def _saved(told, tmp_path):
    import torch

    torch.save({"args": damages.Payload(told)}, tmp_path / "free.pt")
    return tmp_path / "free.pt"
