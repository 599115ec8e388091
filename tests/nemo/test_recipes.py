"""Recipes: all there, derived from NeMo's, refused when a setting does not fit, and planned without starting anything."""

import json
import re

import pytest
import torch

from tests.refusals import RUN

pytestmark = pytest.mark.nemo

NAMES = [
    "kvcat_tiny",
    "kvcat_tiny_prefix",
    "kvcat_smollm2_135m",
    "kvcat_qwen25_0p5b",
    "kvcat_qwen25_1p5b",
    "kvcat_qwen25_7b",
    "kvcat_qwen3_1p7b",
    "kvcat_llama31_8b",
]

# Published parameter counts of the plain models, embeddings tied where theirs are.
PUBLISHED = {
    "kvcat_smollm2_135m": 134_515_008,
    "kvcat_qwen25_0p5b": 494_032_768,
    "kvcat_qwen25_1p5b": 1_543_714_304,
    "kvcat_qwen25_7b": 7_615_616_512,
    "kvcat_qwen3_1p7b": 1_720_574_976,
    "kvcat_llama31_8b": 8_030_261_248,
}


@pytest.fixture(scope="module")
def recipes():
    from kvcat_nemo.recipes import RECIPES

    return RECIPES


def test_every_recipe_is_exported(recipes):
    assert list(recipes) == NAMES  # that nemo lists them is tested with its own --help (test_pretrain.py)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_builds_and_plans(recipes, name):
    from kvcat_nemo.nemo.plan import plan

    out = plan(recipes[name]())
    assert out["memory_per_gpu_bytes"]["total"] > 0 and out["flops_per_step"] > 0
    if name in PUBLISHED:
        assert out["parameters"]["total"] - out["parameters"]["routers"] == PUBLISHED[name]


def test_papers_settings(recipes):
    from kvcat_nemo.nemo.plan import plan

    small, large = plan(recipes["kvcat_qwen25_0p5b"]()), plan(recipes["kvcat_qwen25_1p5b"]())
    assert small["router_layers"] == [0, 6, 12, 18] and large["router_layers"] == [0, 7, 14, 21]
    recipe = recipes["kvcat_qwen25_0p5b"]()
    assert small["tokens_per_step"] == 131_072 and small["steps"] == 40_000  # 5.24 B tokens
    assert recipe.data.seq_length == 1024
    optimizer, schedule = recipe.optim.config, recipe.optim.lr_scheduler
    assert (optimizer.lr, schedule.min_lr, schedule.warmup_steps) == (1e-4, 5e-6, 600)
    assert (optimizer.weight_decay, optimizer.clip_grad) == (0.01, 1.0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2) == (0.9, 0.95)


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("trainer.max_stepz=3", "trainer.max_steps"),
        ("model.config.kvcat.polcy=random", "model.config.kvcat.policy"),
        ("dta.paths=1", "data"),
        ("trainer.strategy.tensor_parallel_size=2", "trainer.strategy.tensor_model_parallel_size"),
        ("data.global_batch=3", "data.global_batch_size"),
    ],
)
def test_unknown_override_gets_the_nearest_name(recipes, override, suggestion):
    from kvcat_nemo.recipes.overrides import check_overrides

    with pytest.raises(ValueError, match=suggestion.replace(".", r"\.")):
        check_overrides(recipes["kvcat_smollm2_135m"](), [override])


@pytest.mark.parametrize(
    "override",
    [
        "model.config.kvcat.policy=random",
        "model.config.kvcat.attention_backend=torch",
        "model.config.attention_backend=flash",
        "model.config.kvcat.router_init_keep=0.7",
        "trainer.max_steps=7",
        "trainer.strategy.ddp.overlap_grad_reduce=False",
        "data.paths=/tmp/x",
        "data.paths=['30','/a','70','/b']",
        "data.base=/tmp/y",
        "resume.base=/tmp/y",
        "resume.mode=must",
        "optim.config.lr=0.001",
        "log.name=mine",
        "trainer.plugins.fp8=hybrid",
        "trainer.plugins.fp8_param_gather=True",
    ],
)
def test_known_override_is_taken(recipes, override):
    from nemo_run.cli.cli_parser import parse_cli_args

    from kvcat_nemo.recipes.overrides import check_overrides

    recipe = recipes["kvcat_smollm2_135m"]()
    check_overrides(recipe, [override])
    value = parse_cli_args(recipe, [override])
    name, text = override.split("=", 1)
    for part in name.split("."):
        value = getattr(value, part)
    assert str(value).replace(" ", "").replace('"', "'") == text


@pytest.fixture
def cuda_alone(monkeypatch):
    """CUDA with PyTorch alone: no Transformer Engine, no apex, no flash-attn."""
    from kvcat_nemo.engine import hardware
    from kvcat_nemo.kernels.fused import selection

    monkeypatch.setattr(hardware, "is_cuda", lambda: True)
    monkeypatch.setattr(hardware, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(selection, "_installed", lambda package: False)


def model_configs():
    """Every model configuration that there is, by name."""
    from kvcat_nemo.nemo import model_configs

    found = [
        x
        for x in vars(model_configs).values()
        if isinstance(x, type) and issubclass(x, model_configs.KVCatModelConfig)
    ]
    return {x.__name__: x for x in found if x is not model_configs.KVCatModelConfig}


def test_every_model_starts_on_cuda_with_pytorch_alone(cuda_alone, monkeypatch):
    """NeMo asks for rotary embeddings of Transformer Engine's in some of them, which Megatron refuses without it."""
    from kvcat_nemo.engine import spec
    from kvcat_nemo.engine.config_checks import validate_model_config
    from kvcat_nemo.engine.spec import RMSNorm, has_transformer_engine, kvcat_block_spec

    monkeypatch.setattr(spec, "get_num_layers_to_build", lambda config, vp_stage=None: 1)  # no process group
    assert not has_transformer_engine()
    configs = model_configs()
    assert len(configs) == 8
    for name, config in configs.items():
        sizes = {
            "num_layers": 4,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 64,
        }
        built = config(**sizes if name in ("KVCatLlamaConfig", "KVCatQwen2Config") else {}, bf16=True)
        built.kvcat.num_groups = 1
        validate_model_config(built)
        assert not built.apply_rope_fusion and not built.gradient_accumulation_fusion, name
        assert built.bf16 and built.masked_softmax_fusion, f"{name}: the others stay"
        layer = kvcat_block_spec(built).submodules.layer_specs[0]
        assert layer.submodules.input_layernorm is RMSNorm, name


def test_rope_fusion_is_what_megatron_refuses(cuda_alone):
    """The check above would fail without the setting: Megatron itself says so."""
    from nemo.collections import llm

    with pytest.raises(ValueError, match="apply_rope_fusion is not available"):
        llm.Llama31Config8B()


def test_megatrons_attention_backend_comes_by_name():
    from megatron.core.transformer.enums import AttnBackend

    from kvcat_nemo.nemo.model_configs import KVCatSmolLM2Config135M

    assert KVCatSmolLM2Config135M().attention_backend is AttnBackend.auto
    assert KVCatSmolLM2Config135M(attention_backend="flash").attention_backend is AttnBackend.flash
    assert KVCatSmolLM2Config135M(attention_backend=AttnBackend.fused).attention_backend is AttnBackend.fused
    with pytest.raises(
        ValueError, match="attention_backend='te': choose one of auto, .*kvcat.attention_backend"
    ):
        KVCatSmolLM2Config135M(attention_backend="te")


def set_field(recipe, dotted, value):
    *path, last = dotted.split(".")
    for part in path:
        recipe = getattr(recipe, part)
    setattr(recipe, last, value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer.strategy.tensor_model_parallel_size": 2}, "num_attention_heads=9"),
        ({"trainer.strategy.context_parallel_size": 2}, "replicas of 2 .*context 2"),
        ({"trainer.strategy.pipeline_model_parallel_size": 3, "trainer.devices": 3}, "straddles"),
        ({"model.config.kvcat.num_groups": 31}, "num_groups=31"),
        ({"model.config.attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"model.config.kvcat.attention_backend": "te"}, "attention_backend=te"),
        ({"model.config.softmax_type": "learnable"}, "softmax_type='learnable'"),
        ({"trainer.devices": 2}, "global_batch_size=1"),
        ({"trainer.strategy.sequence_parallel": True}, "sequence_parallel"),
    ],
)
def test_plan_refuses_what_does_not_fit(recipes, changes, message):
    from kvcat_nemo.nemo.plan import plan

    recipe = recipes["kvcat_smollm2_135m"]()
    for name, value in changes.items():
        set_field(recipe, name, value)
    with pytest.raises(ValueError, match=message):
        plan(recipe)


@pytest.mark.parametrize("refusal", RUN, ids=lambda r: r.form)
def test_refused_runs_are_accepted_as_proposed(recipes, refusal):
    from kvcat_nemo.nemo.plan import plan

    recipe = recipes["kvcat_qwen25_0p5b"]()
    for name, value in refusal.given.items():
        set_field(recipe, name, value)
    name, value = next(iter(refusal.given.items()))
    with pytest.raises(ValueError, match=f"{re.escape(name)}={value!r}: ") as error:
        plan(recipe)
    assert all(text in str(error.value) for text in refusal.says)
    for name, value in refusal.fix.items():
        set_field(recipe, name, value)
    plan(recipe)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tp_comm_overlap": True}, "MegatronCommOverlapCallback.tp_comm_overlap=True"),
        ({"overlap_param_gather_with_optimizer_step": True}, "overlap_param_gather_with_optimizer_step=True"),
        ({"defer_embedding_wgrad_compute": True}, "defer_embedding_wgrad_compute=True"),
        ({"tp_comm_overlap": False, "bucket_size": 1000}, None),
    ],
)
@pytest.mark.parametrize("built", [False, True])
def test_what_nemos_overlap_callback_would_set_later_is_refused_now(recipes, arguments, said, built):
    import fiddle as fdl
    import nemo_run as run
    from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

    from kvcat_nemo.nemo.trainer_settings import check_run_settings

    recipe = recipes["kvcat_qwen25_7b"]()
    callback = run.Config(MegatronCommOverlapCallback, **arguments)
    callbacks = [fdl.build(callback) if built else callback]
    trainer = recipe.trainer
    if said is None:
        check_run_settings(trainer.strategy, recipe.optim.config, trainer.plugins, callbacks)
        return
    with pytest.raises(ValueError, match=said):
        check_run_settings(trainer.strategy, recipe.optim.config, trainer.plugins, callbacks)


def test_every_setting_of_strategy_and_precision_is_looked_at(recipes):
    import dataclasses
    import inspect

    import fiddle as fdl
    from megatron.core.distributed import DistributedDataParallelConfig
    from nemo import lightning as nl

    from kvcat_nemo.engine import megatron_settings as model
    from kvcat_nemo.nemo import trainer_settings
    from kvcat_nemo.nemo.plan import PARALLEL_FIELDS

    known = {
        *trainer_settings.PASSES,
        *trainer_settings.TESTED,
        *PARALLEL_FIELDS,
        "microbatch_group_size_per_vp_stage",
    }
    for function, table in (
        (nl.MegatronStrategy.__init__, trainer_settings.STRATEGY),
        (DistributedDataParallelConfig.__init__, trainer_settings.DDP),
        (nl.MegatronMixedPrecision.__init__, trainer_settings.PRECISION),
    ):
        names = set(inspect.signature(function).parameters) - {"self", "kwargs"}
        assert names - known - set(table) == set()
    for recipe in recipes.values():
        config = fdl.build(recipe().model.config)
        names = [field.name for field in dataclasses.fields(config)]
        assert [name for name in names if model.verdict_on(name) is None] == []


def test_precision_in_a_list_of_plugins_is_looked_at_too(recipes):
    from kvcat_nemo.nemo.trainer_settings import check_run_settings

    recipe = recipes["kvcat_tiny"]()
    trainer = recipe.trainer
    trainer.plugins.fp8 = "hybrid"
    with pytest.raises(ValueError, match="trainer.plugins.fp8='hybrid'"):
        check_run_settings(trainer.strategy, recipe.optim.config, [trainer.plugins], ())


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("built", [False, True])
def test_float16_is_refused_in_every_form_of_plugins(recipes, listed, built):
    """What `trainer.plugins` may be: one plugin or several, as a recipe has them and as a trainer gets them."""
    from types import SimpleNamespace

    import fiddle as fdl

    from kvcat_nemo.nemo.plan import checked_layout

    recipe = recipes["kvcat_tiny"]()
    precision = recipe.trainer.plugins
    precision.precision = "16-mixed"
    if built:  # as on CUDA; a CPU host's plugin is always float32
        precision = SimpleNamespace(dtype_config=SimpleNamespace(fp16=True))
    given = (fdl.build(recipe.model.config), recipe.trainer.strategy, recipe.data, recipe.optim.config, 1)
    with pytest.raises(ValueError, match="trainer.plugins.precision='16-mixed'"):
        checked_layout(*given, [precision] if listed else precision)


def test_the_page_of_settings_is_what_the_tables_say():
    from benchmarks.settings_page import PAGE, render

    page = PAGE.read_text(encoding="utf-8")
    assert page == render(page) and page.count("\n| `model.config.") > 50


def test_data_parallelism_is_nemos(recipes):
    """What NeMo's recipes set stays, but for the one setting that the guard replaces."""
    from nemo.collections.llm.recipes import llama31_8b, qwen3_1p7b

    for theirs, ours in ((llama31_8b, "kvcat_llama31_8b"), (qwen3_1p7b, "kvcat_qwen3_1p7b")):
        wanted = dict(theirs.pretrain_recipe().trainer.strategy.ddp.__arguments__)
        found = dict(recipes[ours]().trainer.strategy.ddp.__arguments__)
        changed = {name for name in {*wanted, *found} if wanted.get(name) != found.get(name)}
        assert changed == {"check_for_nan_in_grad"} and found["average_in_collective"] is True
    for name in NAMES:
        strategy = recipes[name]().trainer.strategy
        assert strategy.ddp.average_in_collective and strategy.ckpt_optim_fully_reshardable, name


def test_base_of_another_architecture_is_refused(recipes, tmp_path):
    import fiddle as fdl

    from kvcat_nemo.nemo.base_model import CARD, check_base

    model_configs = fdl.build(recipes["kvcat_smollm2_135m"]().model.config)
    right = {
        "num_layers": 30,
        "hidden_size": 576,
        "ffn_hidden_size": 1536,
        "num_attention_heads": 9,
        "num_query_groups": 3,
        "kv_channels": 64,
        "rotary_base": 100000.0,
        "rms_norm_eps": 1e-5,
        "tied": True,
        "qkv_bias": False,
        "qk_norm": False,
    }
    (tmp_path / CARD).write_text(json.dumps({"architecture": right}))
    check_base(tmp_path, model_configs)
    (tmp_path / CARD).write_text(json.dumps({"architecture": right | {"rms_norm_eps": 1e-6}}))
    with pytest.raises(ValueError, match=r"layernorm_epsilon=1e-05.*1e-06"):
        check_base(tmp_path, model_configs)


def test_data_paths_that_do_not_exist_are_named(tmp_path):
    from kvcat_nemo.nemo.data_module import dataset_paths

    with pytest.raises(ValueError, match=r"train\.bin does not exist.*kvcat data build"):
        dataset_paths(tmp_path)
    with pytest.raises(ValueError, match="train and validation"):
        dataset_paths({"train": "x"})
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"))
    builder.add_item(torch.arange(3))
    builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    assert dataset_paths(["0.3", str(tmp_path / "a")]) == ["0.3", str(tmp_path / "a")]


def test_broken_recipe_import_is_loud(tmp_path):
    """nemo-run prints and goes on when an entry point fails; our own command must not."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['kvcat_nemo.recipes.base'] = None\n"
        "sys.argv = ['kvcat', 'train', 'list']\n"
        "from kvcat_nemo.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0 and "kvcat_nemo.recipes.base" in result.stderr


@pytest.mark.parametrize(
    "argument", ["log.extra_loggers=http://ann:s3cret-word@host:5000", "model.hf_token=s3cret-word"]
)
def test_credentials_on_the_command_line_are_refused(recipes, monkeypatch, argument):
    """Before NeMo prints them or writes them to cmd-args.log; the message does not repeat them."""
    monkeypatch.setattr("sys.argv", ["nemo", "llm", "pretrain", "--factory", "kvcat_tiny", "-y", argument])
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as error:
        recipes["kvcat_tiny"]()
    assert "s3cret-word" not in str(error.value)
