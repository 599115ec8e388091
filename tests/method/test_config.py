"""Refusals name the field and the value; layer groups are the paper's."""

import pytest

from kvcat_nemo.method.config import KVCatConfig, keep_target

BAD = [
    ("policy", "topk"),
    ("router_input", "both"),
    ("target_keep_fraction", 0.0),
    ("target_keep_fraction", 1.0),
    ("target_keep_fraction", -0.5),
    ("num_groups", 0),
    ("router_dim", 0),
    ("router_init_keep", 0.49),
    ("router_init_keep", 1.01),
    ("router_init_jitter", -0.1),
    ("router_lr_mult", 0),
    ("router_lr_mult", -1.0),
    ("distill_temperature", 0.0),
    ("distill_forward_share", 1.5),
    ("distill_forward_share", -0.1),
    ("mask_span", "segment"),
    ("mask_span", "prefix"),  # of a router, the default policy
    ("prefix_keep_min", 0.0),
    ("prefix_keep_min", 1.5),
    ("prefix_keep_max", 0.02),  # below the default's least fraction
    ("prefix_keep_max", 1.01),
    ("prefix_cut_multiple", 0),
    ("sinks", -1),
    ("recent_window", 0),
    ("gate_gradient_cap", -1.0),
    ("gate_gradient_cap", 81.0),
    ("distill_weight", -1.0),
    ("budget_weight", -0.1),
    ("anchor_weight", -2.0),
    ("anchor_weight", float("nan")),
]


@pytest.mark.parametrize("name,value", BAD)
def test_refusal_names_the_field_the_value_and_a_fix(name, value):
    with pytest.raises(ValueError) as error:
        KVCatConfig(**{name: value})
    field, fix = str(error.value).split(": ", 1)
    assert field == f"kvcat.{name}={value!r}" and len(fix) > 10


def test_a_later_change_is_refused_when_validated_again():
    config = KVCatConfig()
    config.policy = "topk"
    with pytest.raises(ValueError, match="policy='topk'"):
        config.validate()


@pytest.mark.parametrize(
    "layers,groups,starts",
    [(24, 4, (0, 6, 12, 18)), (28, 4, (0, 7, 14, 21)), (30, 4, (0, 7, 15, 22)), (2, 2, (0, 1)), (5, 1, (0,))],
)
def test_layer_groups(layers, groups, starts):
    config = KVCatConfig(num_groups=groups)
    assert config.group_starts(layers) == starts
    found = [config.group_of_layer(layer, layers) for layer in range(layers)]
    assert found == sorted(found) and set(found) == set(range(groups))
    assert [found.index(group) for group in range(groups)] == list(starts)


def test_more_groups_than_layers_are_refused():
    with pytest.raises(ValueError, match="num_groups=4.*number of layers, 3"):
        KVCatConfig().group_starts(3)


@pytest.mark.parametrize("policy", ["router", "random", "attention", "none"])
def test_paired(policy):
    assert KVCatConfig(policy=policy).paired == (policy != "none")


def test_a_mask_per_kv_head_is_the_routers_alone():
    assert KVCatConfig(mask_per="kv_head").mask_per == "kv_head"
    with pytest.raises(ValueError, match="mask_per='kv_head'.*token"):
        KVCatConfig(policy="random", mask_per="kv_head")


def test_masks_behind_a_cut_are_the_random_policys():
    assert KVCatConfig(policy="random", mask_span="prefix").masks_prefix
    control = KVCatConfig(
        policy="none", mask_span="prefix"
    )  # the equal-token control of such a run, by one override
    assert not control.masks_prefix and not KVCatConfig(policy="random").masks_prefix
    for policy in ("router", "attention"):
        with pytest.raises(ValueError, match=f"mask_span='prefix'.*{policy}.*policy=random"):
            KVCatConfig(policy=policy, mask_span="prefix")
    with pytest.raises(ValueError, match="recent_window=4.*mask_span=prefix.*give 1"):
        KVCatConfig(policy="random", mask_span="prefix", recent_window=4)
    with pytest.raises(
        ValueError, match=r"prefix_keep_max=0.1: give a fraction from prefix_keep_min=0.2 to 1"
    ):
        KVCatConfig(prefix_keep_min=0.2, prefix_keep_max=0.1)
    equal = KVCatConfig(prefix_keep_min=0.2, prefix_keep_max=0.2)
    assert equal.prefix_keep_min == equal.prefix_keep_max


def test_the_keep_rate_that_records_show_a_run_to_aim_at():
    assert keep_target(vars(KVCatConfig())) == 0.5 and keep_target({"target_keep_fraction": 0.3}) == 0.3
    assert (
        keep_target(vars(KVCatConfig(policy="random", mask_span="prefix"))) is None
        and keep_target({}) is None
    )
