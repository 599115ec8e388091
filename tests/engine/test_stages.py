"""Layouts that do not work are refused before anything starts, and what the message proposes does work."""

import re
from itertools import product

import pytest

from kvcat_nemo.method.config import KVCatConfig
from tests.engine.small_models import transformer_config
from tests.refusals import LAYOUT, MODEL, PP, VP

pytestmark = pytest.mark.usefixtures("one_process")


def check(given):
    """Validate a model of 24 layers, and a layout if fields of one are given."""
    from kvcat_nemo.engine.config_checks import validate_model_config
    from kvcat_nemo.engine.cost import Layout

    config = transformer_config(num_layers=24, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=64)
    config.kvcat = KVCatConfig(num_groups=4)
    config.microbatch_group_size_per_vp_stage = None  # as many as there are stages
    layout = dict(world_size=8, tensor=1, pipeline=1, sequence_parallel=False, distributed_optimizer=False,
                  micro_batch_size=2, global_batch_size=16, seq_length=1024)  # fmt: skip
    of_layout = False
    for name, value in given.items():  # past Megatron's own checks: ours must hold by themselves
        owner, _, field = name.rpartition(".")
        if owner == "layout":
            layout[field], of_layout = value, True
        else:
            setattr(config.kvcat if owner else config, field, value)
    validate_model_config(config)
    if of_layout:
        Layout(**layout).check(config)


@pytest.mark.parametrize(
    "refusal", MODEL + LAYOUT, ids=lambda r: ", ".join(f"{k}={v}" for k, v in r.given.items())
)
def test_refused_and_accepted_as_proposed(refusal):
    with pytest.raises(ValueError) as error:
        check(refusal.given)
    message = str(error.value)
    name, value = next(iter(refusal.given.items()))
    named = name.removeprefix("layout.")
    if named == "world_size":
        assert message.startswith(f"{value} processes (trainer.devices × trainer.num_nodes)")
    else:
        assert re.search(rf"{re.escape(named)}={re.escape(repr(value))}", message), message
    for text in refusal.says:
        assert text in message, message
    assert refusal.fix
    check(refusal.given | refusal.fix)


def works(layers, groups, stages, chunks, policy="router"):
    from kvcat_nemo.engine.config_checks import validate_model_config

    config = transformer_config(num_layers=layers, kvcat={"num_groups": groups, "policy": policy})
    config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size = stages, chunks
    config.batch_p2p_comm = False
    validate_model_config(config)


def test_every_layout_proposed_for_a_straddling_group_works():
    """Over many models: every single field that a message proposes makes it work; without a router all do."""
    refused = 0
    for layers, groups, stages, chunks in product((4, 6, 12), range(1, 7), (2, 3, 4, 6), (None, 2, 3)):
        if groups > layers or layers % (stages * (chunks or 1)):
            continue
        works(layers, groups, stages, chunks, policy="random")  # its masks need not travel
        try:
            works(layers, groups, stages, chunks)
        except ValueError as error:
            refused += 1
            proposed = re.findall(
                r"(\w+)=((?:\d+|None)(?: or (?:\d+|None))*)(?:;|$)", str(error).partition("Nearest")[2]
            )
            assert "num_groups" in dict(proposed), error
            for name, values in proposed:
                for value in values.split(" or "):
                    layout = {"num_groups": groups, PP: stages, VP: chunks} | {name: eval(value)}
                    works(layers, layout["num_groups"], layout[PP], layout[VP])
    assert refused > 50
