"""One answer to "is that a secret?": Python's and the shell's agree on names and values."""

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.launch.settings import check_variables
from kvcat_nemo.tracking.redact import looks_like_a_secret

LAUNCH = Path(__file__).parents[2] / "launch"

SECRET = [
    ("HF_TOKEN", "abc"),
    ("hf_token", "abc"),
    ("TOKEN", "abc"),
    ("GITHUB_TOKEN_READ", "abc"),
    ("AUTHTOKEN", "abc"),
    ("WANDB_API_KEY", "abc"),
    ("SOME_APIKEY", "abc"),
    ("AWS_ACCESS_KEY_ID", "abc"),
    ("AWS_SECRET_ACCESS_KEY", "abc"),
    ("SECRETS", "abc"),
    ("SSH_PRIVATE_KEY", "abc"),
    ("AZURE_STORAGE_KEY", "abc"),
    ("MLFLOW_TRACKING_PASSWORD", "abc"),
    ("PGPASSWORD", "abc"),
    ("MYSQL_PWD", "abc"),
    ("DB_PASSWD", "abc"),
    ("KEY_PASSPHRASE", "abc"),
    ("GOOGLE_APPLICATION_CREDENTIALS", "/a/file.json"),
    ("PROXY_AUTHORIZATION", "abc"),
    ("URI", "http://me:pw@host/x"),
    ("URI", "postgresql://me:pw@host/x"),
    ("URI", "http://me:p@w@host"),
    ("URI", "https://ghp_abcdef@host/x"),
    ("URI", "see HTTP://:pw@host"),
    ("URI", "https://host/x?api_key=abc&page=2"),
    ("URI", "https://host/x?page=2&token=abc"),
    ("URI", "https://host/x;Password=abc"),
    ("OPTIONS", "password=abc"),
    ("OPTIONS", "user=me passwd=abc"),
    ("HEADER", "Authorization: Bearer abc.def-123456"),
    ("HEADER", "Basic YWJjZGVm"),
]
PLAIN = [
    ("TOKENIZERS_PARALLELISM", "false"),
    ("MAX_TOKENS", "100"),
    ("PWD", "/work"),
    ("KEY", "value"),
    ("MONKEY", "value"),
    ("NCCL_DEBUG", "INFO"),
    ("AUTHOR", "ann"),
    ("HF_TOKEN", ""),
    ("MLFLOW_TRACKING_URI", "http://tracking.example:5000"),
    ("URI", "sqlite:////shared/mlflow.db"),
    ("URI", "http://host:5000/a@b"),
    ("URI", "http://host/x?page=2&eos_token=abc"),
    ("MAIL", "ann@example.org"),
    ("PATH", "/a/b:/c/d"),
    ("WORDS", "bearer of news"),
    ("OPTIONS", "max_tokens=3 token_loss=1"),
    ("OPTIONS", "token= next"),
    ("QUOTED", 'it\'s "a b" $c'),
]


def test_python_and_the_shell_agree():
    rows = SECRET + PLAIN
    script = f'source {LAUNCH}/common.sh; while (($#)); do looks_like_a_secret "$1" "$2" && echo yes || echo no; shift 2; done'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *(word for row in rows for word in row)],
        capture_output=True,
        text=True,
        check=True,
    )
    python = ["yes" if looks_like_a_secret(*row) else "no" for row in rows]
    wanted = ["yes"] * len(SECRET) + ["no"] * len(PLAIN)
    answers = list(zip(rows, python, done.stdout.split(), wanted, strict=True))
    assert [x for x in answers if len(set(x[1:])) > 1] == []


def test_a_secret_of_the_environment_is_known_by_its_value(monkeypatch):
    monkeypatch.setenv("SITE_TOKEN", "s3cret-word")
    with pytest.raises(ValueError, match="env=MODE=…: that looks like a secret") as error:
        check_variables(["A=b", "MODE=x-s3cret-word"])
    assert "s3cret-word" not in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ("slurm", "kvcat_tiny", "--env", "URI=http://me:s3cret@host"),
        ("slurm", "kvcat_tiny", "data.hf_token=s3cret"),
        ("local", "kvcat_tiny(uri='http://me:s3cret@host')"),
        ("k8s", "kvcat_tiny", "log.uri=http://me:s3cret@host", "--image", "i", "--mount", "runs:/runs"),
    ],
)
def test_credentials_are_neither_printed_nor_written(words, tmp_path):
    run_dir = tmp_path / "run"
    for more in ([], ["--dry-run"]):
        done = CliRunner().invoke(main, ["launch", *words, "--run-dir", str(run_dir), *more])
        assert done.exit_code and "s3cret" not in done.output, done.output
        assert "secret" in done.output or "credentials" in done.output
    assert not run_dir.exists()
