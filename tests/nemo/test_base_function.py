"""What changes a model's function is the base's: compared before a run starts, trained exactly, recorded, compared again."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.nemo

ROPES = {
    "plain": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 8.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Kind of rope → (Hugging Face folder, imported folder)."""
    from kvcat_nemo.conversion.importing import import_hf
    from tests.conversion.conversion_models import build

    root, out = tmp_path_factory.mktemp("bases"), {}
    for kind, rope in ROPES.items():
        hf = build("llama3", root / f"{kind}-hf", rope_scaling=rope, head_dim=16, rms_norm_eps=1e-5)
        out[kind] = (hf, import_hf(hf, root / kind))
    return out


def recipe(base=None, **fields):
    """A recipe whose model is that of `bases`, but for its rope; further fields of the model's configuration."""
    import nemo_run as run

    from kvcat_nemo.nemo.model_configs import KVCatLlamaConfig
    from kvcat_nemo.recipes import RECIPES

    out = RECIPES["kvcat_smollm2_135m"](base=None if base is None else str(base))
    kvcat = out.model.config.kvcat
    kvcat.num_groups, kvcat.router_dim = 2, 8
    shape = dict(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=128,
        seq_length=256,
        rotary_base=10000,
        layernorm_epsilon=1e-5,
        share_embeddings_and_output_weights=False,
    )
    out.model.config = run.Config(KVCatLlamaConfig, kvcat=kvcat, **(shape | fields))
    return out


def built(**fields):
    import fiddle as fdl

    return fdl.build(recipe(**fields).model.config)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_another_rope_is_refused_and_the_proposed_override_is_taken(bases, kind):
    """The error's own words, on a command line, make the run fit its base."""
    from nemo_run.cli.cli_parser import parse_cli_args

    from kvcat_nemo.nemo.plan import plan
    from kvcat_nemo.recipes.overrides import check_overrides

    base = bases[kind][1]
    with pytest.raises(
        ValueError, match=r"model.config.rope_scaling=None, but the base model .* has \{"
    ) as error:
        plan(recipe(base))
    override = str(error.value).split('set "')[1].split('"')[0]
    again = recipe(base)
    check_overrides(again, [override])
    out = plan(parse_cli_args(again, [override]))
    assert out["base"] == {"path": str(base), "compared": True}
    # A run for a base with scaling does not fit one without.
    with pytest.raises(ValueError, match="rope_type.*but the base model"):
        plan(parse_cli_args(recipe(bases["plain"][1]), [override]))


def gelu(x):
    return torch.nn.functional.gelu(x)


OTHER = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 100,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 32,
    "vocab_size": 256,
    "layernorm_epsilon": 1e-6,
    "share_embeddings_and_output_weights": True,
    "add_qkv_bias": True,
    "add_bias_linear": True,
    "qk_layernorm": True,
    "activation_func": gelu,
    "softmax_scale": 0.5,
    "window_size": (8, 0),
    "rotary_base": 500000,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "seq_len_interpolation_factor": 2.0,
    "normalization": "LayerNorm",
    "layernorm_zero_centered_gamma": True,
    "gated_linear_unit": False,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
    "position_embedding_type": "learned_absolute",
    "rotary_percent": 0.5,
    "rotary_interleaved": True,
    "softmax_type": "off-by-one",
    "apply_residual_connection_post_layernorm": True,
    "no_rope_freq": 2,
    "mrope_section": [4, 2, 2],
    "multi_latent_attention": True,
    "num_moe_experts": 4,
    "mtp_num_layers": 1,
    "heterogeneous_block_specs": True,
    "is_hybrid_model": True,
}


def test_every_field_of_the_function_is_tried():
    from kvcat_nemo.models.function import PER_MODEL, ROPE_FIELDS, SAME_EVERYWHERE

    nemos = set(ROPE_FIELDS[2:])  # NeMo's fields of Llama 3.1, which this configuration does not have
    assert set(OTHER) == {*PER_MODEL, *SAME_EVERYWHERE, *ROPE_FIELDS} - nemos


@pytest.mark.parametrize("name", OTHER)
def test_every_field_that_changes_the_function_is_compared(bases, name):
    from kvcat_nemo.nemo.base_model import check_base

    config = built()
    check_base(bases["plain"][1], config)
    setattr(config, name, OTHER[name])
    shown = "rope_scaling" if name == "seq_len_interpolation_factor" else name
    with pytest.raises(ValueError, match=rf"model\.config\.{shown}=.*, but the base model .* has "):
        check_base(bases["plain"][1], config)


# Fields of Megatron's and NeMo's configurations that leave the function of a trained model as it is.
HARMLESS = {
    "layouts and communication": """
        tensor_model_parallel_size pipeline_model_parallel_comm_backend pipeline_model_parallel_size
        virtual_pipeline_model_parallel_size sequence_parallel context_parallel_size hierarchical_context_parallel_sizes
        expert_model_parallel_size expert_tensor_parallel_size moe_extended_tp num_layers_in_first_pipeline_stage
        num_layers_in_last_pipeline_stage pipeline_model_parallel_layout account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split cp_comm_type parallel_output scatter_embedding_sequence_parallel
        make_vocab_size_divisible_by clone_scatter_output_in_embedding symmetric_ar_type hetereogenous_dist_checkpoint
        microbatch_group_size_per_vp_stage overlap_p2p_comm overlap_p2p_comm_warmup_flush batch_p2p_comm batch_p2p_sync
        use_ring_exchange_p2p deallocate_pipeline_outputs defer_embedding_wgrad_compute wgrad_deferral_limit
        overlap_moe_expert_parallel_comm delay_wgrad_compute async_tensor_model_parallel_allreduce
        tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
        tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs
        tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend tp_comm_overlap_cfg
        variable_seq_lengths pipeline_dtype barrier_with_L1_time timers finalize_model_grads_func grad_scale_func
        no_sync_func grad_sync_func param_sync_func num_microbatches_with_partial_activation_checkpoints
        cpu_offloading cpu_offloading_num_layers _cpu_offloading_context cpu_offloading_activations
        cpu_offloading_weights cpu_offloading_double_buffering gradient_accumulation_fusion use_te_rng_tracker
    """,
    "precision and kernels": """
        attention_backend fp32_residual_connection activation_func_fp8_input_store apply_query_key_layer_scaling
        attention_softmax_in_fp32 disable_bf16_reduced_precision_matmul bias_activation_fusion masked_softmax_fusion
        persist_layer_norm memory_efficient_layer_norm bias_dropout_fusion apply_rope_fusion
        use_fused_weighted_squared_relu fused_single_qkv_rope fp8 fp8_recipe fp8_param fp8_margin fp8_interval
        fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_dot_product_attention fp8_multi_head_attention
        tp_only_amax_red first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 use_kitchen fp4
        fp4_recipe fp4_param fp16 bf16 params_dtype enable_autocast autocast_dtype deterministic_mode
        use_te_activation_func cross_entropy_loss_fusion cross_entropy_fusion_impl fp16_lm_cross_entropy quant_recipe
        transformer_impl use_transformer_engine_full_layer_spec use_transformer_engine_op_fuser transformer_layer_spec
        enable_cuda_graph cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps
        external_cuda_graph cuda_graph_impl cuda_graph_scope disable_parameter_transpose_cache
        recompute_granularity recompute_method recompute_num_layers distribute_saved_activations recompute_modules
    """,
    "training": """
        mtp_loss_scaling_factor hidden_dropout attention_dropout calculate_per_token_loss init_method
        output_layer_init_method init_method_std embedding_init_method embedding_init_method_std
        init_model_with_meta_device perform_initialization use_cpu_initialization test_mode config_logger_dir seq_length
        forward_step_fn data_step_fn kvcat
    """,
    "inference": "flash_decode inference_rng_tracker inference_sampling_seed mlp_chunks_for_prefill generation_config",
    "only with a window": "window_attn_skip_freq",
    "read through vocab_size": "true_vocab_size",
}
# Of mixtures of experts and of Mamba, which models without num_moe_experts and is_hybrid_model do not have.
PREFIXES = ("moe_", "mamba_", "use_mamba_")


def test_every_field_of_megatron_and_nemo_is_classified():
    """A field that a new version brings must be looked at: does it change the function?"""
    from kvcat_nemo.models.function import PER_MODEL, ROPE_FIELDS, SAME_EVERYWHERE
    from kvcat_nemo.nemo.model_configs import (
        KVCatLlama31Config8B,
        KVCatLlamaConfig,
        KVCatQwen2Config,
        KVCatQwen3Config1P7B,
    )

    known = {*PER_MODEL, *SAME_EVERYWHERE, *ROPE_FIELDS}
    harmless = {name for names in HARMLESS.values() for name in names.split()}
    assert not known & harmless
    kinds = (KVCatLlamaConfig, KVCatLlama31Config8B, KVCatQwen2Config, KVCatQwen3Config1P7B)
    found = {f.name for kind in kinds for f in dataclasses.fields(kind)}
    # Qwen 3's configuration says how long its context is, as config.json does.
    strange = found - known - harmless - {"max_position_embeddings"}
    assert not {name for name in strange if not name.startswith(PREFIXES)}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    from kvcat_nemo.engine import hardware

    hardware.enable()
    from megatron.core import parallel_state, tensor_parallel

    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def logits_before_training(config, imported, ids):
    """Of the model that a run builds and fills from its base, in float64, rotary angles of the run's own float32."""
    from megatron.core import dist_checkpointing

    model = config.configure_model(None).eval()
    state = {k: v for k, v in model.sharded_state_dict().items() if ".router." not in k}
    loaded = dist_checkpointing.load(state, str(imported / "weights"))
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert not unexpected and all(".router." in name or "_extra_state" in name for name in missing)
    position = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return model(ids, position)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("plain", {}),
        ("linear", {"rope_scaling": ROPES["linear"]}),
        ("linear", {"seq_len_interpolation_factor": 4.0}),
        ("llama3", {"rope_scaling": ROPES["llama3"]}),
    ],
    ids=["plain", "linear", "interpolation", "llama3"],
)
def test_the_run_starts_as_exactly_the_base(bases, one_process, kind, fields):
    from kvcat_nemo.models.frequencies import inverse_frequencies
    from kvcat_nemo.models.load import load_causal_lm
    from kvcat_nemo.models.rope import read_rope
    from kvcat_nemo.nemo.base_model import check_base

    hf, imported = bases[kind]
    ids = torch.randint(0, 128, (1, 200), generator=torch.Generator().manual_seed(3))
    config = built(**fields)
    check_base(imported, config)
    reference = load_causal_lm(hf)
    with torch.no_grad():
        wanted = reference(ids).logits
    ours = logits_before_training(config, imported, ids)
    assert (ours - wanted).abs().max() < 1e-4
    rope = read_rope(json.loads((hf / "config.json").read_text()))
    model = config.configure_model(None)
    assert torch.equal(model.rotary_pos_emb.inv_freq, inverse_frequencies(16, rope.theta, rope.scaling))
    if kind != "plain":  # and that the rope matters here
        other = logits_before_training(built(), imported, ids)
        assert (other - wanted).abs().max() > 0.1


def test_resuming_with_another_function_is_refused(tmp_path):
    from kvcat_nemo.models.function import write_record
    from kvcat_nemo.nemo.base_model import check_resumed, trained_function
    from kvcat_nemo.runs.layout import RECORD

    checkpoint = tmp_path / "run" / "checkpoints" / "step=2"
    (checkpoint / "weights").mkdir(parents=True)
    scaled = built(rope_scaling=ROPES["linear"])
    check_resumed(checkpoint, scaled)  # one from before there were records, whose run is gone
    write_record(checkpoint, trained_function(scaled))
    check_resumed(checkpoint, scaled)
    with pytest.raises(ValueError, match="rope_scaling=None, but the run's checkpoint .* start it as before"):
        check_resumed(checkpoint, built())
    (checkpoint / RECORD).write_text("{")  # left to the manifest, which sets the checkpoint aside
    check_resumed(checkpoint, built())


def test_a_run_of_before_is_known_by_its_configuration(tmp_path):
    """kvcat/config.json of older runs holds the model's settings, callables left out."""
    from kvcat_nemo.models.function import stored_function
    from kvcat_nemo.nemo.base_model import check_resumed
    from kvcat_nemo.nemo.records import _plain

    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step=2"
    (checkpoint / "weights").mkdir(parents=True)
    (run / "kvcat").mkdir()
    described = {"model": _plain(built(rope_scaling=ROPES["llama3"]))}
    (run / "kvcat" / "config.json").write_text(json.dumps(described, default=str))
    for place in (checkpoint, checkpoint / "weights"):
        function, file = stored_function(place)
        assert file == run / "kvcat" / "config.json" and function["rope_scaling"]["factor"] == 4.0
    check_resumed(checkpoint, built(rope_scaling=ROPES["llama3"]))
    with pytest.raises(ValueError, match="rope_scaling=None"):
        check_resumed(checkpoint, built())


def test_a_start_is_refused_before_anything_is_set_up(bases):
    from kvcat_nemo.nemo.resume import KVCatResume

    trainer = SimpleNamespace(strategy=SimpleNamespace())
    with pytest.raises(ValueError, match=r"model.config.rope_scaling=None, but the base model"):
        KVCatResume(base=str(bases["linear"][1])).setup(trainer, SimpleNamespace(config=built()))


def test_a_base_whose_config_was_changed_after_the_import_is_refused(bases, tmp_path):
    from kvcat_nemo.nemo.base_model import check_base

    base = Path(shutil.copytree(bases["linear"][1], tmp_path / "base"))
    path = base / "hf" / "config.json"
    config = json.loads(path.read_text())
    config["rope_scaling"]["factor"] = 2.0
    path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"rope_scaling = .*2.0.*says .*4.0.*config.json was changed after the import"
    ):
        check_base(base, built(rope_scaling=ROPES["linear"]))
