"""What training reads: its own checkpoints when it resumes, and the base that it starts from."""

import shutil
import sys
from pathlib import Path

import pytest

from kvcat_nemo.runs.layout import MANIFEST
from tests.runs import damages

pytestmark = pytest.mark.nemo

FOLDERS = {"base": "imported", "checkpoint": "run/checkpoints/step=4"}


def _resume(folder):
    from kvcat_nemo.nemo.checkpoint_check import first_whole

    first_whole([folder], hashes=True)


def _base(folder):
    from kvcat_nemo.nemo.base_model import require_base
    from kvcat_nemo.nemo.checkpoint_check import whole_base

    require_base(folder, unverified=False)
    whole_base(folder, hashes=True, unverified=False)


READERS = {"base": _base, "checkpoint": _resume}


@pytest.mark.parametrize("kind", READERS)
def test_whole(kind, made):
    READERS[kind](made / FOLDERS[kind])


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("damage", [*damages.WHOLE, *damages.ONE_OF_EACH])
def test_refused(damage, kind, made, tmp_path):
    clean = made / FOLDERS[kind]
    acts = damages.ONE_OF_EACH[damage](clean) if damage in damages.ONE_OF_EACH else [damages.WHOLE[damage]]
    for number, act in enumerate(acts):
        folder = shutil.copytree(clean, tmp_path / str(number) / "step=4")
        moved = act(folder)
        with pytest.raises(ValueError, match="step=4"):
            READERS[kind](moved if damage == "set aside" else folder)


def test_one_without_a_manifest_is_taken_by_name_alone(copy):
    from kvcat_nemo.nemo.base_model import require_base
    from kvcat_nemo.nemo.checkpoint_check import first_whole
    from kvcat_nemo.nemo.resume import KVCatResume

    for kind in FOLDERS.values():
        folder = copy(kind)
        (folder / MANIFEST).unlink()
        with pytest.raises(ValueError, match="resume.unverified=True"):
            require_base(folder, unverified=False)
        require_base(folder, unverified=True)
        with pytest.raises(ValueError, match="resume.unverified=True"):
            KVCatResume(resume_from_path=str(folder))._find()
        assert KVCatResume(resume_from_path=str(folder), unverified=True)._find() == [folder]
        assert first_whole([folder], hashes=True, unverified=True) == folder


def test_the_index_is_looked_at_before_megatron_unpickles_it(copy, made, tmp_path, monkeypatch):
    """A malicious index with a manifest of its own: resume and start from a base end before torch reads it."""
    from types import SimpleNamespace

    import torch
    from nemo import lightning as nl

    from kvcat_nemo.nemo import strategy as module

    told, clean = tmp_path / "it-ran", made / "imported" / "weights" / ".metadata"
    monkeypatch.setattr(nl.MegatronStrategy, "load_checkpoint", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setattr(module, "check_base", lambda *a: None)
    for kind in FOLDERS.values():
        folder = copy(kind)
        (folder / "weights" / ".metadata").write_bytes(damages.malicious(told)["plain"])
        damages.with_new_manifest(folder)
        strategy = object.__new__(module.KVCatStrategy)
        strategy.resume_from([folder], verify_hashes=True)
        with pytest.raises(ValueError, match="it asks for posix.system"):
            strategy.load_checkpoint(folder)
        strategy.restore_config = SimpleNamespace(load_optim_state=False, path=str(folder))
        strategy._lightning_module = SimpleNamespace(config=None)
        with pytest.raises(ValueError, match="it asks for posix.system"):
            strategy.selective_restore()
        shutil.copyfile(clean, folder / "weights" / ".metadata")
        torch.save({"args": damages.Payload(told)}, folder / "weights" / "common.pt")
        damages.with_new_manifest(folder)
        for load in (lambda s=strategy, f=folder: s.load_checkpoint(f), strategy.selective_restore):
            with pytest.raises(ValueError, match="common.pt is not read: it asks for posix.system"):
                load()
    assert not told.exists()


def test_megatrons_own_indexes_pass(tmp_path):
    """Whatever Megatron and this project's training write must be read: a rank saves model and optimizer."""
    import subprocess

    program = ("-m", "tests.runs.megatron_save")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *program, str(tmp_path / "weights")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    from kvcat_nemo.runs.pickles import check_common, check_index, read_index

    check_index(tmp_path / "weights")
    check_common(tmp_path / "weights")
    assert read_index(tmp_path / "weights").all_local_plans


def test_sample_indices_that_are_pickles_are_refused(tmp_path):
    from kvcat_nemo.nemo.data_module import index_folders

    paths = {"train": ["0.5", f"{tmp_path}/train"], "validation": [f"{tmp_path}/held"]}
    assert index_folders(paths, None) == [f"{tmp_path}/train/cache", f"{tmp_path}/held/cache"]
    assert index_folders(paths, tmp_path) == [str(tmp_path)]
