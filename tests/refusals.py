"""Layouts that are refused, and the change that each message proposes. docs/parallelism.md lists them.

Model refusals are seen by engine.config_checks.validate_model_config, layout refusals by engine.cost.Layout.check, run refusals by
nemo.plan (`kvcat train plan`, and every run before it starts a process group).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Refusal:
    form: str
    """In words, for the page."""
    given: dict
    """Fields and values: of the model's configuration and its `kvcat.…`, of `layout.…`, or dotted ones of a recipe."""
    says: tuple[str, ...]
    """What the message must contain besides the first field's name and value."""
    fix: dict = field(default_factory=dict)
    """Fields that the message proposes, with which the rest is accepted."""


PP, VP, TP = (
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "tensor_model_parallel_size",
)

# Of a model of 24 layers in four groups, 8 heads on 4 KV heads, feed-forward width 64.
MODEL = [
    Refusal(
        "a layer group across pipeline stages",
        {"kvcat.num_groups": 4, PP: 3},
        ("straddles", "layer 8", f"{PP}=2 or 4", "kvcat.num_groups=3 or 6"),
        {PP: 4},
    ),
    Refusal(
        "a layer group across pipeline stages",
        {"kvcat.num_groups": 4, PP: 6},
        ("group 0 (layers 0 to 5)", "layer 4", f"{PP}=4", "kvcat.num_groups=6"),
        {"kvcat.num_groups": 6},
    ),
    Refusal(
        "a layer group across chunks of an interleaved pipeline",
        {"kvcat.num_groups": 4, PP: 4, VP: 2},
        (f"{VP}=2", f"{PP}=2", f"{VP}=None", "kvcat.num_groups=8"),
        {VP: None},
    ),
    Refusal(
        "interleaved pipeline of two stages, batched exchange",
        {"batch_p2p_comm": True, PP: 2, VP: 2},
        ("taken for one another", "set batch_p2p_comm=False"),
        {"batch_p2p_comm": False},
    ),
    Refusal(
        "interleaved pipeline, exchange both batched and overlapped",
        {"batch_p2p_comm": True, "overlap_p2p_comm": True, PP: 2, VP: 2},
        ("overlap_p2p_comm=True", "set it to False"),
        {"batch_p2p_comm": False},
    ),
    Refusal(
        "overlapped exchange of a pipeline that is not interleaved",
        {"overlap_p2p_comm": True, "batch_p2p_comm": False, PP: 2},
        ("set it to False", VP),
        {"overlap_p2p_comm": False},
    ),
    Refusal(
        "outputs freed while an overlapped exchange sends them (CPU hosts)",
        {
            "deallocate_pipeline_outputs": True,
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
            PP: 2,
            VP: 2,
        },
        ("CPU host", "set it to False"),
        {"deallocate_pipeline_outputs": False},
    ),
    Refusal("interleaved pipeline of one stage", {VP: 2}, ("set it to None",), {VP: None}),
    Refusal("interleaved pipeline of one chunk a stage", {VP: 1, PP: 2}, ("set it to None",), {VP: None}),
    Refusal(
        "layers that do not divide into stages",
        {PP: 5, "kvcat.num_groups": 24},
        ("24 layers do not divide into 5 stages", "use 4 or 6"),
        {PP: 6},
    ),
    Refusal(
        "layers that do not divide into chunks",
        {PP: 4, VP: 4, "kvcat.num_groups": 24},
        ("24 layers do not divide into 4 stages of 4 chunks", "use 3 or 6"),
        {PP: 3},
    ),
    *(
        Refusal("uneven pipeline stages", {name: value, PP: 2}, ("uneven", "unset it"), {name: None})
        for name, value in {
            "num_layers_in_first_pipeline_stage": 8,
            "num_layers_in_last_pipeline_stage": 8,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
            "pipeline_model_parallel_layout": "Et*12|t*12L",
        }.items()
    ),
    Refusal(
        "fewer KV heads than tensor-parallel ranks",
        {TP: 8},
        ("num_query_groups=4", "gives no KV head to two ranks", "use 1 or 2 or 4"),
        {TP: 4},
    ),
    Refusal(
        "heads that do not divide over tensor-parallel ranks", {TP: 3}, ("num_attention_heads=8",), {TP: 2}
    ),
    Refusal(
        "sequence parallelism without tensor parallelism",
        {"sequence_parallel": True},
        ("set it to False",),
        {"sequence_parallel": False},
    ),
    Refusal(
        "context parallelism by other exchanges than gathering",
        {"cp_comm_type": "p2p", "context_parallel_size": 2},
        ("set it to None or 'all_gather'",),
        {"cp_comm_type": "all_gather"},
    ),
    Refusal(
        "context parallelism in a hierarchy of groups",
        {"hierarchical_context_parallel_sizes": [2, 2], "context_parallel_size": 4},
        ("set it to None",),
        {"hierarchical_context_parallel_sizes": None},
    ),
    Refusal(
        "context parallelism with masks behind a cut",
        {"context_parallel_size": 2, "kvcat.policy": "random", "kvcat.mask_span": "prefix"},
        ("on one rank alone", "set it to 1", "kvcat.mask_span=window"),
        {"context_parallel_size": 1},
    ),
    Refusal(
        "expert parallelism",
        {"expert_model_parallel_size": 2},
        ("set it to 1",),
        {"expert_model_parallel_size": 1},
    ),
    Refusal(
        "saved activations spread over ranks",
        {
            "distribute_saved_activations": True,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
        },
        ("set it to False",),
        {"distribute_saved_activations": False},
    ),
]

# Of 8 processes, micro-batches of 2, global batches of 16, 1,024 tokens.
LAYOUT = [
    Refusal(
        "processes that are no whole replicas",
        {"layout.world_size": 8, "layout.tensor": 3},
        ("replicas of 3",),
        {"layout.tensor": 4},
    ),
    Refusal(
        "a global batch that is no whole micro-batches",
        {"layout.global_batch_size": 18, "layout.tensor": 2},
        ("use 24",),
        {"layout.global_batch_size": 24},
    ),
    Refusal(
        "sequence parallelism over a length that does not divide",
        {"layout.seq_length": 1023, "layout.tensor": 4, "layout.sequence_parallel": True},
        ("use 1024",),
        {"layout.seq_length": 1024},
    ),
    Refusal(
        "context parallelism over a length that does not divide into two chunks a rank",
        {"layout.seq_length": 1026, "layout.context": 2},
        ("2 · 2 chunks", "use 1028"),
        {"layout.seq_length": 1028},
    ),
    Refusal(
        "context and sequence parallelism over a length that does not divide",
        {
            "layout.seq_length": 1000,
            "layout.context": 2,
            "layout.tensor": 3,
            "layout.sequence_parallel": True,
            "layout.world_size": 6,
            "layout.global_batch_size": 8,
        },
        ("2 · 2 chunks", "sequence parallelism", "multiple of 12", "use 1008"),
        {"layout.seq_length": 1008},
    ),
    Refusal(
        "packed documents under context parallelism",
        {"layout.packed_documents": True, "layout.context": 2},
        ("set it to False",),
        {"layout.packed_documents": False},
    ),
    Refusal(
        "interleaved pipeline with micro-batches that do not divide into its groups",
        {"layout.global_batch_size": 20, "layout.pipeline": 4, PP: 4, VP: 2, "kvcat.num_groups": 8},
        ("groups of 4", "5 do not", "use 32"),
        {"layout.global_batch_size": 32},
    ),
    Refusal(
        "interleaved pipeline with smaller groups of micro-batches than stages",
        {"microbatch_group_size_per_vp_stage": 2, "layout.pipeline": 4, PP: 4, VP: 2, "kvcat.num_groups": 8},
        ("fewer than the 4 stages",),
        {"microbatch_group_size_per_vp_stage": None},
    ),
]

# Of the recipe kvcat_qwen25_0p5b.
STRATEGY = "trainer.strategy"
RUN = [
    Refusal(
        "distributed optimizer in several instances",
        {f"{STRATEGY}.num_distributed_optimizer_instances": 2},
        ("set it to 1",),
        {f"{STRATEGY}.num_distributed_optimizer_instances": 1},
    ),
    Refusal(
        "fully sharded data parallelism",
        {f"{STRATEGY}.ddp.use_megatron_fsdp": True},
        ("set it to False",),
        {f"{STRATEGY}.ddp.use_megatron_fsdp": False},
    ),
    Refusal(
        "parameter gathering overlapped with the optimizer's step",
        {"optim.config.overlap_param_gather_with_optimizer_step": True},
        ("set it to False",),
        {"optim.config.overlap_param_gather_with_optimizer_step": False},
    ),
    Refusal(
        "overlapped parameter gathering without a distributed optimizer",
        {f"{STRATEGY}.ddp.overlap_param_gather": True, "optim.config.use_distributed_optimizer": False},
        ("set it to False",),
        {f"{STRATEGY}.ddp.overlap_param_gather": False},
    ),
    Refusal(
        "tensor-parallel communication overlap",
        {"model.config.tp_comm_overlap": True},
        ("one window batch", "Set it to False"),
        {"model.config.tp_comm_overlap": False},
    ),
    Refusal(
        "FP8 linear layers",
        {"trainer.plugins.fp8": "hybrid"},
        ("one scale", "core attention, too, would stay in bf16", "set it to None"),
        {"trainer.plugins.fp8": None},
    ),
    Refusal(
        "CUDA graphs",
        {"model.config.cuda_graph_impl": "local"},
        ("mask", "set it to 'none'"),
        {"model.config.cuda_graph_impl": "none"},
    ),
    Refusal(
        "CPU offloading of activations",
        {"model.config.cpu_offloading": True, "model.config.cpu_offloading_num_layers": 4},
        ("set it to False", "recompute"),
        {"model.config.cpu_offloading": False},
    ),
    Refusal(
        "optimizer states on the host",
        {"optim.config.optimizer_cpu_offload": True},
        ("set it to False",),
        {"optim.config.optimizer_cpu_offload": False},
    ),
]
