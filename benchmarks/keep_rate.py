"""Which knob brings the routers' keep rate off 1.0 and settles it near its target?

A byte-level model of four layers is trained densely on real text that comes with every Python (the reference manual
of `pydoc_data.topics` and the docstrings of the standard library), then continued with KV-CAT once per setting, all
from the same weights, on the same batches, beside a dense control. Writes one JSON with a manifest and a picture.

    python -m benchmarks.keep_rate                       # every setting, about a minute each on one core
    python -m benchmarks.keep_rate --only lr30 --steps 150 --out /tmp/k.json --plot /tmp/k.png
    python -m benchmarks.keep_rate --plot-only           # draw the picture again from the JSON
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import pydoc_data.topics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.smoke import add_option, shrink
from kvcat_nemo.engine import hardware

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 0.05

EXACT = {"gate_gradient_cap": 30.0}  # gradients of gates as they are, in effect
SETTINGS: dict[str, dict] = {
    # name → fields of KVCatConfig; all start at p = 1 but keep0.55, and have jitter 0.02 but jitter0.5
    "none": {"policy": "none"},
    "as the paper": EXACT,
    "budget3-cap0-detach": {"budget_weight": 3.0, "gate_gradient_cap": 0.0, "router_detach_input": True},
    "budget3-cap0": {"budget_weight": 3.0, "gate_gradient_cap": 0.0},
    "budget1-cap0-detach": {"budget_weight": 1.0, "gate_gradient_cap": 0.0, "router_detach_input": True},
    "budget3-detach": {"budget_weight": 3.0, "router_detach_input": True} | EXACT,
    "lr10": {"router_lr_mult": 10} | EXACT,
    "lr10-cap0": {"router_lr_mult": 10, "gate_gradient_cap": 0.0},
    "keep0.55": {"router_init_keep": 0.55} | EXACT,
    "random": {"policy": "random"},
    "budget3-cap5-detach": {"budget_weight": 3.0, "gate_gradient_cap": 5.0, "router_detach_input": True},
    "lr30": {"router_lr_mult": 30} | EXACT,
    "jitter0.5": {"router_init_jitter": 0.5} | EXACT,
}


@dataclass
class Run:
    """One setting's history; one entry per step."""

    name: str
    kvcat: dict
    keep_rate: list[float] = field(default_factory=list)
    keep_rate_by_router: list[list[float]] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)
    dense_loss: list[float] = field(default_factory=list)
    masked_loss: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    router_gradient_norm: list[float] = field(default_factory=list)
    backbone_gradient_norm: list[float] = field(default_factory=list)
    held_out: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def real_text(limit: int) -> bytes:
    """The language reference and the standard library's docstrings, at most `limit` bytes."""
    parts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    size = sum(map(len, parts))
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if size >= limit:
            break
        try:
            tree = ast.parse(file.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        parts += [doc for doc in docs if doc]
        size += sum(len(doc) for doc in docs if doc)
    return "\n\n".join(parts).encode()[:limit]


def batches(data: bytes, steps: int, windows: int, tokens: int, seed: int):
    """(inputs, labels), [windows, tokens] each, at random places."""
    rng = torch.Generator().manual_seed(seed)
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    for _ in range(steps):
        starts = torch.randint(0, len(text) - tokens - 1, (windows,), generator=rng)
        window = torch.stack([text[s : s + tokens + 1] for s in starts])
        yield window[:, :-1], window[:, 1:]


def start_single_process() -> None:
    """A process group of one, which Megatron's modules ask for."""
    hardware.enable()
    from megatron.core import parallel_state, tensor_parallel

    if parallel_state.model_parallel_is_initialized():
        return
    if not torch.distributed.is_initialized():
        rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
        torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def build_model(kvcat: dict, args) -> torch.nn.Module:
    from kvcat_nemo.engine.config_checks import KVCatTransformerConfig, validate_model_config
    from kvcat_nemo.engine.paired_model import KVCatGPTModel
    from kvcat_nemo.engine.spec import kvcat_block_spec
    from kvcat_nemo.method.config import KVCatConfig

    torch.manual_seed(args.seed)
    config = KVCatTransformerConfig(
        num_layers=args.layers,
        hidden_size=args.width,
        ffn_hidden_size=args.width * 8 // 3,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
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
        kvcat=KVCatConfig(
            **{"num_groups": 2, "router_dim": 32, "target_keep_fraction": args.target, "seed": args.seed}
            | kvcat
        ),
    )
    validate_model_config(config)
    return KVCatGPTModel(
        config,
        kvcat_block_spec(config),
        vocab_size=256,
        max_sequence_length=args.tokens,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )


def step_loss(model, inputs: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """One micro-batch: the loss to back-propagate (the budget term rides on the layers) and the named figures."""
    from kvcat_nemo.engine.collectives import set_router_loss_scale
    from kvcat_nemo.engine.step import microbatch_loss, step_metrics

    set_router_loss_scale(model.config, num_microbatches=1)
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    metrics = model(inputs, positions, None, labels=labels)
    loss, count, sums = microbatch_loss(metrics, torch.ones_like(labels), model.config.kvcat)
    return loss / count, step_metrics([sums], [model], model.config.kvcat)


def _split(model) -> tuple[list, list]:
    routers = [p for p in model.parameters() if getattr(p, "is_router", False)]
    return [p for p in model.parameters() if not getattr(p, "is_router", False)], routers


def _norm(parameters: list) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None))


def schedule(step: int, steps: int, warmup: int, floor: float = 0.05) -> float:
    """The paper's: linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def train(name: str, kvcat: dict, data: bytes, args, steps: int, lr: float, start: dict | None = None):
    """Train one setting. Returns the model and its Run."""
    model = build_model(kvcat, args)
    if start is not None:
        model.load_state_dict(start, strict=False)
    backbone, routers = _split(model)
    settings = model.config.kvcat
    groups = [{"params": backbone, "lr": lr}]
    if routers:
        groups.append({"params": routers, "lr": lr * settings.router_lr_mult})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)
    peaks = [group["lr"] for group in optimizer.param_groups]
    run, began = Run(name, asdict(settings)), time.time()
    for step, (inputs, labels) in enumerate(batches(data, steps, args.windows, args.tokens, args.seed + 1)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, steps, args.warmup)
        optimizer.zero_grad()
        loss, figures = step_loss(model, inputs, labels)
        loss.backward()
        run.backbone_gradient_norm.append(_norm(backbone))
        run.router_gradient_norm.append(_norm(routers))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.dense_loss.append(figures["loss/anchor"])
        run.masked_loss.append(figures.get("ce_masked", math.nan))
        run.kl.append(figures.get("loss/distill", math.nan))
        run.keep_rate.append(figures.get("keep_rate", 1.0))
        run.probability.append(figures.get("probability", math.nan))
        run.keep_rate_by_router.append([v for k, v in figures.items() if k.startswith("keep_rate/")])
    run.seconds = time.time() - began
    return model, run


@torch.no_grad()
def held_out(model, data: bytes, args) -> dict[str, float]:
    """Dense and masked cross-entropy and keep rate on text not trained on."""
    model.eval()
    rows = [step_loss(model, *batch)[1] for batch in batches(data, 12, args.windows, args.tokens, 7)]
    names = {"dense_loss": "loss/anchor", "masked_loss": "ce_masked", "keep_rate": "keep_rate"}
    return {
        ours: sum(r[theirs] for r in rows) / len(rows) for ours, theirs in names.items() if theirs in rows[0]
    }


def tidy(value):
    """Five decimals, and null for what a setting does not have: JSON knows no NaN."""
    if isinstance(value, list):
        return [tidy(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 5)
    return value


def settled(run: Run, last: int = 50) -> float:
    """Mean keep rate over the last steps."""
    tail = run.keep_rate[-last:]
    return sum(tail) / len(tail)


def first_within(run: Run, target: float, span: int = 20) -> int | None:
    """First step from which the moving mean over `span` steps stays within the tolerance to the end."""
    means = [sum(run.keep_rate[i : i + span]) / span for i in range(len(run.keep_rate) - span + 1)]
    bad = [i for i, mean in enumerate(means) if abs(mean - target) > TOLERANCE]
    step = bad[-1] + 1 if bad else 0
    return step if step < len(means) else None


def git_revision() -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


def manifest(args, revision: str, seconds: float) -> dict:
    from importlib.metadata import version

    return {
        "git_revision": revision,
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in ("torch", "megatron-core", "numpy")},
        "arguments": {key: value for key, value in vars(args).items() if not isinstance(value, Path)},
        "text": "pydoc_data.topics and docstrings of the standard library, bytes",
        "seconds": round(seconds, 1),
    }


def table(report: dict) -> str:
    rows = [
        f"{'setting':26}{'keep':>7}{'within':>8}{'spread':>8}{'dense':>8}{'masked':>8}{'max grad':>11}{'s':>6}"
    ]
    for run in report["runs"]:
        s = run["summary"]
        within = "never" if s["first_step_within"] is None else s["first_step_within"]
        rows.append(
            f"{run['name']:26}{s['keep_rate']:7.3f}{within!s:>8}{s['keep_rate_spread']:8.3f}{run['held_out']['dense_loss']:8.4f}"
            f"{run['held_out'].get('masked_loss', math.nan):8.4f}{s['largest_router_gradient']:11.3g}{run['seconds']:6.0f}"
        )
    return "\n".join(rows)


def summary(run: Run, target: float) -> dict:
    tail = torch.tensor(run.keep_rate[-50:])
    return {
        "keep_rate": settled(run),
        "keep_rate_spread": float(tail.std()),
        "first_step_within": first_within(run, target),
        "largest_router_gradient": max(run.router_gradient_norm),
    }


def draw(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    target = report["manifest"]["arguments"]["target"]
    runs = [run for run in report["runs"] if run["kvcat"]["policy"] == "router"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), width_ratios=(2, 1))
    colours = pyplot.get_cmap("tab20")
    for i, run in enumerate(runs):
        keep = torch.tensor(run["keep_rate"]).unfold(0, 10, 1).mean(-1)
        left.plot(range(9, 9 + len(keep)), keep, label=run["name"], color=colours(i % 20), lw=1.3)
    left.axhline(target, color="black", lw=0.8)
    left.axhspan(target - TOLERANCE, target + TOLERANCE, color="black", alpha=0.1, lw=0)
    left.set(xlabel="step", ylabel="keep rate (mean of 10 steps)", ylim=(0, 1.02))
    left.set_title("Keep rate from the paper's start, by knob (band: target ± 0.05)")
    left.legend(fontsize=7, ncols=2)
    base = next((r["held_out"]["dense_loss"] for r in report["runs"] if r["name"] == "none"), None)
    for i, run in enumerate(runs):
        right.scatter(run["summary"]["keep_rate"], run["held_out"]["dense_loss"], color=colours(i % 20))
    if base is not None:
        right.axhline(base, color="black", lw=0.8, ls="--", label="dense training alone")
        right.legend(fontsize=7)
    right.axvspan(target - TOLERANCE, target + TOLERANCE, color="black", alpha=0.1, lw=0)
    right.set(xlabel="keep rate, last 50 steps", ylabel="held-out dense loss, nats a byte")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--steps", type=int, default=150, help="KV-CAT steps of each setting (default: %(default)s)")
    add(
        "--pretrain-steps",
        type=int,
        default=200,
        help="dense steps before, shared by all (default: %(default)s)",
    )
    add("--pretrain-lr", type=float, default=3e-3, help="its peak learning rate (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="peak learning rate of the backbone (default: %(default)s)")
    add("--warmup", type=int, default=10, help="warm-up steps (default: %(default)s)")
    add("--target", type=float, default=0.5, help="target keep fraction (default: %(default)s)")
    add("--windows", type=int, default=16, help="windows a step (default: %(default)s)")
    add("--tokens", type=int, default=128, help="bytes a window (default: %(default)s)")
    add("--layers", type=int, default=4, help="layers (default: %(default)s)")
    add("--width", type=int, default=64, help="hidden size (default: %(default)s)")
    add("--seed", type=int, default=1, help="seed of weights, routers and batches (default: %(default)s)")
    add("--only", nargs="+", choices=SETTINGS, metavar="NAME", help=f"settings to run: {', '.join(SETTINGS)}")
    add("--out", type=Path, default=ROOT / "benchmarks/keep_rate.json", help="JSON to write")
    add("--plot", type=Path, default=ROOT / "docs/img/keep_rate.png", help="picture to write")
    add("--plot-only", action="store_true", help="draw the picture from --out and train nothing")
    add_option(parser)
    small = {
        "steps": 20,
        "pretrain_steps": 2,
        "warmup": 1,
        "windows": 2,
        "tokens": 16,
        "layers": 2,
        "width": 16,
    }
    return shrink(parser.parse_args(argv), parser, **small, only=["none", "budget3-cap0-detach"])


def main(argv=None) -> None:
    args = arguments(argv)
    if args.plot_only:
        report = json.loads(args.out.read_text())
        print(table(report))
        return draw(report, args.plot)
    torch.set_num_threads(1)
    start_single_process()
    began, revision = time.time(), git_revision()  # of the code that runs, not of the moment of writing
    text = real_text(100_000 if args.smoke else 2_000_000)
    train_text, test_text = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    base, run = train("base", {"policy": "none"}, train_text, args, args.pretrain_steps, args.pretrain_lr)
    print(
        f"dense base: {args.pretrain_steps} steps, loss {run.dense_loss[-1]:.3f}, {run.seconds:.0f} s",
        flush=True,
    )
    weights = {key: value for key, value in base.state_dict().items() if value is not None}
    report: dict = {"runs": []}
    for name in args.only or SETTINGS:
        model, run = train(name, SETTINGS[name], train_text, args, args.steps, args.lr, weights)
        run.held_out = held_out(model, test_text, args)
        rounded = {key: tidy(value) for key, value in asdict(run).items()}
        report["runs"].append(rounded | {"summary": summary(run, args.target)})
        report["manifest"] = manifest(args, revision, time.time() - began)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report) + "\n")
        print(table(report).splitlines()[-1], flush=True)
    print(table(report))
    draw(report, args.plot)


if __name__ == "__main__":
    main()
