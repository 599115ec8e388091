"""Which parallel layouts a model can be split into."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcat_nemo.conversion.arch import Architecture


def check_layout(
    arch: Architecture, tensor_model_parallel_size: int, pipeline_model_parallel_size: int
) -> None:
    """Refuse a parallel layout that Megatron cannot run the model in.

    Raises:
        ValueError: names the fields that do not divide, and the sizes that work.
    """
    splits = {
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "ffn_hidden_size": arch.ffn_hidden_size,
    }
    tp, pp = tensor_model_parallel_size, pipeline_model_parallel_size
    wrong = [f"{name} {value}" for name, value in splits.items() if tp < 1 or value % tp]
    if wrong:
        works = [n for n in range(1, arch.num_query_groups + 1) if not any(v % n for v in splits.values())]
        raise ValueError(
            f"tensor_model_parallel_size {tp} does not divide {', '.join(wrong)}; sizes that work: {_list(works)}"
        )
    if pp < 1 or arch.num_layers % pp:
        works = [n for n in range(1, arch.num_layers + 1) if arch.num_layers % n == 0]
        raise ValueError(
            f"pipeline_model_parallel_size {pp} does not divide num_layers {arch.num_layers}; "
            f"sizes that work: {_list(works)}"
        )


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values))
