"""A policy is one file and one place in the registry: two toys train, and no other file knows a policy by its name."""

import ast
import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from small_models import TOKENS, build, enliven, train_step, transformer_config

from kvcat_nemo.method.config import KVCatConfig, keep_target
from kvcat_nemo.method.policies import POLICIES

ROOT = Path(__file__).parents[2]
TOYS = {"every-third": "every_third:EveryThird", "one-weight": "one_weight:OneWeight"}
"""All that a toy policy touches: its file (tests/engine/toy_policies/) and this registration."""


@pytest.fixture
def toy(request, monkeypatch):
    module, _, cls = TOYS[request.param].partition(":")
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "toy_policies"))
    policy = getattr(importlib.import_module(module), cls)()
    monkeypatch.setitem(POLICIES, policy.name, policy)
    assert Path(sys.modules[module].__file__).parent.name == "toy_policies"
    return policy


@pytest.mark.parametrize("toy", TOYS, indirect=True)
@pytest.mark.parametrize("packed", [False, True])
def test_a_toy_policy_trains(toy, packed, one_process):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from kvcat_nemo.engine.cost import parameters

    config = transformer_config(kvcat={"policy": toy.name})
    model = build(config)
    enliven(model)
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    routers = [parameter for name, parameter in model.named_parameters() if ".router." in name]
    steps = []
    for _ in range(2):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        steps.append(train_step([wrapped], config, packed=packed))
        for parameter in model.parameters():
            parameter.data -= 0.1 * parameter.main_grad
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(moved)
    first, second = steps
    assert second["loss/total"] < first["loss/total"] and math.isfinite(second["loss/total"])
    terms = toy.loss_weights(config.kvcat)
    assert {f"weighted/{term}" for term in terms} == {key for key in first if key.startswith("weighted/")}
    assert first["loss/total"] == sum(weight * first[f"loss/{term}"] for term, weight in terms.items())
    if toy.has_routers:
        config.vocab_size, config.share_embeddings_and_output_weights = 104, True
        assert sum(p.numel() for p in routers) == parameters(config)["routers"] == 2 * config.hidden_size
        assert 0 < first["keep_rate"] < 1
    else:
        assert not routers
        if not packed:
            assert first["keep_rate"] == pytest.approx(math.ceil(TOKENS / 3) / TOKENS, abs=1e-7)


@pytest.mark.parametrize("toy", ["one-weight"], indirect=True)
def test_a_toy_policys_settings_are_checked(toy):
    with pytest.raises(ValueError, match="kvcat.num_groups=9: give at most 8"):
        KVCatConfig(policy="one-weight", num_groups=9)
    with pytest.raises(ValueError, match="kvcat.recent_window=2"):
        KVCatConfig(policy="one-weight", recent_window=2)
    for field, value in (("mask_per", "kv_head"), ("mask_span", "prefix")):
        with pytest.raises(ValueError, match=f"kvcat.{field}='{value}'.*one-weight"):
            KVCatConfig(**{"policy": "one-weight", field: value})


@pytest.mark.parametrize("toy", ["every-third"], indirect=True)
def test_a_toy_policys_target_reaches_reports(toy):
    assert keep_target(vars(KVCatConfig(policy="every-third"))) == 1 / 3


def compared_by_name(source: str) -> list[int]:
    """Lines that compare something called policy with a string."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            called = {getattr(x, "attr", getattr(x, "id", None)) for x in sides}
            called |= {getattr(x.slice, "value", None) for x in sides if isinstance(x, ast.Subscript)}
            words = [c for side in sides for c in ast.walk(side) if isinstance(c, ast.Constant)]
            if "policy" in called and any(c.value in POLICIES for c in words):
                lines.append(node.lineno)
    return lines


def test_no_file_compares_a_policys_name():
    assert compared_by_name('a = kvcat.policy == "router"\nb = x["policy"] in ("none", "random")') == [1, 2]
    files = [p for room in ("kvcat_nemo", "recipes", "conversion") for p in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    found = {str(p.relative_to(ROOT)): compared_by_name(p.read_text(encoding="utf-8")) for p in files}
    assert not {name: lines for name, lines in found.items() if lines}
