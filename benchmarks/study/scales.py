"""How large the study is: everything that decides it, for a smoke test of the chain and for the study itself."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shape:
    """A Llama-style model with tied embeddings."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    tokens: int
    """Of a window, in training and evaluation."""

    @property
    def parameters(self) -> int:
        """Without embeddings."""
        head = self.width // self.heads
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_heads * head
        return self.layers * (attention + 3 * self.width * self.ffn + 2 * self.width) + self.width


@dataclass(frozen=True)
class Training:
    """A run's length and its optimizer; the rest is the recipes' (AdamW 0.9/0.95, decay 0.01, clip 1, cosine)."""

    steps: int
    windows: int
    """A step."""
    micro: int
    """Windows of a micro-batch."""
    lr: float
    floor: float = 0.05
    """Last learning rate over the peak."""
    warmup: int = 20
    validate_every: int = 200
    validation_windows: int = 64
    save_every: int = 100


@dataclass(frozen=True)
class Sweep:
    """Compressed-prefix continuation under every one of the compressors and budgets, on the first windows."""

    compressors: tuple[str, ...]
    keep: tuple[str, ...]
    windows: int


@dataclass(frozen=True)
class Needle:
    """Pass keys hidden in a text: accuracy by budget."""

    length: int
    depths: str
    samples: int
    """Of each depth."""
    keep: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """What is measured of every model. A window's first `prefix` tokens are compressed, `continuation` tokens follow."""

    prefix: int
    continuation: int
    sweeps: tuple[Sweep, ...]
    """Of the policies' models; the sweeps of one compressor and budget must not overlap."""
    ablations: Sweep
    gradient_steps: int
    gradient_windows: int
    gradient_keep: tuple[str, ...]
    dense_windows: int
    """Held-out windows for perplexity over the full cache."""
    needle: Needle | None = None

    @property
    def windows(self) -> int:
        """To be cut."""
        return max(sweep.windows for sweep in (*self.sweeps, self.ablations))


@dataclass(frozen=True)
class Scale:
    """One size of the study."""

    name: str
    evidence: bool
    """Whether its results may be written to docs/evidence.md."""
    corpora: tuple[str, ...]
    held_out: float
    shape: Shape
    base: Training | None
    """None: a trained model is taken (`model`)."""
    continued: Training
    seeds: dict[str, tuple[int, ...]]
    """Policy → seeds (order of the data, routers' initialisation). Runs of equal seed see the same data in the same order."""
    evaluation: Evaluation
    ablation: Training | None = None
    ablation_seeds: tuple[int, ...] = ()
    ablations: tuple[str, ...] = ()
    """Names of jobs.ABLATIONS; empty: all."""
    model: str | None = None
    """Name of a trained model (`kvcat model fetch`) that is continued, in place of one of our own."""
    router: dict = field(default_factory=dict)
    """KVCatConfig fields of the router policy."""
    precision: str = "bf16"
    """Of weights and products in training: bf16 (1.5 times the speed on a CPU that multiplies it) or float32."""


# What held the target in short runs (docs/LOG.md, "Keep rate").
_ROUTER = {
    "router_init_keep": 0.51,
    "router_init_jitter": 1.0,
    "budget_weight": 3.0,
    "gate_gradient_cap": 0.0,
    "router_detach_input": True,
}

SMOKE = Scale(
    name="smoke",
    evidence=False,
    corpora=("python-topics",),
    held_out=0.2,
    shape=Shape(layers=4, width=64, ffn=128, heads=4, kv_heads=2, vocabulary=1024, tokens=96),
    base=Training(
        steps=40,
        windows=8,
        micro=8,
        lr=3e-3,
        warmup=5,
        validate_every=20,
        validation_windows=8,
        save_every=20,
    ),
    continued=Training(
        steps=6, windows=4, micro=4, lr=1e-3, warmup=2, validate_every=6, validation_windows=8, save_every=3
    ),
    seeds={"none": (1, 2), "random": (1,), "router": (1, 2)},
    ablation=Training(
        steps=4, windows=4, micro=4, lr=1e-3, warmup=2, validate_every=4, validation_windows=8, save_every=4
    ),
    ablation_seeds=(1,),
    ablations=("default", "target 0.3"),
    evaluation=Evaluation(
        prefix=48,
        continuation=16,
        sweeps=(
            Sweep(("attention-matching", "recent"), ("0.25", "0.5"), 4),
            Sweep(("random",), ("0.25",), 2),
        ),
        ablations=Sweep(("attention-matching",), ("0.25",), 4),
        gradient_steps=3,
        gradient_windows=2,
        gradient_keep=("0.25",),
        dense_windows=8,
        needle=Needle(length=40, depths="0.5", samples=1, keep=("0.5",)),
    ),
    router=_ROUTER,
)

_CORPORA = (
    "linux",
    "python",
    "sotu",
    "austen",
    "moby-dick",
    "kjv",
    "debian-handbook",
    "qasper",
    "tdavid",
    "mhcc",
    "scofield",
    "web-bible",
    "anarchism",
    "perl",
    "postgresql",
    "debian-reference",
    "factbook",
)

FULL = Scale(
    name="full",
    evidence=True,
    corpora=_CORPORA,
    held_out=0.05,
    shape=Shape(layers=6, width=256, ffn=704, heads=4, kv_heads=2, vocabulary=4096, tokens=512),
    base=Training(
        steps=2200, windows=8, micro=8, lr=2.5e-3, warmup=100, validate_every=200, validation_windows=64
    ),
    continued=Training(steps=250, windows=8, micro=8, lr=1e-3, warmup=10, validate_every=125, save_every=25),
    seeds={"none": (1, 2, 3), "router": (1, 2, 3), "random": (1,), "attention": (1,)},
    evaluation=Evaluation(
        prefix=384,
        continuation=128,
        sweeps=(
            Sweep(("snapkv", "h2o", "recent:sinks=4", "random"), ("0.05", "0.1", "0.2", "0.4"), 30),
            Sweep(("kvsculpt",), ("0.05", "0.1"), 8),
            # What is decided here needs more windows: a model's ΔPPL on 120 is off by as much as seeds differ.
            Sweep(("attention-matching",), ("0.05", "0.1"), 480),
            Sweep(("attention-matching",), ("0.2", "0.4"), 40),
        ),
        ablations=Sweep(("attention-matching",), ("0.05", "0.1"), 30),
        gradient_steps=40,
        gradient_windows=10,
        gradient_keep=("0.05",),
        dense_windows=512,
        needle=Needle(length=384, depths="0,0.5,1", samples=5, keep=("0.1",)),
    ),
    ablation=Training(
        steps=24,
        windows=8,
        micro=8,
        lr=1e-3,
        warmup=4,
        validate_every=24,
        validation_windows=24,
        save_every=12,
    ),
    ablation_seeds=(1,),
    router=_ROUTER | {"distill_weight": 0.6},  # 1 costs 1.5 % of dense perplexity at this size (docs/LOG.md)
)

SMOLLM2 = Scale(
    name="smollm2",
    evidence=True,
    corpora=_CORPORA,
    held_out=0.05,
    shape=Shape(layers=30, width=576, ffn=1536, heads=9, kv_heads=3, vocabulary=49152, tokens=1024),
    base=None,
    model="smollm2-135m",
    continued=Training(
        steps=20,
        windows=4,
        micro=1,
        lr=2e-4,
        warmup=4,
        validate_every=20,
        validation_windows=8,
        save_every=2,
    ),
    seeds={"none": (1,), "router": (1,)},
    evaluation=Evaluation(
        prefix=768,
        continuation=256,
        sweeps=(
            Sweep(("attention-matching",), ("0.05", "0.1"), 12),
            Sweep(("snapkv", "h2o", "random"), ("0.05", "0.1"), 12),
        ),
        ablations=Sweep((), (), 0),
        gradient_steps=20,
        gradient_windows=2,
        gradient_keep=("0.05",),
        dense_windows=16,
        needle=Needle(length=768, depths="0,0.5,1", samples=1, keep=("0.1", "0.3")),
    ),
    router=_ROUTER | {"budget_weight": 10.0},
)

SCALES = {scale.name: scale for scale in (SMOKE, FULL, SMOLLM2)}
