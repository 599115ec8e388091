"""The parts of `kvcat train doctor --gpu`. Each yields its checks as they are done, on a GPU or, for the tests, on the CPU.

On CUDA a part compares the GPU with the CPU in float32, or with transformers, or with itself; on the CPU the same functions run
with small shapes, where only the launch of GPU kernels is missing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvcat_nemo.doctor import compare, nemo_training, small_model
from kvcat_nemo.doctor.ranks import result_of, run_each, run_ranks
from kvcat_nemo.doctor.report import SKIPPED, Check, Skip, checked
from kvcat_nemo.runs.layout import RunFolder


class Differs(AssertionError):
    """Two things that must agree do not."""


@dataclass(frozen=True)
class Host:
    """Where parts run."""

    device: str
    folder: Path
    """Working folder; parts share what they made there."""
    model: Path | None = None
    """Hugging Face folder for `converted`; None: a random model made from a seed."""

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


def agree(*differences: list[str]) -> None:
    """Raise Differs with the first few, when there are any."""
    found = [text for some in differences for text in some]
    if found:
        more = f" (and {len(found) - 4} more)" if len(found) > 4 else ""
        raise Differs("; ".join(found[:4]) + more)


# --- (a) kernels ---


def kernels(host: Host) -> Iterator[Check]:
    """Every case of kernel_cases.py on every attention kernel that is installed."""
    from kvcat_nemo.doctor.kernel_cases import CASES, HOSTS, run_case
    from kvcat_nemo.kernels.fused.selection import PACKAGES

    for backend, where in HOSTS.items():
        if where.device != host.device:
            continue
        package = PACKAGES.get(backend)
        if package and importlib.util.find_spec(package) is None:
            yield Check(backend, SKIPPED, f"{package} is not installed")
            continue
        for name, case in CASES.items():
            yield checked(f"{backend}: {name}", functools.partial(run_case, where, case))


# --- (b) losses ---


def losses(host: Host) -> Iterator[Check]:
    """CE and KL from hidden states in bf16, and their gradients, against the method's functions in float64.

    By PyTorch's operations and by Triton's kernels; and which of them, and of the forms of attention's columns, runs take here.
    """
    yield checked("forms that runs take", functools.partial(_chosen_forms, host))
    for name in TRITON:
        yield checked(name, functools.partial(_triton_works, host, name))
    for kernel in ("torch", "triton"):
        for name, settings in {
            "paired": {},
            "paired, one sweep": {"known": True},
            "paired, temperature 2": {"temperature": 2.0},
            "plain": {"paired": False},
        }.items():
            yield checked(f"{kernel}: {name}", functools.partial(_loss_case, host, kernel, **settings))


def _chosen_forms(host: Host) -> dict[str, str]:
    from kvcat_nemo.kernels.attention.columns_choice import columns_for
    from kvcat_nemo.kernels.losses.token_loss import select_loss_kernel

    device = torch.device(host.device)
    columns = columns_for(device).__name__.rpartition(".")[2]
    return {
        "losses": select_loss_kernel("auto", device),
        "columns": "triton" if columns == "columns_triton" else "torch",
    }


TRITON = {
    "row_losses_triton": "kvcat_nemo.kernels.losses.row_losses_triton",
    "columns_triton": "kvcat_nemo.kernels.attention.columns_triton",
}


def _triton(host: Host, name: str):
    """A module of Triton kernels. Skip where none can run: then PyTorch's operations are what runs take."""
    if not host.cuda:
        raise Skip("Triton's kernels run on CUDA alone")
    try:
        return importlib.import_module(TRITON[name])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise  # a module of the project's own that is not there is a failure
        raise Skip(f"Triton is not installed ({error})") from error


def _triton_works(host: Host, name: str) -> None:
    """A small case, by Triton's kernels and by PyTorch's operations: where it fails, runs silently take the slower form."""
    why = _triton(host, name).failure(torch.device(host.device))
    if why:
        raise Differs(f"runs take PyTorch's operations here: {why}")


def _loss_case(
    host: Host, kernel: str, paired: bool = True, temperature: float = 1.0, known: bool = False
) -> dict[str, float]:
    if kernel == "triton":
        _triton(host, "row_losses_triton")
    from kvcat_nemo.kernels.losses.token_loss import token_losses
    from kvcat_nemo.method.losses import distillation, next_token_ce

    T, B, V, M = (512, 2, 32_003, 1024) if host.cuda else (24, 2, 3_001, 64)
    passes = 1 + paired
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, passes * B, M, generator=rng).to(host.device, host.dtype)
    weight = (2 * torch.randn(V, M, generator=rng) * M**-0.5).to(host.device, host.dtype)
    labels = torch.randint(0, V, (B, T), generator=rng).to(host.device)
    weights = torch.rand(passes, B, T, generator=rng, dtype=torch.float64).to(host.device)

    def plain(h, w):
        logits = (h @ w.t()).transpose(0, 1)
        if not paired:
            return next_token_ce(logits, labels)[None]
        dense, masked = logits.chunk(2)
        return torch.stack([next_token_ce(dense, labels), distillation(dense, masked, temperature)])

    def ours(h, w):
        options = {"loss_weights": weights if known else None, "memory_mib": 64 if host.cuda else 0.1}
        options["kernel"] = kernel
        return token_losses(h, w, labels, paired=paired, temperature=temperature, **options)[:passes]

    def differentiate(function, *leaves):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves)

    exact = differentiate(plain, hidden.double(), weight.double())
    found = differentiate(ours, hidden, weight)
    out = {}
    for name, value, expected in zip(("losses", "d hidden", "d weight"), found, exact, strict=True):
        error = float((value.double() - expected).norm() / expected.norm())
        out[name] = error
        if not error <= 1e-2:
            raise Differs(f"{name}: relative error {error:.3g}, bound 1e-2")
    return out


# --- (c) ten steps ---


def megatron(host: Host) -> Iterator[Check]:
    """Ten steps on plain Megatron-core in bf16, everything on that recipes have on GPUs, against float32 on the CPU."""
    _need("megatron.core")
    references, runs = {}, {}
    for name in small_model.SHAPES:
        base = _megatron_job(host, name) | {"start": str(host.folder / f"megatron {name}" / "start")}
        base |= {"steps": 10 if host.cuda else 5}
        plain = {"dtype": "float32", "make_start": True, "distributed": False, "overlap": False}
        references[f"{name}, float32"], runs[name] = base | plain, base
    if host.cuda:
        expected = run_each(references, 1, "cpu", host.folder / "megatron cpu")
        found = run_each(runs, 1, host.device, host.folder / "megatron")
    else:
        found = expected = run_each(references | runs, 1, "cpu", host.folder / "megatron")
    for name, job in runs.items():
        yield checked(name, functools.partial(_same_training, job, name, found, expected))


def _megatron_job(host: Host, name: str) -> dict[str, Any]:
    shape = small_model.shape_of(name, host.device)
    return {key: value for key, value in shape.items() if key != "vocab"}


def _same_training(job: dict, name: str, found, expected) -> dict[str, Any]:
    ours, theirs = result_of(found, name), result_of(expected, f"{name}, float32")
    tie = compare.near_tie(job["layers"], job["hidden"])
    wrong, clear = compare.masks_differ(ours["masks"], theirs["masks"], tie)
    agree(compare.figures_differ(ours["figures"], theirs["figures"]), wrong)
    return {"clear decisions": clear, "median step, s": statistics.median(ours["seconds"])} | ours["fused"]


def nemo(host: Host) -> Iterator[Check]:
    """Ten steps of `nemo llm pretrain` against the same in float32 on the CPU: figures and first masks."""
    _need("nemo")
    for name in small_model.SHAPES if host.cuda else list(small_model.SHAPES)[:1]:
        yield checked(name, functools.partial(_nemo_run, host, name))


NEMO_STEPS, NEMO_SAVES = 10, 4


def _nemo_job(host: Host, name: str, folder: Path, **more) -> dict[str, Any]:
    shape = small_model.shape_of(name, host.device)
    _, base = small_model.make(shape, host.folder / f"model {name}")
    return nemo_training.job(folder, shape=shape, base=base, steps=NEMO_STEPS, save_every=NEMO_SAVES, **more)


def _straight(host: Host, name: str) -> Path:
    """Folder of an unbroken run; made once."""
    folder = host.folder / f"nemo {name}"
    if not RunFolder(folder / nemo_training.RUN).finished.is_file():
        nemo_training.run_jobs([_nemo_job(host, name, folder)], host.device, host.folder / f"nemo {name} log")
    return folder


def _nemo_run(host: Host, name: str) -> dict[str, Any]:
    found = _straight(host, name)
    reference = found
    if host.cuda:
        reference = host.folder / f"nemo {name} on the CPU"
        nemo_training.run_jobs(
            [_nemo_job(host, name, reference)], "cpu", host.folder / f"nemo {name} CPU log"
        )
    ours, theirs = (
        [x for x in nemo_training.lines_of(f) if x["kind"] == "train"] for f in (found, reference)
    )
    masks = [torch.load(f / nemo_training.MASKS) for f in (found, reference)]
    shape = small_model.shape_of(name, host.device)
    wrong, clear = compare.masks_differ(*masks, compare.near_tie(shape["layers"], shape["hidden"]))
    agree(compare.figures_differ(ours, theirs), wrong)
    if len(ours) != NEMO_STEPS:
        raise Differs(f"{len(ours)} steps, {NEMO_STEPS} expected")
    return {"clear decisions": clear}


# --- (d) a converted model ---


def converted(host: Host) -> Iterator[Check]:
    """A converted model under the layers that this host trains with: dense perplexity against transformers."""
    _need("megatron.core")
    if host.model is not None:
        yield checked(host.model.name, functools.partial(_perplexity, host, host.model, None))
        return
    for name in small_model.SHAPES if host.cuda else list(small_model.SHAPES)[1:]:
        yield checked(f"random, {name}", functools.partial(_perplexity, host, None, name))


def _perplexity(host: Host, hf: Path | None, name: str | None) -> dict[str, float]:
    from kvcat_nemo.doctor.perplexity import compare_perplexity

    if hf is None:
        shape = small_model.shape_of(name, host.device)
        hf, base = small_model.make(shape, host.folder / f"model {name}")
    else:
        from kvcat_nemo.conversion.importing import import_hf

        base = host.folder / "given model"
        if not base.exists():
            import_hf(hf, base)
    found = compare_perplexity(hf, base, host.device, host.folder / "perplexity")
    bound = 1e-2
    if not abs(found["log perplexity"] - found["transformers"]) <= bound * max(1.0, found["transformers"]):
        raise Differs(
            f"log perplexity {found['log perplexity']:.5f}, transformers' {found['transformers']:.5f}"
        )
    if not found["mean KL"] <= bound:
        raise Differs(f"KL(transformers ‖ ours) {found['mean KL']:.3g} a token, bound {bound:g}")
    return found


# --- (e) save, kill, resume ---


def resume(host: Host) -> Iterator[Check]:
    """A run that saves asynchronously is killed and started again: every figure is the unbroken run's, bit for bit."""
    _need("nemo")
    yield checked("D 64, tied", functools.partial(_resume, host, "D 64, tied"))


def _resume(host: Host, name: str) -> dict[str, Any]:
    from kvcat_nemo.tracking.metrics_file import TIMED

    straight, folder = _straight(host, name), host.folder / f"nemo {name} killed"
    nemo_training.run_jobs(
        [_nemo_job(host, name, folder, kill=True)], host.device, host.folder / "killed log"
    )
    before = len(nemo_training.lines_of(folder))
    nemo_training.run_jobs([_nemo_job(host, name, folder)], host.device, host.folder / "resumed log")
    fresh = ("flipped",)  # of the previous step's window, which a new process does not have

    def comparable(run: Path) -> list[dict]:
        return [
            {k: v for k, v in line.items() if k not in TIMED and k.split("/")[0] not in fresh}
            for line in nemo_training.lines_of(run)
        ]

    ours, theirs = comparable(folder), comparable(straight)
    agree(bitwise_differences(ours, theirs, saved=NEMO_SAVES))
    return {"lines before the kill": before, "lines": len(ours)}


def bitwise_differences(ours: list[dict], theirs: list[dict], saved: int) -> list[str]:
    """In words, the first figure that is not equal to the last bit, and whether saving can have to do with it."""
    if len(ours) != len(theirs):
        return [f"{len(ours)} lines of figures, {len(theirs)} expected"]
    for mine, other in zip(ours, theirs, strict=True):
        for name in sorted(mine.keys() | other.keys()):
            if mine.get(name) != other.get(name):
                text = f"{other['kind']} step {other['step']}: {name} is {mine.get(name)}, expected {other.get(name)}"
                if other["step"] <= saved:
                    text += ": before the first save, so this host computes the same run in two ways"
                return [text]
    return []


# --- (f) what a step costs ---


def step(host: Host) -> Iterator[Check]:
    """Kernel launches and host syncs per layer, the paired step over a plain one, peak memory against the plan's."""
    _need("megatron.core")
    yield checked("paired against plain", functools.partial(_step_figures, host))


def _step_figures(host: Host) -> dict[str, Any]:
    size = (
        {"hidden": 1024, "heads": 16, "kv_heads": 4, "head_dim": 64, "tokens": 1024, "windows": 2}
        if host.cuda
        else {"hidden": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "tokens": 32, "windows": 2}
    )
    size |= {"steps": 8 if host.cuda else 2, "profile": True, "micro": 2}
    jobs = [size | {"layers": layers, "policy": policy} for policy in ("router", "none") for layers in (4, 2)]
    results = [result[0] for result in run_ranks(jobs, 1, host.device, host.folder / "step")]
    deep, shallow, plain, _ = results
    out: dict[str, Any] = {}
    kinds = ("launches", "syncs") if host.cuda else ("operators", "items")
    for kind in kinds:
        each = (deep["counts"][kind] - shallow["counts"][kind]) / (2 * size["micro"])
        out[f"{kind} per layer and micro-batch"] = each
    if not out[f"{kinds[0]} per layer and micro-batch"] > 0:
        raise Differs(f"the profiler saw no {kinds[0]} in two layers: {deep['counts']}, {shallow['counts']}")
    # The last step is the profiled one, the first ones warm up.
    times = [
        statistics.median(result["seconds"][len(result["seconds"]) // 4 : -1]) for result in (deep, plain)
    ]
    out |= {"paired step, s": times[0], "plain step, s": times[1], "paired / plain": times[0] / times[1]}
    if host.cuda:
        planned = planned_bytes(jobs[0])
        out |= {
            "peak bytes": deep["peak_bytes"],
            "planned bytes": planned,
            "peak / planned": deep["peak_bytes"] / planned,
        }
        if deep["peak_bytes"] > 1.2 * planned:
            raise Differs(
                f"peak memory {deep['peak_bytes'] / 1e9:.2f} GB, more than a fifth above the {planned / 1e9:.2f} GB of kvcat train plan"
            )
    return out


def planned_bytes(given: dict[str, Any]) -> int:
    """What `kvcat train plan` would say of a job's memory."""
    from types import SimpleNamespace

    from kvcat_nemo.doctor.training import DEFAULTS, VOCAB
    from kvcat_nemo.engine.cost import Layout, memory_per_gpu
    from kvcat_nemo.method.config import KVCatConfig

    job = DEFAULTS | given
    config = SimpleNamespace(
        hidden_size=job["hidden"],
        ffn_hidden_size=2 * job["hidden"],
        kv_channels=job["head_dim"],
        num_attention_heads=job["heads"],
        num_query_groups=job["kv_heads"],
        num_layers=job["layers"],
        add_qkv_bias=False,
        qk_layernorm=False,
        gated_linear_unit=True,
        vocab_size=VOCAB,
        share_embeddings_and_output_weights=job["tied"],
        kvcat=KVCatConfig(policy=job["policy"], num_groups=2, router_dim=16),
    )
    layout = Layout(1, 1, 1, False, True, job["windows"], job["windows"] * job["micro"], job["tokens"])
    return memory_per_gpu(config, layout)["total"]


# --- (g) two GPUs ---

LAYOUTS = {
    "TP2 SP": {"tp": 2},
    "PP2": {"pp": 2},
    "CP2": {"cp": 2},
    "DP2": {"average": True, "bucket": 100_000},
}


def _of_two(host: Host):
    """`run_each`'s results of one process and of two. Both parts below look at them: made once, and kept in the folder."""
    folder = host.folder / "two"
    kept = folder / "results.pt"
    if kept.is_file():
        return torch.load(kept, weights_only=False)
    base = _megatron_job(host, next(iter(small_model.SHAPES)))
    base |= {"start": str(folder / "start"), "micro": 4, "steps": 10 if host.cuda else 2}
    resumed = base | {"load": str(folder / "saved"), "first_step": base["steps"], "steps": 2}
    one = {"straight": base | {"make_start": True, "save": str(folder / "saved")}, "resumed": resumed}
    two = {name: base | settings for name, settings in LAYOUTS.items()}
    two["resumed"] = resumed | {"tp": 2, "save_again": str(folder / "again")}
    alone = run_each(one, 1, host.device, folder / "one")
    result_of(alone, "straight")  # without it nothing can be compared
    both = run_each(two, 2, host.device, folder / "both")
    torch.save((alone, both), kept)
    return alone, both


def parallel(host: Host) -> Iterator[Check]:
    """TP2 with sequence parallelism, PP2, CP2 and DP2 (averaged in the collective) train as one process does."""
    _need("megatron.core")
    for layout in LAYOUTS:
        yield checked(layout, functools.partial(_layout, host, layout))


def _layout(host: Host, layout: str) -> dict[str, float]:
    one, two = _of_two(host)
    found = result_of(two, layout)
    agree(compare.figures_differ(found["figures"], result_of(one, "straight")["figures"]))
    return {"median step, s": statistics.median(found["seconds"])}


def reshard(host: Host) -> Iterator[Check]:
    """A checkpoint of the distributed optimizer that one process wrote goes on at TP2: the same weights and moments."""
    _need("megatron.core")
    yield checked("TP1 → TP2", functools.partial(_reshard, host))


def _reshard(host: Host) -> dict[str, Any]:
    one, two = _of_two(host)
    found = result_of(two, "resumed")
    agree(
        compare.checkpoint_differences(host.folder / "two" / "saved", host.folder / "two" / "again"),
        compare.figures_differ(found["figures"], result_of(one, "resumed")["figures"]),
    )
    return {}


def _need(package: str) -> None:
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise Skip(f"{package} is not installed")
