"""Credentials: what is hidden, what must not be, and what is refused on a command line."""

import pytest

from kvcat_nemo.common.redact import (
    environment_secrets,
    is_secret_name,
    redact,
    redact_tree,
    refuse_credentials,
    split_credentials,
)
from kvcat_nemo.runs.provenance import manifest

PASSWORD = "p4ss/w0rd?"  # as it is; in a URI it stands quoted
QUOTED = "p4ss%2Fw0rd%3F"
URI = f"http://ann:{QUOTED}@tracking.example:5000/mlflow"


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef123456")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws/secret+key")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")
    monkeypatch.setenv("SOME_TOKEN", "on")  # too short to be one


@pytest.mark.parametrize(
    "text",
    [
        f"API request to {URI}/api failed",
        "postgresql://ann:p4ss@db/mlflow",
        "http://ann:a@b@host/x",
        "Authorization: Bearer abc.def-123456",
        "GET https://host/x?api_key=abc123&page=2",
        "the token is hf_abcdef123456, is it?",
        f"decoded {PASSWORD} and quoted {QUOTED}",
        "sig aws/secret+key end",
    ],
)
def test_hidden(text, environment):
    hidden = redact(text)
    for secret in (PASSWORD, QUOTED, "p4ss", "a@b", "abc.def", "abc123", "hf_abcdef", "aws/secret"):
        assert secret not in hidden, hidden
    assert "***" in hidden


@pytest.mark.parametrize(
    "text",
    [
        "step 3: 1,024 tokens/s, keep 0.5",
        "http://tracking.example:5000/#/experiments/1?page=2",
        "see ann@example.org",
        "sqlite:////data/mlflow.db",
        "TOKENIZERS_PARALLELISM=falsehood",
        "trainer.max_steps=100",
        "data.tokenizer=/models/a",
    ],
)
def test_left_alone(text, environment):
    assert redact(text) == text


@pytest.mark.parametrize(
    "name", ["hf_token", "logger.password", "api_key", "aws.secret_access_key", "TOKEN", "a.secret"]
)
def test_secret_names(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "tokens",
        "tokenizer",
        "eos_token",
        "pad_token",
        "max_tokens",
        "key",
        "num_keys",
        "author",
        "token_loss",
    ],
)
def test_plain_names(name):
    assert not is_secret_name(name)


def test_trees(environment):
    tree = {
        "a": {"hf_token": "whatever", "none_token": None},
        "uri": URI,
        "list": ["x", "hf_abcdef123456"],
        "n": 3,
    }
    assert redact_tree(tree) == {
        "a": {"hf_token": "***", "none_token": None},
        "uri": "http://***@tracking.example:5000/mlflow",
        "list": ["x", "***"],
        "n": 3,
    }


def test_manifests_hide(environment):
    text = str(manifest(config={"store": URI, "password": "x"}, note="hf_abcdef123456"))
    assert "hf_abcdef" not in text and QUOTED not in text and "'password': '***'" in text


def test_paths_and_short_values_are_no_secrets(environment, monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    found = environment_secrets()
    assert str(tmp_path) not in found and "on" not in found and PASSWORD in found and QUOTED in found


@pytest.mark.parametrize(
    "argument",
    [
        f"log.extra_loggers[0].tracking_uri={URI}",
        "data.hf_token=hf_zzz",
        "trainer.password='x'",
        "--uri=https://u:secret@host",
        "note=hf_abcdef123456",
    ],
)
def test_refused_on_a_command_line(argument, environment):
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as error:
        refuse_credentials(["trainer.max_steps=3", argument])
    value = argument.partition("=")[2].strip("'")
    assert value not in str(error.value) and argument.partition("=")[0] in str(error.value)


def test_other_arguments_pass(environment):
    refuse_credentials(
        ["--factory", "kvcat_tiny(dir='/runs')", "-y", "data.tokenizer=/m", "model.hf_token=None"]
    )


def test_split():
    assert split_credentials(URI) == ("http://tracking.example:5000/mlflow", "ann", PASSWORD)
    assert split_credentials("http://host:5000") == ("http://host:5000", None, None)
    assert split_credentials("sqlite:////a@b/mlflow.db") == ("sqlite:////a@b/mlflow.db", None, None)
    assert split_credentials("postgresql://u:p@db/x")[0] == "postgresql://u:p@db/x"
