"""What `kvcat serve` refuses before an engine is started, naming the file; no engine is needed."""

from __future__ import annotations

import shutil

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    """A folder with one document in three dtypes and one that is not servable."""
    place = tmp_path_factory.mktemp("files")
    (place / "text.txt").write_text(
        "the cache of text number 7 grows with every token of it, and so on. " * 6
    )
    for name, words in (
        ("float32", ["--servable"]),
        ("bfloat16", ["--servable", "--cache-dtype", "bfloat16"]),
        ("free", []),
    ):
        run(
            "compress",
            folder,
            "--text",
            place / "text.txt",
            "--keep",
            "0.3",
            *words,
            "--out",
            place / f"{name}.kv",
        )
    return place


def run(*words, fails=False):
    result = CliRunner().invoke(main, [str(w) for w in words])
    assert (result.exit_code != 0) == fails, result.output
    return result.output


def test_the_four_lines_a_user_types(folder, files):
    out = run("serve", folder, "--cache", f"manual={files / 'float32.kv'}", "--check")
    assert "manual: " in out and "float32" in out
    said = run("cache", "inspect", files / "bfloat16.kv")
    for word in ("sha256", "slots        ", "attention-matching", "bfloat16, without biases", "text.txt"):
        assert word in said
    assert "no: kvcat compress" in run("cache", "inspect", files / "free.kv")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--cache", "a={files}/free.kv"], ("free.kv", "not in the form that engines take")),
        (
            ["--cache", "a={files}/bfloat16.kv", "--dtype", "float32"],
            ("bfloat16.kv", "--cache-dtype float32"),
        ),
        (["--cache", "a={files}/float32.kv", "--cache", "b={files}/bfloat16.kv"], ("b=", "bfloat16.kv")),
        (["--cache", "a={files}/cut.kv"], ("cut.kv", "cut off")),
        (["--cache", "a={files}/bits.kv"], ("bits.kv", "damaged")),
        (["--cache", "a={files}/missing.kv"], ("missing.kv", "no such file")),
        (["--cache", "{files}/float32.kv"], ("give NAME=FILE",)),
        (["--cache", "a={files}/float32.kv", "--", "--kv-transfer-config", "{}"], ("--kv-transfer-config",)),
    ],
)
def test_files_that_are_refused_at_the_start(folder, files, words, says):
    data = (files / "float32.kv").read_bytes()
    (files / "cut.kv").write_bytes(data[: len(data) - 1000])
    at = data.index(b'\\"slots\\": 32') if b'\\"slots\\": 32' in data else data.index(b"slots")
    (files / "bits.kv").write_bytes(data[:at] + data[at:].replace(b"32", b"48", 1))
    out = (
        run(
            "serve",
            folder,
            *(w.format(files=files) if "{f" in w else w for w in words),
            "--check",
            fails=True,
        )
        if ("--" not in words)
        else run(
            "serve",
            folder,
            "--check",
            *(w.format(files=files) if "{f" in w else w for w in words),
            fails=True,
        )
    )
    assert all(word in out for word in says), out


def test_another_models_cache(folder, files, tmp_path):
    from tests.serve.lively import save_lively

    other = save_lively(tmp_path / "other", seed=1)
    out = run("serve", other, "--cache", f"a={files / 'float32.kv'}", "--check", fails=True)
    assert "float32.kv" in out and "another model's cache means nothing" in out
    assert "without weights" not in out
    shutil.rmtree(other)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--block", "16"], "--block 16: it shapes the form of --servable"),
        (["--cache-dtype", "bfloat16"], "--cache-dtype bfloat16"),
        (["--servable", "--compressor", "attention-matching+int4"], "int4 keeps slots as 4-bit codes"),
        (["--servable", "--block", "4096"], "shorter than one block"),
    ],
)
def test_forms_that_compress_refuses(folder, files, words, says, tmp_path):
    out = run(
        "compress",
        folder,
        "--text",
        files / "text.txt",
        "--keep",
        "0.3",
        "--out",
        tmp_path / "x.kv",
        *words,
        fails=True,
    )
    assert says in out and not (tmp_path / "x.kv").exists()


def test_without_vllm_the_command_says_where_it_lives(folder, files, monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from kvcat_nemo.serve import vllm_server

    def none(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(vllm_server, "version", none)
    out = run("serve", folder, "--cache", f"a={files / 'float32.kv'}", fails=True)
    assert "make .venv-serve" in out
    monkeypatch.setattr(vllm_server, "version", lambda name: "0.11.2")
    out = run("serve", folder, "--cache", f"a={files / 'float32.kv'}", fails=True)
    assert "0.11.2" in out and "0.32" in out
