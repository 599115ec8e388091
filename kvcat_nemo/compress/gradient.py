"""Gradient KV optimisation: a small cache trained, the model frozen, until it says what the full cache says.

As Cartridges do (arXiv 2506.06266): keys, values and biases of the slots are parameters, Adam trains them, the loss is
KL(teacher ‖ student) over texts that follow the context, with the model over the full cache as the teacher.

Shapes: B rows of the cache, K lessons a row, N tokens of a lesson, V vocabulary; G KV heads, S slots, D and E head dims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from kvcat_nemo.compress.cache import KVCache, stack_rows
from kvcat_nemo.compress.compressor import Compressor
from kvcat_nemo.compress.context_limit import check_positions
from kvcat_nemo.compress.decode import check_following, extend_checked, logits_checked, next_logits
from kvcat_nemo.compress.prefill import Prefilled
from kvcat_nemo.compress.specification import make
from kvcat_nemo.compress.trained_slots import TrainedSlots

LOSSES = ("kl", "ce")
TEXTS = ("repeat", "sample")


@dataclass
class Lessons:
    """Texts that follow each row's context, and what the teacher says after each of their tokens."""

    ids_BKN: Tensor
    logits_BKNV: Tensor


@dataclass
class Step:
    """One finished step, as `on_step` is told of it."""

    number: int
    """From 1."""
    losses_B: list[float]
    """Each row's mean loss per token in nats, before the step's update."""
    cache: KVCache
    """After the update."""


@torch.no_grad()
def teach(model: PreTrainedModel, full: KVCache, ids_BKN: Tensor) -> Lessons:
    """Lessons from the model over the full cache.

    Args:
        full: of B rows; ids_BKN: tokens that follow the context, K texts a row.

    Raises:
        ValueError: when the rows do not fit.
    """
    if ids_BKN.dim() != 3 or ids_BKN.shape[0] != full.batch or 0 in ids_BKN.shape:
        raise ValueError(
            f"ids {tuple(ids_BKN.shape)}: give [rows, texts, tokens], {full.batch} rows as in the cache, none of them 0"
        )
    logits = [next_logits(model, full, ids_BKN[:, k]) for k in range(ids_BKN.shape[1])]
    return Lessons(ids_BKN, torch.stack(logits, 1))


def optimise(
    model: PreTrainedModel,
    cache: KVCache,
    lessons: Lessons,
    *,
    steps: int,
    lr: float,
    batch: int = 1,
    loss: str = "kl",
    train_bias: bool = True,
    decay: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> KVCache:
    """Train a cache's slots; the given cache and the model stay as they are.

    Rows do not see each other: a row's result does not depend on what it is batched with (but for rounding). Parameters
    are float32 (float64 for a float64 model) whatever the model's dtype; the result has the cache's.

    Args:
        cache: where to start; lessons: for its rows, see `teach`.
        lr: Adam's learning rate, in units of the layer's root mean square key, value, and of 1 for biases.
        batch: lessons of each row in a step, taken in turn.
        loss: "kl" to the teacher's distribution, or "ce" to the lessons' own next tokens.
        decay: let the learning rate fall to 0 along a cosine.
        on_step: told of every step; the cache it gets is its own.

    Raises:
        ValueError: on settings out of range, or lessons for other rows.
    """
    _check(cache, lessons, steps, lr, batch, loss)
    check_following(model, cache, lessons.ids_BKN[:, 0])
    weights = TrainedSlots(cache, train_bias, torch.promote_types(torch.float32, model.dtype))
    adam = torch.optim.Adam(weights.parameters, lr=lr)
    K = lessons.ids_BKN.shape[1]
    with _frozen(model), torch.enable_grad():
        for number in range(1, steps + 1):
            if decay:
                adam.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * (number - 1) / steps))
            first = (number - 1) * batch
            losses_B = 0
            for k in range(first, first + batch):
                student = logits_checked(model, weights.cache(), lessons.ids_BKN[:, k % K])
                part_B = _loss(student, lessons, k % K, loss) / batch
                part_B.sum().backward()
                losses_B = losses_B + part_B.detach()
            adam.step()
            adam.zero_grad()
            if on_step is not None:
                on_step(Step(number, losses_B.tolist(), weights.result()))
    return weights.result()


def _loss(student_BNV: Tensor, lessons: Lessons, k: int, kind: str) -> Tensor:
    """Mean over tokens of each row, [B]."""
    wide = torch.promote_types(torch.float32, student_BNV.dtype)
    if kind == "ce":
        target = lessons.ids_BKN[:, k, 1:]
        flat = F.cross_entropy(student_BNV[:, :-1].to(wide).transpose(1, 2), target, reduction="none")
        return flat.mean(1)
    student = student_BNV.to(wide).log_softmax(-1)
    teacher = lessons.logits_BKNV[:, k].to(wide).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean(1)


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No gradients for weights (they would cost a third of the time), no dropout."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        model.train(training)


def _check(cache: KVCache, lessons: Lessons, steps: int, lr: float, batch: int, loss: str) -> None:
    B, K, N = lessons.ids_BKN.shape
    if cache.batch != B:
        raise ValueError(f"lessons for {B} rows, but the cache has {cache.batch}")
    if steps < 1 or not lr > 0:
        raise ValueError(f"steps={steps}, lr={lr}: give at least one step and a learning rate above 0")
    if not 1 <= batch <= K:
        raise ValueError(f"batch={batch}: there are {K} lessons a row; give 1 to {K}")
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}: choose among {', '.join(LOSSES)}")
    if loss == "ce" and N < 2:
        raise ValueError("loss='ce': lessons of one token have no next token; give longer ones")


@dataclass
class Gradient(Compressor):
    """Slots trained to match the full cache on text that follows the context. Slow, and closest to the full cache."""

    name: ClassVar[str] = "gradient"
    init: str = "attention-matching"
    """The compressor whose slots are trained, by its name."""
    steps: int = 32
    """Adam steps."""
    lr: float = 0.01
    """Learning rate, relative to the size of keys and values."""
    text: str = "sample"
    """What the lessons are: "sample" (the model's own continuations) or "repeat" (the context once more)."""
    lessons: int = 8
    """Texts."""
    tokens: int = 128
    """Tokens of each."""
    batch: int = 1
    """Lessons in a step."""
    seed: int = 0
    """Of samples."""

    def __post_init__(self):
        if self.text not in TEXTS:
            raise ValueError(f"text={self.text!r}: choose among {', '.join(TEXTS)}")
        if self.lessons < 1 or self.tokens < 2:
            raise ValueError(
                f"lessons={self.lessons}, tokens={self.tokens}: give 1 or more, of 2 tokens or more"
            )

        if self.init.startswith(self.name) or "+" in self.init:
            raise ValueError(f"init={self.init!r}: start from another compressor's slots, unquantised")
        self._init  # noqa: B018 (an unknown name is found now)

    @property
    def _init(self) -> Compressor:
        return make(self.init)

    @property
    def needs(self) -> tuple[str, ...]:
        return self._init.needs

    @property
    def smallest(self) -> int:
        return self._init.smallest

    def tokens_after(self, length: int) -> int:
        own = min(self.tokens, length) if self.text == "repeat" else self.tokens
        return max(own, self._init.tokens_after(length))

    def compress_row(self, prefilled: Prefilled, slots: int) -> KVCache:
        start = self._init.compress_row(prefilled, slots)
        if self.text == "repeat":
            texts = _repeats(prefilled, self.lessons, self.tokens)
        else:
            texts = sample(prefilled, self.lessons, self.tokens, seed=self.seed)
        lessons = teach(prefilled.model, prefilled.cache, texts)
        batch = min(self.batch, texts.shape[1])
        return optimise(
            prefilled.model, start, lessons, steps=self.steps, lr=self.lr, batch=batch, decay=True
        )


def _repeats(prefilled: Prefilled, lessons: int, tokens: int) -> Tensor:
    """Stretches of the context, evenly spread over it, [1, K, N]."""
    T = prefilled.ids_BT.shape[1]
    N = min(tokens, T)
    firsts = sorted({round((T - N) * k / max(lessons - 1, 1)) for k in range(lessons)})
    return torch.stack([prefilled.ids_BT[:, first : first + N] for first in firsts], 1)


@torch.no_grad()
def sample(prefilled: Prefilled, lessons: int, tokens: int, *, seed: int) -> Tensor:
    """The model's own continuations of one context at temperature 1, [1, K, N], by the seed.

    Raises:
        ValueError: when they are longer than the model reads behind the context.
    """
    check_positions(
        prefilled.model.config,
        prefilled.lengths,
        tokens,
        what="context and samples",
        fix="give shorter samples",
    )
    generator = torch.Generator(prefilled.ids_BT.device).manual_seed(seed)
    cache = stack_rows([prefilled.cache] * lessons)
    logits, drawn = prefilled.logits_BV.expand(lessons, -1), []
    for _ in range(tokens):
        drawn.append(torch.multinomial(logits.float().softmax(-1), 1, generator=generator))
        logits, cache = extend_checked(prefilled.model, cache, drawn[-1])
        logits = logits[:, -1]
    return torch.cat(drawn, 1)[None]
