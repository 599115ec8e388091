"""The parallel matrix: every layout and way of computing that must train as one process does. One line a case.

A case is a recipe (what is trained; one process trains it too, as the reference), a layout, and options that must change
nothing. `case` tells them apart by name:

| part    | settings |
|---------|----------|
| recipe  | `model` (small_models.MODELS), `kvcat` and `fields` (over its settings), `dtype`, `tokens`, `windows` (a micro-batch's), |
|         | `micro` (micro-batches a step, over all data-parallel ranks), `updates` (optimizer steps before the one compared), |
|         | `all_tokens` (no loss mask), `packed` (several documents in a window) |
| layout  | `tp`, `pp`, `vp`, `cp`, `sp`, `dp`; processes = tp·pp·cp·dp |
| options | `dist_opt`, `overlap_grad`, `overlap_param`, `align` (collectives started by the schedule), `recompute`, `loss_scale`, |
|         | `config` (other fields of Megatron's that must change nothing) |

Tolerance: largest difference of any figure (relative where it exceeds 1) and of any gradient (relative to the parameter's
largest), with the reason why it is no smaller. Masks must be equal, always.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

LAYOUT = ("tp", "pp", "vp", "cp", "sp", "dp")
OPTIONS = ("dist_opt", "overlap_grad", "overlap_param", "align", "recompute", "loss_scale", "config")
RECIPE = (
    "model",
    "kvcat",
    "fields",
    "dtype",
    "tokens",
    "windows",
    "micro",
    "updates",
    "all_tokens",
    "packed",
)

ROUTED, ROUTED_UNTIED = "router, tied, q/k norms", "router, untied, qkv bias"
PER_HEAD = "router per KV head"  # and the mixture of both KLs, and no gradient to dropped slots
RANDOM, ATTENTION, NONE = "random, tied", "attention, untied", "none, untied"
BEHIND = "random behind a cut, tied"

FLOAT64 = "float64: sums over ranks in another order round at 1e-16, small models add up some hundred of them"
FLOAT32 = "float32: sums over ranks in another order round at 6e-8, and a gradient is some hundred such sums"
FLOAT32_UPDATES = "float32, 20 AdamW steps, clipped: an element moves by its gradient over its own size, so rounding grows where that is small"
BF16_SAME = (
    "bf16: every product and sum is made by one rank in the same order; only float32 sums of gradients differ"
)
BF16_TIED = "bf16: a single process adds the tied weight's two gradients in bf16 (half a unit is 2e-3), two stages in float32"
BF16_SPLIT = "bf16 rounds at 4e-3, and each of two ranks rounds its partial sums before they are added"
BF16_UPDATES = "bf16, 20 AdamW steps: float32 sums of gradients differ by rounding, which Adam magnifies where they are small"


@dataclass(frozen=True)
class Case:
    name: str
    layout: dict
    recipe: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    tolerance: float = 1e-10
    reason: str = FLOAT64
    short: bool = False
    """Whether `make test` runs it too."""

    @property
    def processes(self) -> int:
        out = 1
        for name in ("tp", "pp", "cp", "dp"):
            out *= self.layout.get(name, 1)
        return out

    @property
    def reference(self) -> str:
        """Names the training that a single process runs for it."""
        return json.dumps(self.recipe, sort_keys=True)


def case(
    name: str, *, short: bool = False, tolerance: float = 1e-10, reason: str = FLOAT64, **settings
) -> Case:
    unknown = set(settings) - {*LAYOUT, *OPTIONS, *RECIPE}
    assert not unknown, f"{name}: {sorted(unknown)}"
    layout, options, recipe = (
        {key: settings[key] for key in keys if key in settings} for keys in (LAYOUT, OPTIONS, RECIPE)
    )
    return Case(name, layout, {"model": ROUTED} | recipe, options, tolerance, reason, short)


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
ATTN = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
MLP = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}

# More layer groups than two, so that every pipeline stage (or chunk) begins with one.
FOUR = {"kvcat": {"num_groups": 4}}
EIGHT_LAYERS = {"fields": {"num_layers": 8}, "kvcat": {"num_groups": 4}}
EIGHT_GROUPS = {"fields": {"num_layers": 8}, "kvcat": {"num_groups": 8}}
KV4 = {"fields": {"num_query_groups": 4}}  # Megatron splits KV heads over tensor-parallel ranks: four for TP4
SHARDED = {"dist_opt": True}
OVERLAPPED = {"dist_opt": True, "overlap_grad": True, "overlap_param": True}
ALIGNED = OVERLAPPED | {"align": True}

OVERLAPPED_P2P = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
FREED = {"deallocate_pipeline_outputs": True}  # NeMo's default
EXCHANGED_SHAPES = {
    "variable_seq_lengths": True,
    "moe_token_dispatcher_type": "alltoall",
}  # Megatron asks for the latter
SEPARATE_P2P = {"batch_p2p_comm": False}

TRAINED = {"updates": 20}
SINGLE = {"dtype": "float32", "tolerance": 2e-5, "reason": FLOAT32}
SINGLE_TRAINED = {"dtype": "float32", "updates": 20, "tolerance": 5e-4, "reason": FLOAT32_UPDATES}
HALF = {"dtype": "bf16", "tolerance": 1e-5, "reason": BF16_SAME}
HALF_TIED = {"dtype": "bf16", "tolerance": 4e-3, "reason": BF16_TIED}
HALF_SPLIT = {"dtype": "bf16", "tolerance": 1e-1, "reason": BF16_SPLIT}
HALF_TRAINED = {"dtype": "bf16", "updates": 20, "tolerance": 1e-4, "reason": BF16_UPDATES}

CASES = [
    # One process: ways of computing alone.
    case("loss scaled", loss_scale=1024, short=True),
    case("recomputed", recompute=FULL),
    # Tensor parallelism. Of 101 tokens every rank but the last has the same number.
    case("TP2", tp=2, short=True),
    case("TP2, untied", tp=2, model=ROUTED_UNTIED, short=True),
    case("TP2, random masks", tp=2, model=RANDOM, short=True),
    case("TP2, attention masks", tp=2, model=ATTENTION, short=True),
    case("TP4", tp=4, **KV4, short=True),
    case("TP4, untied", tp=4, model=ROUTED_UNTIED, **KV4),
    case("TP4, attention masks", tp=4, model=ATTENTION, **KV4),
    case("TP2, masks per KV head", tp=2, model=PER_HEAD, short=True),
    case("TP2, float32", tp=2, **SINGLE),
    case("TP2, bf16, random masks", tp=2, model=RANDOM, **HALF_SPLIT, short=True),
    case("TP2, trained", tp=2, **TRAINED, short=True),
    # Sequence parallelism.
    case("TP2 SP", tp=2, sp=True, short=True),
    case("TP2 SP, untied", tp=2, sp=True, model=ROUTED_UNTIED, short=True),
    case("TP2 SP, random masks", tp=2, sp=True, model=RANDOM),
    case("TP2 SP, attention masks", tp=2, sp=True, model=ATTENTION),
    case("TP2 SP, masks per KV head", tp=2, sp=True, model=PER_HEAD),
    case("TP2 SP, dense alone", tp=2, sp=True, model=NONE),
    case("TP4 SP", tp=4, sp=True, **KV4, short=True),
    case("TP2 SP, longer windows", tp=2, sp=True, tokens=48),
    case("TP2 SP, float32", tp=2, sp=True, **SINGLE),
    case("TP2 SP, trained", tp=2, sp=True, **TRAINED),
    # Context parallelism: every rank holds two chunks of each window.
    case("CP2", cp=2, short=True),
    case("CP2, untied", cp=2, model=ROUTED_UNTIED, short=True),
    case("CP2, random masks", cp=2, model=RANDOM, short=True),
    case("CP2, attention masks", cp=2, model=ATTENTION, short=True),
    case("CP2, masks per KV head", cp=2, model=PER_HEAD),
    case("CP2, dense alone", cp=2, model=NONE),
    case("CP4", cp=4, short=True),
    case("CP4, untied", cp=4, model=ROUTED_UNTIED, short=True),
    case("CP4, attention masks", cp=4, model=ATTENTION),
    case("CP2, longer windows", cp=2, tokens=48),
    case("CP2, recomputed", cp=2, recompute=FULL),
    case("CP2, attention recomputed", cp=2, recompute=ATTN, short=True),
    case("CP2, loss scaled", cp=2, loss_scale=1024),
    case("CP2, distributed optimizer", cp=2, **SHARDED, short=True),
    case("CP2, wide visible window", cp=2, tokens=24, kvcat={"recent_window": 9, "sinks": 3}),
    case("TP2 CP2", tp=2, cp=2, short=True),
    case("TP2 CP2 SP", tp=2, cp=2, sp=True, short=True),
    case("TP2 CP2 SP, untied", tp=2, cp=2, sp=True, model=ROUTED_UNTIED),
    case("TP2 CP2 SP, attention masks", tp=2, cp=2, sp=True, model=ATTENTION),
    case("TP2 CP2 SP, one token a segment", tp=2, cp=2, sp=True, tokens=4),
    case("CP2 PP2", cp=2, pp=2, short=True),
    case("CP2 PP2, random masks", cp=2, pp=2, model=RANDOM, short=True),
    case("CP2 PP2, recomputed", cp=2, pp=2, recompute=FULL),
    case("CP2 PP2 VP2", cp=2, pp=2, vp=2, config=OVERLAPPED_P2P, **FOUR),
    case("CP2 DP2, distributed optimizer, overlapped", cp=2, dp=2, **OVERLAPPED),
    case("CP2, float32", cp=2, **SINGLE),
    case("CP2, bf16, random masks", cp=2, model=RANDOM, **HALF_SPLIT),
    case("CP2, trained", cp=2, **TRAINED, short=True),
    case("CP4, trained", cp=4, **TRAINED),
    case("TP2 CP2 SP, trained", tp=2, cp=2, sp=True, **TRAINED),
    # Several documents in a window.
    case("TP2 SP, packed documents", tp=2, sp=True, packed=True, tokens=24, short=True),
    case("TP4 SP, packed documents, untied", tp=4, sp=True, packed=True, tokens=24, model=ROUTED_UNTIED, **KV4),
    case("TP2 PP2, packed documents, random masks", tp=2, pp=2, packed=True, tokens=24, model=RANDOM, short=True),
    case("PP2 DP2, packed documents, attention masks", pp=2, dp=2, packed=True, tokens=24, model=ATTENTION),
    case("PP2, packed documents, recomputed", pp=2, packed=True, tokens=24, recompute=FULL),
    case("TP2 SP, packed documents, attention recomputed", tp=2, sp=True, packed=True, tokens=24, recompute=ATTN),
    # Masks for rows behind a cut alone: rows before it are shared by both halves of the paired batch.
    case("recomputed, masks behind a cut", model=BEHIND, recompute=FULL),
    case("TP2, masks behind a cut", tp=2, model=BEHIND),
    case("TP2 SP, masks behind a cut", tp=2, sp=True, model=BEHIND, short=True),
    case("TP4 SP, masks behind a cut", tp=4, sp=True, model=BEHIND, tokens=24, **KV4),
    case("TP2 SP, masks behind a cut, attention recomputed", tp=2, sp=True, model=BEHIND, recompute=ATTN),
    case("PP2, masks behind a cut", pp=2, model=BEHIND, short=True),
    case("PP4, masks behind a cut, groups across stages", pp=4, model=BEHIND),
    case("PP2 VP2, masks behind a cut", pp=2, vp=2, config=OVERLAPPED_P2P, model=BEHIND, short=True),
    case("PP2 VP2, masks behind a cut, outputs freed once sent", pp=2, vp=2, config=SEPARATE_P2P | FREED, model=BEHIND),
    case("DP2, masks behind a cut", dp=2, model=BEHIND),
    case("TP2 PP2 SP, masks behind a cut, recomputed", tp=2, pp=2, sp=True, model=BEHIND, recompute=FULL, short=True),
    case("TP2 PP2 VP2 SP, masks behind a cut", tp=2, pp=2, vp=2, sp=True, config=OVERLAPPED_P2P, model=BEHIND, tokens=24),
    case("TP2 PP2, packed documents, masks behind a cut", tp=2, pp=2, packed=True, tokens=24, model=BEHIND, short=True),
    case("TP2 SP, packed documents, masks behind a cut, recomputed", tp=2, sp=True, packed=True, tokens=24, model=BEHIND, recompute=BLOCK),
    case("TP2, bf16, masks behind a cut", tp=2, model=BEHIND, **HALF_SPLIT),
    case("TP2 PP2 SP, masks behind a cut, trained", tp=2, pp=2, sp=True, model=BEHIND, **TRAINED),
    case("PP2 DP2, float32, masks behind a cut, distributed optimizer, aligned, trained", pp=2, dp=2, model=BEHIND, **ALIGNED, **SINGLE_TRAINED),
    # Pipelines.
    case("PP2", pp=2, short=True),
    case("PP2, untied", pp=2, model=ROUTED_UNTIED),
    case("PP2, random masks", pp=2, model=RANDOM, short=True),
    case("PP2, attention masks", pp=2, model=ATTENTION),
    case("PP2, masks per KV head", pp=2, model=PER_HEAD),
    case("PP2, dense alone", pp=2, model=NONE, short=True),
    case("PP4", pp=4, **FOUR, short=True),
    case("PP4, random masks, groups across stages", pp=4, model=RANDOM, short=True),
    case("PP2, one micro-batch", pp=2, micro=1),
    case("PP2, separate exchange", pp=2, config=SEPARATE_P2P),
    case("PP2, outputs freed once sent", pp=2, config=FREED, short=True),
    case("PP2, shapes exchanged", pp=2, config=EXCHANGED_SHAPES),
    case("PP2, bf16", pp=2, **HALF_TIED, short=True),
    case("PP2, bf16, untied", pp=2, model=ROUTED_UNTIED, **HALF),
    case("PP2, trained", pp=2, **TRAINED),
    case("PP2, bf16, untied, trained", pp=2, model=ROUTED_UNTIED, **HALF_TRAINED),
    # Interleaved pipelines.
    case("PP2 VP2", pp=2, vp=2, config=OVERLAPPED_P2P, **FOUR, short=True),
    case("PP2 VP2, two layers a chunk", pp=2, vp=2, config=OVERLAPPED_P2P, **EIGHT_LAYERS, short=True),
    case("PP2 VP2, separate exchange", pp=2, vp=2, config=SEPARATE_P2P, **FOUR),
    case("PP2 VP2, outputs freed once sent", pp=2, vp=2, config=SEPARATE_P2P | FREED, **FOUR, short=True),
    case("PP2 VP2, untied", pp=2, vp=2, config=OVERLAPPED_P2P, model=ROUTED_UNTIED, **FOUR),
    case("PP2 VP2, random masks, groups across chunks", pp=2, vp=2, config=OVERLAPPED_P2P, model=RANDOM),
    case("PP2 VP2, attention masks", pp=2, vp=2, config=OVERLAPPED_P2P, model=ATTENTION),
    case("PP2 VP4", pp=2, vp=4, config=OVERLAPPED_P2P, **EIGHT_GROUPS),
    case("PP4 VP2", pp=4, vp=2, **EIGHT_GROUPS, short=True),
    case("PP4 VP2, groups of five micro-batches", pp=4, vp=2, micro=10, config={"microbatch_group_size_per_vp_stage": 5}, **EIGHT_GROUPS),
    case("PP4 VP2, overlapped exchange", pp=4, vp=2, config=OVERLAPPED_P2P, **EIGHT_GROUPS),
    case("PP2 VP2, recomputed", pp=2, vp=2, config=OVERLAPPED_P2P, recompute=FULL, **FOUR),
    case("TP2 PP2 VP2 SP", tp=2, pp=2, vp=2, sp=True, config=OVERLAPPED_P2P, **FOUR, short=True),
    case("PP2 VP2 DP2, all overlapped", pp=2, vp=2, dp=2, config=OVERLAPPED_P2P, **ALIGNED, **FOUR),
    case("PP2 VP2, trained", pp=2, vp=2, config=OVERLAPPED_P2P, **FOUR, **TRAINED),
    # Data parallelism, gradient accumulation and micro-batch sizes.
    case("DP2", dp=2, short=True),
    case("DP4, no accumulation", dp=4, short=True),
    case("DP2, four micro-batches a rank", dp=2, micro=8),
    case("DP2, windows one by one", dp=2, windows=1, micro=8, short=True),
    case("DP2, four windows a micro-batch", dp=2, windows=4, micro=2),
    case("TP2, one window, one micro-batch", tp=2, windows=1, micro=1),
    case("DP2, distributed optimizer", dp=2, **SHARDED, short=True),
    case("DP2, overlapped reduction", dp=2, overlap_grad=True, short=True),
    case("DP2, distributed optimizer, overlapped", dp=2, **OVERLAPPED),
    case("DP2, attention masks", dp=2, model=ATTENTION),
    case("DP2, random masks", dp=2, model=RANDOM, short=True),
    case("DP2, dense alone, distributed optimizer", dp=2, model=NONE, **SHARDED),
    case("DP2, float32, distributed optimizer, trained", dp=2, **SHARDED, **SINGLE_TRAINED),
    case("DP2, float32, distributed optimizer, overlapped, trained", dp=2, **OVERLAPPED, **SINGLE_TRAINED, short=True),
    case("DP4, float32, distributed optimizer, overlapped, trained", dp=4, **OVERLAPPED, **SINGLE_TRAINED),
    case("DP2, bf16", dp=2, **HALF),
    case("DP2, bf16, distributed optimizer, overlapped, trained", dp=2, **OVERLAPPED, **HALF_TRAINED),
    case("DP2, trained", dp=2, **TRAINED),
    # Together.
    case("TP2 PP2", tp=2, pp=2, short=True),
    case("TP2 PP2 SP", tp=2, pp=2, sp=True, short=True),
    case("TP2 PP2 SP, untied", tp=2, pp=2, sp=True, model=ROUTED_UNTIED),
    case("TP2 PP2 SP, random masks", tp=2, pp=2, sp=True, model=RANDOM, short=True),
    case("TP2 PP2, attention masks", tp=2, pp=2, model=ATTENTION, short=True),
    case("TP2 PP2 SP, masks per KV head, recomputed", tp=2, pp=2, sp=True, model=PER_HEAD, recompute=FULL),
    case("TP2 PP2 SP, recomputed", tp=2, pp=2, sp=True, recompute=FULL, short=True),
    case("TP2 PP2 SP, recomputed in part", tp=2, pp=2, sp=True, recompute=BLOCK),
    case("TP2 PP2, attention recomputed", tp=2, pp=2, recompute=ATTN, short=True),
    case("TP2 PP2, MLP recomputed", tp=2, pp=2, recompute=MLP),
    case("TP2 DP2, distributed optimizer", tp=2, dp=2, **SHARDED, short=True),
    case("TP2 DP2 SP, overlapped", tp=2, dp=2, sp=True, **OVERLAPPED),
    case("PP2 DP2, distributed optimizer", pp=2, dp=2, **SHARDED),
    case("PP2 DP2, overlapped, aligned", pp=2, dp=2, **ALIGNED, short=True),
    case("TP2 PP2 SP, float32", tp=2, pp=2, sp=True, **SINGLE),
    case("TP2 PP2 SP, trained", tp=2, pp=2, sp=True, **TRAINED),
    case("TP2 DP2, float32, distributed optimizer, overlapped, trained", tp=2, dp=2, **OVERLAPPED, **SINGLE_TRAINED),
    case("PP2 DP2, float32, distributed optimizer, aligned, trained", pp=2, dp=2, **ALIGNED, **SINGLE_TRAINED),
]  # fmt: skip

FORMS = {
    # Form → whether a case shows it (a case shows every form it uses).
    "tensor parallelism (TP)": lambda c: c.layout.get("tp", 1) > 1,
    "sequence parallelism (SP)": lambda c: c.layout.get("sp", False),
    "context parallelism (CP)": lambda c: c.layout.get("cp", 1) > 1,
    "packed documents": lambda c: c.recipe.get("packed", False),
    "pipeline (PP)": lambda c: c.layout.get("pp", 1) > 1 and not c.layout.get("vp"),
    "interleaved pipeline (PP, VP)": lambda c: bool(c.layout.get("vp")),
    "data parallelism (DP)": lambda c: c.layout.get("dp", 1) > 1,
    "distributed optimizer": lambda c: c.options.get("dist_opt", False),
    "overlapped gradient reduction": lambda c: c.options.get("overlap_grad", False),
    "overlapped parameter gathering": lambda c: c.options.get("overlap_param", False),
    "gradient accumulation": lambda c: c.recipe.get("micro", 4) > c.layout.get("dp", 1),
    "other micro-batch sizes": lambda c: "windows" in c.recipe,
    "recomputation": lambda c: "recompute" in c.options,
    "tied embeddings in a pipeline": lambda c: (
        c.layout.get("pp", 1) > 1 and c.recipe["model"] in (ROUTED, RANDOM, BEHIND)
    ),
    "grouped KV heads, split over ranks": lambda c: (
        c.layout.get("tp", 1) > 1 and "num_query_groups" not in c.recipe.get("fields", {})
    ),
    "vocabulary that TP does not divide": lambda c: c.layout.get("tp", 1) > 1,
    "random masks": lambda c: c.recipe["model"] == RANDOM,
    "masks behind a cut": lambda c: c.recipe["model"] == BEHIND,
    "masks per KV head": lambda c: c.recipe["model"] == PER_HEAD,
    "attention masks": lambda c: c.recipe["model"] == ATTENTION,
    "dense pass alone": lambda c: c.recipe["model"] == NONE,
    "float32": lambda c: c.recipe.get("dtype") == "float32",
    "bf16": lambda c: c.recipe.get("dtype") == "bf16",
    "20 optimizer steps": lambda c: c.recipe.get("updates", 0) >= 20,
}
