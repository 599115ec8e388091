"""From token metrics to the loss of a micro-batch, and from micro-batches to the named figures of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from megatron.core import parallel_state
from torch import Tensor

from kvcat_nemo.engine.layer import kvcat_layers
from kvcat_nemo.kernels.attention.overflow import watch
from kvcat_nemo.kernels.losses.token_loss import TOKEN_METRICS
from kvcat_nemo.method.config import KVCatConfig

TOKEN_TERMS = ("anchor", "distill")
"""Terms of the loss that are sums over tokens, in the order of their metrics; the budget rides on the layers."""
GROUP_METRICS = ("keep_rate", "probability", "budget", "flipped", "behind")


def token_loss_weights(loss_mask_BT: Tensor, kvcat: KVCatConfig) -> Tensor:
    """What the loss of a micro-batch weighs each token's CE (and KL, in a paired pass) with, [2 or 1, B, T], float64."""
    weights = kvcat.gate_policy.loss_weights(kvcat)
    return torch.stack([weights[term] * loss_mask_BT.double() for term in TOKEN_TERMS if term in weights])


def microbatch_loss(
    metrics_KBT: Tensor, loss_mask_BT: Tensor, kvcat: KVCatConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Anchor and distillation terms of a micro-batch (the budget term rides on the layers, engine.layer).

    Of windows that are split over context-parallel ranks each rank has its tokens' part. Megatron divides the loss by the
    number of tokens and averages gradients over those ranks too, so the number returned is that of whole windows, and the
    part is multiplied by the number of ranks.

    Args:
        metrics_KBT: token metrics of the model's last stage; loss_mask_BT: 1 where a token counts.

    Returns:
        weighted loss summed over tokens, number of tokens (int), and the sums of every token metric [K + 1] over this
        rank's tokens, the last being their number.
    """
    mask = loss_mask_BT.to(metrics_KBT.dtype)
    sums = (metrics_KBT.detach() * mask).sum((1, 2))
    tokens = mask.sum()
    weights = token_loss_weights(mask, kvcat).to(mask.dtype)
    loss = (metrics_KBT[: len(weights)] * weights).sum()
    counted = tokens.to(torch.int)
    group = parallel_state.get_context_parallel_group(check_initialized=False)
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(counted, group=group)
        loss = loss * group.size()
    return loss, counted, torch.cat([sums, tokens[None]])


def step_metrics(
    token_sums: Iterable[Tensor], chunks: Iterable[torch.nn.Module], kvcat: KVCatConfig, device=None
) -> dict[str, float]:
    """Named figures of a step, the same on every rank. A collective call: every rank of the job must make it.

    Args:
        token_sums: third results of `microbatch_loss`, empty on all stages but the last.
        chunks: this rank's model chunks; their layers' statistics are taken and cleared.

    Returns:
        loss parts raw (`loss/…`) and weighted (`weighted/…`), their total, `ce_masked`, `top1_agreement`,
        `keep_rate` overall and per group, `probability/…`, `flipped/…`, `behind/…` (share of rows behind a cut, with
        mask_span=prefix), `tokens`; of a paired batch `gate_overflow`, the calls of gated attention (layers × micro-batches, all
        ranks) whose backward was done again (kernels/attention/overflow.py).
    """
    token_names = TOKEN_METRICS if kvcat.paired else TOKEN_METRICS[:1]
    rows = kvcat.num_groups * len(GROUP_METRICS)
    sums = torch.zeros(len(token_names) + 1 + 2 * rows + 1, dtype=torch.float64, device=device)
    for micro in token_sums:
        sums[: len(token_names) + 1] += micro.to(sums)
    group_sums = sums[len(token_names) + 1 : -1].view(
        kvcat.num_groups, len(GROUP_METRICS), 2
    )  # sum and count
    for chunk in chunks:
        for layer in kvcat_layers(chunk):
            for stats in layer.pop_stats():
                for i, name in enumerate(GROUP_METRICS):
                    value = getattr(stats, name)
                    if value is not None:
                        group_sums[stats.group, i] += torch.stack([value, torch.ones_like(value)]).to(sums)
    # Tensor-parallel ranks have calls of their own heads; context-parallel ranks count the same calls.
    overflow = torch.tensor(watch.end_of_step(), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(overflow, group=parallel_state.get_tensor_model_parallel_group())
    sums[-1] = overflow / parallel_state.get_context_parallel_world_size()
    torch.distributed.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    # Context-parallel ranks each have some of the tokens, and all of a group's figures, which are means in the end.
    torch.distributed.all_reduce(
        sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    return _name(sums, token_names, group_sums, kvcat)


def _name(sums: Tensor, token_names, group_sums: Tensor, kvcat: KVCatConfig) -> dict[str, float]:
    tokens = float(sums[len(token_names)])
    mean = {name: float(sums[i]) / tokens if tokens else math.nan for i, name in enumerate(token_names)}
    out = {"tokens": tokens, "loss/anchor": mean["ce_dense"]}
    if kvcat.paired:
        out |= {"loss/distill": mean["kl"], "ce_masked": mean["ce_masked"], "top1_agreement": mean["top1"]}
        out["gate_overflow"] = float(sums[-1])
    averages: dict[str, list[float]] = {name: [] for name in GROUP_METRICS}
    for group in range(kvcat.num_groups):
        for i, name in enumerate(GROUP_METRICS):
            total, count = group_sums[group, i].tolist()
            if count:
                averages[name].append(total / count)
                out[f"{name}/group{group}"] = total / count
    for name, values in averages.items():
        if values:
            out["loss/budget" if name == "budget" else name] = sum(values) / len(values)
    weights = kvcat.gate_policy.loss_weights(kvcat)
    known = [name for name in weights if f"loss/{name}" in out]
    out |= {f"weighted/{name}": weights[name] * out[f"loss/{name}"] for name in known}
    out["loss/total"] = sum(out[f"weighted/{name}"] for name in known)
    return out
