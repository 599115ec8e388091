"""Sizes from configurations, headers and command lines that are no sizes: refused before a loop or an allocation."""

import json
import re
import time
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from kvcat_nemo.common.limits import (
    LIMITS,
    check_config_fits_weights,
    check_config_sizes,
    check_model_sizes,
    check_size,
    check_upper,
    integer,
)

CONFIG = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
}
SILLY = [0, -1, 10**30, 2**63, 1 << 31, True, "30", 30.0, [30], float("nan"), float("inf")]


@pytest.fixture(autouse=True)
def at_once():
    began = time.process_time()
    yield
    assert time.process_time() - began < 5  # of this process alone: 10**30 steps of anything take for ever


@pytest.mark.parametrize("value", SILLY, ids=repr)
@pytest.mark.parametrize("field", CONFIG)
def test_a_config_with_a_size_that_is_none_is_refused(field, value):
    with pytest.raises(ValueError, match=f"config.json: {field}="):
        check_config_sizes(CONFIG | {field: value})


def test_sizes_that_fit_alone_may_not_fit_together():
    check_config_sizes(CONFIG)
    check_config_sizes({"num_hidden_layers": None})  # what is missing, its reader says
    with pytest.raises(ValueError, match=r"a model of some 1\.\de\+17 parameters"):
        check_config_sizes(
            CONFIG
            | {"hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 9_999}
            | {"num_attention_heads": 9_999}
        )
    with pytest.raises(ValueError, match="layer_types names 2 layers"):
        check_config_sizes(CONFIG | {"layer_types": ["full_attention"] * 2})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 9_999),
        ("hidden_size", 8192),
        ("vocab_size", 10**6),
        ("intermediate_size", 10**5),
    ],
)
def test_a_config_is_compared_with_the_weights_before_a_model_of_its_sizes_is_made(field, value):
    shapes = {"model.embed_tokens.weight": (49152, 576)}
    shapes |= {f"model.layers.{i}.mlp.gate_proj.weight": (1536, 576) for i in range(30)}
    check_config_fits_weights(CONFIG, shapes)
    with pytest.raises(ValueError, match=f"{field}={value}, but the weights have"):
        check_config_fits_weights(CONFIG | {field: value}, shapes)


@pytest.mark.parametrize("value", [10**30, 9_999])
def test_readers_of_a_model_folder_refuse_it(tmp_path, value):
    """The conversion's and the evaluation's."""
    import torch
    from safetensors.torch import save_file

    from kvcat_nemo.conversion.arch import load_architecture
    from kvcat_nemo.evaluate.models import find_model

    config = CONFIG | {"model_type": "llama", "num_hidden_layers": value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file({"model.layers.0.input_layernorm.weight": torch.ones(576)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="num_hidden_layers=1?9*0*"):
        find_model(tmp_path)
    if value > LIMITS["layers"].high:
        with pytest.raises(ValueError, match="num_hidden_layers=10+: at most 10,000 are supported"):
            load_architecture(tmp_path)


@pytest.mark.parametrize("kind", LIMITS)
def test_bounds_and_their_reasons(kind):
    limit = LIMITS[kind]
    assert limit.low < limit.high and len(limit.why) > 10
    for value in (limit.low, limit.high):
        assert check_size("x", value, kind) == check_size("x", str(value), kind) == value
    for value in (
        limit.low - 1,
        str(limit.low - 1),
        -(10**40),
        limit.high + 1,
        str(limit.high + 1),
        10**400,
        "x",
        None,
        1.5,
        True,
    ):
        with pytest.raises(ValueError, match="^x="):
            check_size("x", value, kind)


def test_integers_in_every_form():
    assert [integer(x) for x in (4, "4", " +4 ", 4.0, "-4")] == [4, 4, 4, 4, -4]
    assert {
        integer(x) for x in (True, 4.5, "4.0", "four", "", None, [4], float("inf"), "9" * 5000, "٤x")
    } == {None}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 10**30), ("num_layers", 0), ("num_layers", "9"*30), ("hidden_size", 2**40), ("vocab_size", 2**40),
        ("num_attention_heads", -2), ("seq_length", 10**12), ("pipeline_model_parallel_size", 0),
        ("virtual_pipeline_model_parallel_size", 10**30), ("kvcat.num_groups", 10**30), ("kvcat.router_dim", 10**30),
        ("kvcat.sinks", 10**30), ("kvcat.recent_window", 10**30), ("kvcat.loss_memory_mib", 10**30),
    ],
)  # fmt: skip
def test_model_configurations(field, value):
    good = {"num_layers": 4, "hidden_size": 16, "vocab_size": None}
    check_model_sizes(SimpleNamespace(**good))
    if field.startswith("kvcat."):
        config = SimpleNamespace(**good, kvcat=SimpleNamespace(**{field[6:]: value}))
    else:
        config = SimpleNamespace(**good | {field: value})
    with pytest.raises(ValueError, match=rf"model\.config\.{field}="):
        check_model_sizes(config)


def commands(command, path=()):
    if isinstance(command, click.Group):
        for name in command.list_commands(None):
            yield from commands(command.get_command(None, name), (*path, name))
    else:
        yield path, command


def test_every_number_on_every_command_line_is_bounded():
    """Options that are added later too: the bound is set where the commands are found."""
    from kvcat_nemo.cli import main

    seen = 0
    for _path, command in commands(main):
        for parameter in command.params:
            if not isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType):
                continue
            seen += 1
            whole = isinstance(parameter.type, click.types.IntParamType)
            for text in ("9" * 40,) if whole else ("nan", "inf", "9" * 400):
                with pytest.raises(click.ClickException):
                    parameter.process_value(click.Context(command), text)
    assert seen > 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "windows", "x", "--count", str(10**30)], "--count=10+: at most"),
        (["data", "build", "x", "--workers", "5000"], "--workers=5000: at most 4,096"),
        (["evaluate", "needle", "m", "--out", "o", "--samples", str(10**12)], "--samples=10+: at most"),
        (["evaluate", "ruler", "m", "--out", "o", "--lengths", str(10**12)], "lengths=.*at most"),
        (["evaluate", "continuation", "m", "--out", "o", "--windows", str(10**12)], "windows=.*at most"),
        (["train", "watch", "x", "--every", "nan"], "--every=nan: give a finite number"),
    ],
    ids=lambda x: " ".join(x[:2]) if isinstance(x, list) else None,
)
def test_command_lines(arguments, message):
    from kvcat_nemo.cli import main

    result = CliRunner().invoke(main, arguments)
    assert result.exit_code != 0 and re.search(message, result.output), result.output


def test_settings_of_compressors_and_sweeps():
    from kvcat_nemo.compress.registry import make
    from kvcat_nemo.evaluate.registry import protocol_class

    with pytest.raises(ValueError, match="batch_size=10+: at most"):
        protocol_class("needle").of({"models": ["m"], "out": "o", "batch_size": 10**30})
    with pytest.raises(ValueError, match="kvsculpt:.*rounds=10+: at most|kvsculpt:.*rounds: ?10*"):
        make(f"kvsculpt:rounds={10**12}")
    with pytest.raises(ValueError, match="finite"):
        check_upper("lr", float("nan"))
