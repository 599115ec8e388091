"""A whole training step: KV-CAT with routers against plain continued pretraining, at equal tokens, split by stage.

Megatron-core without NeMo (kvcat_nemo.engine): the model, Megatron's DDP wrapper, its schedule and its Adam. Every form
runs in a process of its own, and the forms of a size take turns. Writes one JSON with a manifest and a picture.

    python -m benchmarks.step                            # some six minutes on two quiet cores, 12 GB
    python -m benchmarks.step --only 4-layers --rounds 5 --out /tmp/step.json --plot /tmp/step.png
    python -m benchmarks.step --plot-only                # draw the picture again from the JSON

SmolLM2-135M comes from a converted checkpoint (--checkpoint). To make it:

    kvcat model fetch smollm2-135m && kvcat convert import models/smollm2-135m models/smollm2-135m-megatron

Stages: `attention` with its projections, of which `core` is the kernel alone; `mlp`; `router` with its budget loss and
statistics; `loss` from the last hidden states; `optimizer` with clipping and clearing; `rest` norms, residuals,
embedding, schedule. Forward and backward of each. Router masks hide about half of the slots.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.paired_timing import require_linux, save_figure, serve, take_turns, write_report
from benchmarks.smoke import add_option, shrink

ROOT = Path(__file__).resolve().parent.parent
FORMS = {
    # Probabilities around ½, so that routers decide some way and the masked pass is masked.
    "kvcat": {"policy": "router", "router_init_keep": 0.5, "router_init_jitter": 0.5},
    "plain": {"policy": "none"},
}
SIZES = {
    # name → layers of SmolLM2-135M's shape (None: the checkpoint itself), tokens
    "4-layers T=512": (4, 512),
    "4-layers T=2048": (4, 2048),
    "smollm2-135m T=512": (None, 512),
    "smollm2-135m T=2048": (None, 2048),
}
SMOKE = {"smoke 2-layers T=32": (2, 32)}
STAGES = ("attention", "mlp", "router", "loss", "optimizer", "rest")


class Clock:
    """Time by stage: at every change of stage, the time since the last change goes to the stage that was on."""

    def __init__(self):
        self.stack: list[str] = []
        self.begin()

    def begin(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.stack = ["rest"]
        self.last = time.perf_counter(), time.process_time()

    def _charge(self) -> None:
        now, stage = (time.perf_counter(), time.process_time()), self.stack[-1]
        for spent, a, b in zip((self.seconds, self.cpu_seconds), self.last, now, strict=True):
            spent[stage] = spent.get(stage, 0.0) + b - a
        self.last = now

    def enter(self, stage: str) -> None:
        self._charge()
        self.stack.append(stage)

    def leave(self, stage: str) -> None:
        self._charge()
        if stage in self.stack[1:]:  # an inner stage that never saw a gradient ends with the outer one
            while self.stack.pop() != stage:
                pass

    def end(self) -> tuple[dict[str, float], dict[str, float]]:
        """Wall time and processor time (which other programs disturb less), by stage; `core` inside `attention` too."""
        self._charge()
        for spent in (self.seconds, self.cpu_seconds):
            spent["attention"] += spent["core"]
        return self.seconds, self.cpu_seconds


def mark(x, event):
    """x, whose gradient calls `event` as it passes."""
    import torch

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            event()
            return grad

    return Mark.apply(x) if torch.is_grad_enabled() and x.requires_grad else x


def timed(clock: Clock, stage: str, function):
    """`function` whose forward and backward are charged to `stage`.

    Backward enters the stage where the gradient of its (first) result arrives and leaves where that of its first
    argument departs.
    """

    def run(first, *args, **kwargs):
        clock.enter(stage)
        out = function(mark(first, lambda: clock.leave(stage)), *args, **kwargs)
        clock.leave(stage)
        if isinstance(out, tuple):
            return (mark(out[0], lambda: clock.enter(stage)), *out[1:])
        return mark(out, lambda: clock.enter(stage))

    return run


def time_stages(model, clock: Clock) -> None:
    from kvcat_nemo.engine.layer import kvcat_layers

    for layer in kvcat_layers(model):
        attention, core = layer.self_attention, layer.self_attention.core_attention
        core.forward = timed(clock, "core", core.forward)
        attention.forward = timed(clock, "attention", attention.forward)
        layer.mlp.forward = timed(clock, "mlp", layer.mlp.forward)
        if layer.router is not None:
            time_router(layer, clock)
    model.output_layer.forward = timed(clock, "loss", model.output_layer.forward)


def time_router(layer, clock: Clock) -> None:
    """The router's own backward runs from its probabilities to the hidden states that it reads.

    By the layer's public `route`, whose arguments are handed through whatever they are, and by the router's module hooks.
    """
    route = layer.route

    def whole_route(*args, **kwargs):  # forward alone: the residual stream passes through it
        clock.enter("router")
        out = route(*args, **kwargs)
        clock.leave("router")
        return out

    def arriving(router, args):
        return (mark(args[0], lambda: clock.leave("router")), *args[1:])

    def departing(router, args, routing):
        if routing.p_BT.requires_grad:
            routing.p_BT.register_hook(lambda grad: clock.enter("router"))

    layer.route = whole_route
    layer.router.register_forward_pre_hook(arriving)
    layer.router.register_forward_hook(departing)


def start_single_process() -> None:
    """A process group of one, which Megatron's modules ask for."""
    import torch

    from kvcat_nemo.engine import hardware

    hardware.enable()
    from megatron.core import parallel_state, tensor_parallel

    rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def groups(layers: int | None) -> int:
    """Routers: the default four for 30 layers; two for four, one in every other layer."""
    return 4 if layers is None else max(layers // 2, 1)


def build_model(form: str, layers: int | None, tokens: int, checkpoint: Path):
    import torch
    from megatron.core import dist_checkpointing

    from kvcat_nemo.conversion.dist_checkpoint import CheckpointReader
    from kvcat_nemo.conversion.exporting import model_prefix
    from kvcat_nemo.engine.config_checks import KVCatTransformerConfig, validate_model_config
    from kvcat_nemo.engine.paired_model import KVCatGPTModel
    from kvcat_nemo.engine.spec import kvcat_block_spec
    from kvcat_nemo.method.config import KVCatConfig

    torch.manual_seed(0)
    config = KVCatTransformerConfig(
        num_layers=layers or 30,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_query_groups=3,
        kv_channels=64,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        kvcat=KVCatConfig(**FORMS[form], num_groups=groups(layers)),
    )
    validate_model_config(config)
    model = KVCatGPTModel(
        config,
        kvcat_block_spec(config),
        vocab_size=49152,
        max_sequence_length=tokens,
        position_embedding_type="rope",
        rotary_base=100000,
        share_embeddings_and_output_weights=True,
    )
    if layers is None:
        weights = checkpoint / "weights"
        prefix = model_prefix(CheckpointReader(weights))
        backbone = {k: v for k, v in model.sharded_state_dict(prefix=prefix).items() if ".router." not in k}
        state = dist_checkpointing.load(backbone, str(weights))
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        missing, _ = model.load_state_dict(state, strict=False)
        assert all(".router." in name for name in missing), missing
    return model


def worker(form: str, size: str, checkpoint: Path) -> None:
    """Serves training steps of one form."""
    start_single_process()
    import torch
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from kvcat_nemo.engine.collectives import set_router_loss_scale
    from kvcat_nemo.engine.step import microbatch_loss, step_metrics

    layers, tokens = (SIZES | SMOKE)[size]
    model, clock = build_model(form, layers, tokens, checkpoint), Clock()
    time_stages(model, clock)
    config = model.config
    config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    settings = OptimizerConfig(optimizer="adam", lr=1e-5, weight_decay=0.01, adam_beta2=0.95, clip_grad=1.0)
    optimizer = get_megatron_optimizer(settings, [ddp])
    rng = torch.Generator().manual_seed(0)
    text = torch.randint(0, 49152, (1, tokens + 1), generator=rng)
    position, mask = torch.arange(tokens)[None], torch.ones(1, tokens)

    def forward_step(iterator, model):
        set_router_loss_scale(config, 1)
        metrics = model(text[:, :-1], position, None, labels=text[:, 1:], loss_mask=mask)
        return metrics, lambda out: microbatch_loss(out, mask, config.kvcat)

    def step() -> dict:
        clock.begin()
        clock.enter("optimizer")
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        clock.leave("optimizer")
        sums = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=[ddp],
            num_microbatches=1,
            seq_length=tokens,
            micro_batch_size=2 if config.kvcat.paired else 1,
            forward_only=False,
        )
        clock.enter("optimizer")
        optimizer.step()
        clock.leave("optimizer")
        figures = step_metrics(sums, [ddp], config.kvcat)
        stages, cpu_stages = clock.end()
        return {"stages": stages, "cpu_stages": cpu_stages, "keep_rate": figures.get("keep_rate", 1.0)}

    serve(step)


def measure(size: str, rounds: int, threads: int, checkpoint: Path, fork=None) -> dict:
    forms = {name: ["--checkpoint", str(checkpoint), "--worker", name, size] for name in FORMS}
    runs = take_turns("benchmarks.step", forms, rounds + 1, threads, fork)
    runs = {name: answers[1:] for name, answers in runs.items()}  # the first step makes Adam's moments
    layers, tokens = (SIZES | SMOKE)[size]
    fastest = {name: min(runs[name], key=lambda r: r["seconds"]) for name in FORMS}
    pairs = list(zip(runs["kvcat"], runs["plain"], strict=True))

    def ratio(part) -> float:
        return statistics.median(part(a) / part(b) for a, b in pairs)

    return {
        "size": size, "layers": layers or 30, "num_groups": groups(layers), "tokens": tokens,
        "seconds": {name: r["seconds"] for name, r in fastest.items()},
        "seconds_all": {name: [round(r["seconds"], 3) for r in runs[name]] for name in FORMS},
        "cpu_seconds": {name: min(r["cpu_seconds"] for r in runs[name]) for name in FORMS},
        "stages": {n: {s: r["stages"].get(s, 0.0) for s in STAGES} for n, r in fastest.items()},
        "core_attention": {n: r["stages"]["core"] for n, r in fastest.items()},
        "cpu_stages": {n: {s: r["cpu_stages"].get(s, 0.0) for s in (*STAGES, "core")} for n, r in fastest.items()},
        "keep_rate": fastest["kvcat"]["keep_rate"],
        "peak_bytes": {name: max(r["peak_bytes"] for r in runs[name]) for name in FORMS},
        "resident_bytes": {name: max(r["resident_bytes"] for r in runs[name]) for name in FORMS},
        "ratios": {
            "step kvcat/plain": ratio(lambda r: r["seconds"]),
            "step kvcat/plain, cpu time": ratio(lambda r: r["cpu_seconds"]),
            "without optimizer": ratio(lambda r: r["seconds"] - r["stages"]["optimizer"]),
            "router share, cpu time": statistics.median(
                r["cpu_stages"]["router"] / r["cpu_seconds"] for r in runs["kvcat"]
            ),
            "router share": statistics.median(r["stages"]["router"] / r["seconds"] for r in runs["kvcat"]),
        },
    }  # fmt: skip


def draw(report: dict, path: Path) -> None:
    """Stacked bars by stage, a pair for every size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["rows"]
    figure, axes = pyplot.subplots(1, len(rows), figsize=(3.2 * len(rows), 4.2), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        names, bottom = ["plain", "kvcat"], [0.0, 0.0]
        for stage, colour in zip(STAGES, pyplot.get_cmap("tab10").colors, strict=False):
            values = [row["stages"][name][stage] for name in names]
            axis.bar(names, values, bottom=bottom, label=stage, color=colour)
            bottom = [b + v for b, v in zip(bottom, values, strict=True)]
        axis.set_title(f"{row['size']}\n× {row['ratios']['step kvcat/plain']:.2f}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds a step of one window")
    axes[0][-1].legend(fontsize=8, loc="upper left", reverse=True)
    figure.tight_layout()
    save_figure(figure, path)


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--only", action="append", metavar="NAME", help=f"sizes that begin so: {', '.join(SIZES)}")
    add("--rounds", type=int, default=3, help="measured steps of each form (default: %(default)s)")
    add("--threads", type=int, default=2, help="OpenMP threads (default: %(default)s)")
    add("--checkpoint", type=Path, default=ROOT / "models" / "smollm2-135m-megatron")
    add("--out", type=Path, default=ROOT / "benchmarks" / "step.json")
    add("--plot", type=Path, default=ROOT / "docs" / "img" / "step.png")
    add("--plot-only", action="store_true", help="draw the picture from --out and measure nothing")
    add_option(parser)
    add("--worker", nargs=2, metavar=("FORM", "SIZE"), help=argparse.SUPPRESS)
    return shrink(parser.parse_args(argv), parser, only=["smoke"], rounds=1, threads=1)


def main(argv=None) -> None:
    args = arguments(argv)
    if args.worker:
        return worker(*args.worker, args.checkpoint)
    if not args.plot_only:
        require_linux()
        known = SMOKE if args.smoke else SIZES
        sizes = [size for size in known if not args.only or size.startswith(tuple(args.only))]
        if any(known[s][0] is None for s in sizes) and not (args.checkpoint / "weights").is_dir():
            sys.exit(
                f"--checkpoint {args.checkpoint}: no converted SmolLM2-135M there. Make it by\n"
                f"  kvcat model fetch smollm2-135m && kvcat convert import models/smollm2-135m {args.checkpoint}\n"
                "or measure without it: --only 4-layers"
            )
        began, rows = time.time(), []
        for size in sizes:
            rows.append(
                measure(size, args.rounds, args.threads, args.checkpoint, main if args.smoke else None)
            )
            print(size, rows[-1]["seconds"], flush=True)
        write_report(rows, args.out, began, threads=args.threads)
    report = json.loads(args.out.read_text())
    draw(report, args.plot)
    for row in report["rows"]:
        print(row["size"], {name: round(value, 3) for name, value in row["ratios"].items()})


if __name__ == "__main__":
    main()
