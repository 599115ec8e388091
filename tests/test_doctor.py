"""`kvcat train doctor`: one line per thing, exit code 1 when something is broken, and what to do about it."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from kvcat_nemo import doctor
from kvcat_nemo.cli import main
from kvcat_nemo.runs import checkpoint_manifest as manifest

pytest.importorskip("megatron.core")
ROOM = ["--disk-gb", "0", "--shm-gb", "0"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments):
    result = CliRunner().invoke(main, ["train", "doctor", "--json", *ROOM, *map(str, arguments)])
    lines = [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]
    return result.exit_code, {line["check"]: line for line in lines}


@pytest.fixture
def dataset(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "train.bin"), dtype=np.uint16)
    for length in (5, 6, 7):
        builder.add_item(torch.arange(length))
        builder.end_document()
    builder.finalize(str(tmp_path / "train.idx"))
    return tmp_path


def test_healthy(dataset, tmp_path):
    code, found = run("--dir", tmp_path / "runs", "--data", dataset)
    assert code == 0, found
    assert found["versions"]["status"] == "ok" and "megatron-core 0.15.3" in found["versions"]["text"]
    assert "18 tokens" in found["data"]["text"]
    assert {"transformer_engine", "apex", "flash_attn", "disk", "shared memory", "ports", "ranks"} <= set(
        found
    )


def test_fast_form_asks_no_ports_and_ranks(tmp_path):
    code, found = run("--fast", "--dir", tmp_path)
    assert code == 0 and not {"ports", "ranks"} & set(found)


def test_wrong_version(monkeypatch, tmp_path):
    monkeypatch.setitem(doctor.PINS, "megatron-core", "9.9")
    code, found = run("--fast", "--dir", tmp_path)
    assert code == 1 and "megatron-core 0.15.3 is installed, 9.9 is what works" in found["versions"]["text"]


def test_no_room(tmp_path):
    result = CliRunner().invoke(
        main, ["train", "doctor", "--fast", "--dir", str(tmp_path), "--disk-gb", "1e7"]
    )
    assert result.exit_code == 1 and "BROKEN disk" in result.output and "GB wanted" in result.output


def test_data_empty_and_truncated(dataset):
    os.truncate(dataset / "train.bin", 20)
    code, found = run("--data", dataset)
    assert code == 1 and "train.bin has 20 bytes, its index promises 36" in found["data"]["text"]
    code, found = run("--data", dataset / "nothing")
    assert code == 1 and "nothing.bin does not exist" in found["data"]["text"]


def checkpoint(folder, step):
    path = folder / "checkpoints" / f"step={step}"
    (path / "weights").mkdir(parents=True)
    (path / "weights" / "__0_0.distcp").write_bytes(bytes(1000 + step))
    manifest.write_manifest(path, step, manifest.hash_files(path, manifest.contents(path)))
    return path


def test_checkpoints(tmp_path):
    first, second = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    code, found = run("--checkpoint", tmp_path)
    assert code == 0 and "step 8" in found["checkpoint step=8"]["text"]
    (second / "weights" / "__0_0.distcp").write_bytes(b"\1" + bytes(1007))
    code, found = run("--checkpoint", tmp_path)
    assert code == 1 and "__0_0.distcp: its contents changed" in found["checkpoint step=8"]["text"]
    assert found["checkpoint step=4"]["status"] == "ok"
    (second / manifest.MANIFEST).unlink()  # what a kill in a save leaves is no fault of the machine
    code, found = run("--checkpoint", tmp_path)
    assert code == 0 and found["checkpoint step=8"]["status"] == "note"
    shutil.rmtree(first)
    code, found = run("--checkpoint", tmp_path)
    assert code == 1 and "none is complete" in found["checkpoint"]["text"]


def test_port_in_use(monkeypatch, tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        code, found = run("--dir", tmp_path)
    assert code == 1 and "set MASTER_PORT to a free one" in found["ports"]["text"]


def test_ranks_are_tried_in_a_job(monkeypatch, tmp_path):
    import socket

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    code, found = run("--dir", tmp_path, "--timeout", "1")
    assert (
        code == 69  # nothing is wrong here
        and "rank 1 (host" in found["ranks"]["text"]
        and "did not start within 1 s" in found["ranks"]["text"]
    )
    monkeypatch.setenv("KVCAT_NODE_NAMES", "first second")  # as the Slurm launcher sets it
    code, found = run("--dir", tmp_path, "--timeout", "1")
    assert code == 69 and "rank 1 (host second) did not start" in found["ranks"]["text"]
    code, found = run("--dir", tmp_path, "--timeout", "1", "--data", tmp_path)  # its own fault counts more
    assert code == 1 and "no dataset" in found["data"]["text"]


def test_help_teaches():
    text = CliRunner().invoke(main, ["train", "doctor", "--help"]).output
    for word in ("HEALTHCHECK", "torchrun", "exit code", "--fast"):
        assert word in text
