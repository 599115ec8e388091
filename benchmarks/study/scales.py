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
class Evaluation:
    """Compressed-prefix continuation, and the gradient curves."""

    windows: int
    prefix: int
    compressors: tuple[str, ...]
    keep: tuple[str, ...]
    gradient_steps: int
    gradient_windows: int
    gradient_keep: tuple[str, ...]


@dataclass(frozen=True)
class Scale:
    """One size of the study."""

    name: str
    evidence: bool
    """Whether its results may be written to docs/evidence.md."""
    corpora: tuple[str, ...]
    held_out: float
    shape: Shape
    base: Training
    continued: Training
    seeds: dict[str, tuple[int, ...]]
    """Policy → seeds (order of the data, routers' initialisation). Runs of equal seed see the same data in the same order."""
    ablation: Training
    ablation_seeds: tuple[int, ...]
    ablations: tuple[str, ...]
    """Names of jobs.ABLATIONS; empty: all."""
    evaluation: Evaluation
    router: dict = field(default_factory=dict)
    """KVCatConfig fields of the router policy."""


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
    shape=Shape(layers=4, width=64, ffn=128, heads=4, kv_heads=2, vocabulary=1024, tokens=64),
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
        windows=4,
        prefix=48,
        compressors=("attention-matching", "recent"),
        keep=("0.25", "0.5"),
        gradient_steps=3,
        gradient_windows=2,
        gradient_keep=("0.25",),
    ),
    router=_ROUTER,
)

FULL = Scale(
    name="full",
    evidence=True,
    corpora=(
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
    ),
    held_out=0.05,
    shape=Shape(layers=8, width=256, ffn=704, heads=8, kv_heads=4, vocabulary=8192, tokens=512),
    base=Training(
        steps=4000, windows=32, micro=8, lr=1.5e-3, warmup=200, validate_every=200, validation_windows=128
    ),
    continued=Training(steps=600, windows=32, micro=8, lr=3e-4, warmup=30, validate_every=100),
    seeds={"none": (1, 2, 3), "random": (1, 2, 3), "attention": (1,), "router": (1, 2, 3)},
    ablation=Training(steps=200, windows=32, micro=8, lr=3e-4, warmup=20, validate_every=100),
    ablation_seeds=(1, 2),
    ablations=(),
    evaluation=Evaluation(
        windows=60,
        prefix=384,
        compressors=("attention-matching", "kvsculpt", "snapkv", "h2o", "recent:sinks=4", "random"),
        keep=("0.05", "0.1", "0.2", "0.4"),
        gradient_steps=50,
        gradient_windows=20,
        gradient_keep=("0.05", "0.1"),
    ),
    router=_ROUTER,
)

SCALES = {scale.name: scale for scale in (SMOKE, FULL)}
