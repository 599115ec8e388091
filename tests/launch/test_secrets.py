"""One answer to "is that a secret?": Python's and the shell's agree on names and values."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcat_nemo.cli import main
from kvcat_nemo.common.redact import looks_like_a_secret, redact, what_secret
from kvcat_nemo.launch.job_settings import check_variables

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
    ("DB_PASS", "abc"),
    ("PW", "abc"),
    ("NETRC_CRED", "abc"),
    ("WANDB_KEY", "abc"),
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
    ("COMPASS", "north"),
    ("LOWPASS", "3"),
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

# Of the right shape and of no account; put together here, so that nothing that searches a repository for credentials stops at them.
ALNUM = "aB3dE6gH9jK2mN5pQ8sT1vW4xY7zA0cD2fG4"
HEX = "0123456789abcdef" * 4
UPPER = "Q7W3E9R1T5Y8U2I6"
JWT = "ey" + "JhbGciOiJIUzI1NiJ9" + "." + "ey" + "JzdWIiOiIxMjM0NSJ9" + "." + "dBjftJeZ4CVPmB92K27uhbUJU1p1"
PEM = "-----BEGIN {}PRIVATE " + "KEY-----\nMIIEow-IB+AAKC/" + ALNUM + "=\n-----END {}PRIVATE KEY-----"
SHAPES = [
    *(f"{p}_{ALNUM}" for p in ("ghp", "gho", "ghu", "ghs", "ghr")), "github_" + "pat_11ABCDEFG0" + ALNUM, "hf" + "_" + ALNUM[:34],
    "api_" + "org_" + ALNUM[:34], *(f"{p}{UPPER}" for p in ("AKIA", "ASIA", "AROA")), "sk" + "-" + ALNUM, "sk" + "-proj-" + ALNUM,
    "sk" + "-ant-api03-" + ALNUM, "sk" + "_live_" + ALNUM[:24], "rk" + "_test_" + ALNUM[:24], "gl" + "pat-" + ALNUM[:20],
    "gl" + "ptt-" + ALNUM, "gldt-" + ALNUM[:20], *("xox" + f"{k}-123456789012-{ALNUM[:24]}" for k in "bpas"), "xapp-1-" + ALNUM,
    "https://hooks.slack" + ".com/services/T00000000/B00000000/" + ALNUM[:24], "npm" + "_" + ALNUM, "pypi" + "-AgEIcHlwaS5vcmc" + ALNUM,
    JWT, "AIza" + "Sy" + ALNUM[:33], "ya29" + ".a0" + ALNUM, "GOCSPX" + "-" + ALNUM[:28], "dapi" + HEX[:32], "hvs" + "." + ALNUM,
    "nvapi" + "-" + ALNUM, "gsk" + "_" + ALNUM, "dckr_" + "pat_" + ALNUM, "AGE-SECRET" + "-KEY-1" + UPPER * 2, "123456789:AA" + ALNUM,
    "SG" + "." + ALNUM[:22] + "." + ALNUM, *(PEM.format(k, k) for k in ("", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED ")),
    "https://x.blob.core.windows.net/c/f?sv=2022-11-02&sp=r&si" + "g=" + ALNUM + "%3D",
    "https://b.s3.amazonaws.com/k?X-Amz-Date=20260101T000000Z&X-Amz-Signa" + "ture=" + HEX,
    "https://storage.googleapis.com/b/o?X-Goog-Signa" + "ture=" + HEX, "Authorization: Bear" + "er " + ALNUM, "Authorization: token " + ALNUM,
    "-H 'Authorization: Ba" + "sic " + "dXNlcjpwYXNzd29yZA=='", "authorization=" + ALNUM, "PRIVATE-TOK" + "EN: " + ALNUM[:20],
    "x-api-ke" + "y: " + ALNUM, "http://ann:pa5s@host/x", "https://" + ALNUM + "@host/x", "postgresql://ann:pa5s@db:5432/x",
    "redis://:pa5s@cache:6379/0", "socks5://ann:pa5s@proxy:1080", "user:pa5sword@registry.example/kvcat:1", "docker://me:pa5s@registry.example#kvcat:1",
    "mongodb+srv://ann:p%40ss@cluster.example/x", "AccountName=x;AccountKe" + "y=" + ALNUM + "==;EndpointSuffix=core.windows.net",
    "export HF_TOK" + "EN=abc", "export HF_TOK" + "EN='abc def'", 'export WANDB_API_KE' + 'Y="abc"', "env AWS_SECRET_ACCESS_KE" + "Y=abc run",
    "PGPASSWOR" + "D=abc psql", "data.hf_tok" + "en=abc", "logger.api_ke" + "y=abc", '{"passwor' + 'd": "abc"}', "{'api_ke" + "y': 'abc'}",
    "huggingface-cli login --tok" + "en abcdef", "wandb login --api-ke" + "y=abcdef", "docker login -u me --passwor" + "d abcdef",
    "curl -u me:abcdef https://host", "Server=x;Pw" + "d=abc",
    "machine host.example login me pass" + "word abcdef", "aws configure set aws_secret_access_ke" + "y " + ALNUM, "sshpass -p abcdef ssh host",
    "docker login -u me -p abcdef registry.example", "az login -u me -p abcdef", "mysql -u me -pabcdef", "wandb login " + HEX[:40],
    "export DB_PA" + "SS=abcdef", "--wandb-ke" + "y=abcdef",
]  # fmt: skip
INNOCENT = [
    "mkdir -p /data/x", "mpirun -p 4", "low_pass_filter=true", "PASS=1", "mysql -P 3306 -h host", "docker run -p 8080:80 image", "wandb login",
    "/shared/runs/first", "/a b/c 'd'", "./relative/path", "~/x", "/shared/hf/Llama-3.1-8B", "/models/sk-hynix-hbm-benchmark-2024",
    "/ckpt/hf_transformers_cache/x", "/home/ann/token", "/data/tokens.bin", "/etc/passwd", "runs/step=1000-last", HEX, HEX[:40], "sha256:" + HEX,
    "kvcat@sha256:" + HEX, "registry.example:5000/kvcat:1@sha256:" + HEX, "nvcr.io/nvidia/nemo:25.11", "docker://$oauthtoken@nvcr.io#nvidia/nemo:25.11",
    "docker://dockerd://kvcat:1", "/shared/images/kvcat.sqsh", "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-0.5B", "HuggingFaceTB/SmolLM2-135M",
    "123e4567-e89b-12d3-a456-426614174000", "2026-01-01T00:00:00", "0.0001", "1e-4", "True", "None", "eth0,ib0", "mlx5_0:1,mlx5_1", "node[1-3,7]",
    "source /shared/venv/bin/activate", "module load cuda/12.4 && source x", "export HF_TOK" + "EN=$HF_TOKEN", "export HF_TOK" + "EN=$(cat /run/secrets/hf)",
    "export HF_TOK" + "EN=${HF_TOKEN:?}", "export HF_TOK" + "EN=`cat ~/.hf`", "export HF_TOKEN_PATH=/shared/hf/token", "export HF_HOME=/shared/hf",
    'curl -H "Authorization: Bear' + 'er $HF_TOKEN" https://host', "git clone ssh://git@github.com/o/r", "git@github.com:o/r.git", "mailto:ann@example.org",
    "ann@example.org", "http://tracking.example:5000/#/experiments/1?page=2", "sqlite:////shared/mlflow.db", "https://host/x?page=2&max_tokens=100",
    "kvcat train doctor --dir \"$KVCAT_RUN_DIR\" --disk-gb 10", "data.add_bos_tok" + "en=True", "data.eod_tok" + "en=0", "model.eos_tok" + "en=</s>",
    "trainer.max_steps=100", "data.tokenizer=/m", "--tokenizer /m", "--eos-tok" + "en x", "token_loss=1", "tokens=100", "basic settings and training",
    "bearer of good news", "the password is in the file", "author=ann", "key=value", "docker run -u 1000:1000 image", "signal=USR1", "sig=0.5",
    "cd /work; PW" + "D=/work ls", "npm_config_registry=https://registry.example", "-----BEGIN CERTIFICATE-----", "kvcat_qwen25_0p5b(base='/ckpt', paths='/data')",
    "nccl:INFO", "a:b:c", "3:1.5", "user/repo:tag", "s3://bucket/key", "gs://bucket/x", "file:///a/b", "INFO,WARN", "12:30:00", "***", "http://***@host/x",
    "hf_token=***", "password=***",
]  # fmt: skip


def test_the_tables_are_large():
    assert len(set(SHAPES)) >= 60 and len(set(INNOCENT)) >= 60


@pytest.mark.parametrize("text", SHAPES, ids=lambda t: t[:12])
def test_every_shape_is_refused_and_hidden(text):
    """Alone, in an assignment, in quotes, in a sentence; hidden, it is found no more."""
    for form in (text, f"X={text}", f"echo '{text}' | x", f"see {text} here"):
        assert what_secret("X", form), form
        hidden = redact(form)
        assert "***" in hidden and what_secret("X", hidden) is None, hidden
        assert redact(hidden) == hidden
        for part in (ALNUM[:20], "abc", "pa5s", UPPER, HEX):
            assert part not in hidden, hidden


@pytest.mark.parametrize("text", INNOCENT, ids=lambda t: t[:20])
def test_innocent_values_pass(text):
    assert what_secret("X", text, []) is None and redact(text, []) == text


def test_python_and_the_shell_agree():
    rows = SECRET + PLAIN + [("X", text) for text in SHAPES + INNOCENT]
    script = f'source {LAUNCH}/common.sh; while (($#)); do looks_like_a_secret "$1" "$2" && echo yes || echo no; shift 2; done'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *(word for row in rows for word in row)],
        capture_output=True,
        text=True,
        check=True,
    )
    python = ["yes" if looks_like_a_secret(*row) else "no" for row in rows]
    wanted = ["yes"] * len(SECRET) + ["no"] * len(PLAIN) + ["yes"] * len(SHAPES) + ["no"] * len(INNOCENT)
    answers = list(zip(rows, python, done.stdout.split(), wanted, strict=True))
    assert [x for x in answers if len(set(x[1:])) > 1] == []


@settings(max_examples=6, deadline=None)
@given(st.lists(st.text("aZ0_-=:/@.$'\" \n*!tokenpwd", max_size=40), min_size=15, max_size=30))
def test_python_and_the_shell_agree_on_any_text(texts):
    script = f'source {LAUNCH}/common.sh; for x in "$@"; do looks_like_a_secret X "$x" && echo yes || echo no; done'
    done = subprocess.run(["bash", "-c", script, "bash", *texts], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["yes" if looks_like_a_secret("X", text) else "no" for text in texts]


def test_a_long_text_is_searched_in_its_time():
    """No expression of the table tries the same letters again and again."""
    for text in (
        "a" * 20_000,
        "a_" * 10_000,
        "sk-" + "a-" * 10_000,
        "A" * 20_000 + "@",
        "a.b-c:" * 8_000,
        "-----BEGIN " * 5_000,
        "token " * 9_000,
    ):
        start = time.process_time()
        redact(text, [])
        assert time.process_time() - start < 5, text[
            :20
        ]  # some 0.1 s each; of the square of the length: minutes


# --- what is written to files ---


@pytest.mark.parametrize(
    "option",
    ["--setup", "--health-command", "--image", "--env", "--constraint", "--run-dir", "--job-name", "--mount"],
)
def test_job_files_hold_no_credential(option, tmp_path):
    """Neither Python's launcher nor the shell's takes one, in any option, and neither shows it."""
    for text in (SHAPES[0], JWT, "x:" + "pa5sw0rd@registry.example/i:1", "export HF_TOK" + "EN=pa5sw0rd"):
        value = f"MODE={text}" if option == "--env" else text
        words = ["--run-dir", str(tmp_path / "r"), option, value]
        shell = subprocess.run(
            ["bash", str(LAUNCH / "submit.sh"), *words, "--", "true"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        name = "--name" if option == "--job-name" else option
        python = CliRunner().invoke(
            main, ["launch", "slurm", "kvcat_tiny", "--no-plan", *words[:2], name, value]
        )
        for code, said in (
            (shell.returncode, shell.stdout + shell.stderr),
            (python.exit_code, python.output),
        ):
            assert code in (1, 2) and "looks like a secret" in said and "--env NAME" in said, said
            assert text not in said and "pa5sw0rd" not in said and ALNUM not in said, said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--hf-tok" + "en", "pa5sw0rd"],
        ["--tok" + "en=pa5sw0rd"],
        ["data.hf_tok" + "en=pa5sw0rd"],
        [SHAPES[0]],
        ["x", "-u", "me:pa5sw0rd"],
    ],
)
def test_the_command_of_a_job_holds_none(words, tmp_path):
    done = subprocess.run(
        ["bash", str(LAUNCH / "submit.sh"), "--run-dir", str(tmp_path / "r"), "--", "train", *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "looks like a secret" in done.stderr and "pa5sw0rd" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_secret_of_the_shells_environment_is_known_by_its_value(tmp_path):
    (tmp_path / "file").touch()
    environment = os.environ | {
        "SITE_TOKEN": "s3cret-word",
        "OTHER_TOKEN": "on",
        "FILE_TOKEN": str(tmp_path / "file"),
    }
    for value, code in (("x-s3cret-word", 2), ("on", 0), (str(tmp_path / "file"), 0)):
        done = subprocess.run(
            ["bash", str(LAUNCH / "submit.sh"), "--run-dir", str(tmp_path / "r"), "--dry-run", "--env", f"MODE={value}", "--", "true"],
            capture_output=True, text=True, env=environment,
        )  # fmt: skip
        assert done.returncode == code and "s3cret-word" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    "patch",
    [
        {"metadata": {"annotations": {"a": SHAPES[0]}}},
        {"spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": {"spec": {"containers": [
            {"name": "ranks", "env": [{"name": "HF_TOKEN", "value": "pa5sw0rd"}]}]}}}}}]}},
    ],
)  # fmt: skip
def test_a_manifest_holds_none(patch, tmp_path):
    """A site's additions too."""
    (tmp_path / "patch.yaml").write_text(yaml.safe_dump(patch))
    words = [
        "launch",
        "k8s",
        "kvcat_tiny",
        "--run-dir",
        "/r/x",
        "--image",
        "i",
        "--mount",
        "r:/r",
        "--no-plan",
    ]
    done = CliRunner().invoke(
        main, [*words, "--patch", str(tmp_path / "patch.yaml"), "--out", str(tmp_path / "job.yaml")]
    )
    assert done.exit_code == 1 and "looks like a secret" in done.output and "pa5sw0rd" not in done.output
    assert ALNUM not in done.output and not (tmp_path / "job.yaml").exists()


def test_the_shell_without_the_table_lets_nothing_pass(tmp_path):
    for name in ("submit.sh", "common.sh", "run_names.sh", "values.tsv"):
        shutil.copy(LAUNCH / name, tmp_path)
    done = subprocess.run(
        ["bash", str(tmp_path / "submit.sh"), "--run-dir", str(tmp_path / "r"), "--dry-run", "--", "true"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "secrets.tsv is not beside" in done.stderr and not done.stdout


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
