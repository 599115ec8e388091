"""What a step costs."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

from kvcat_nemo.doctor.parts.host import Differs, Host, need
from kvcat_nemo.doctor.ranks import run_ranks
from kvcat_nemo.doctor.report import Check, checked


def checks(host: Host) -> Iterator[Check]:
    """Kernel launches and host syncs per layer, the paired step over a plain one, peak memory against the plan's."""
    need("megatron.core")
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
