"""NeMo recipes. Importing this package registers all of them with `nemo llm pretrain --factory NAME`."""

from kvcat_nemo.recipes import llama, qwen, smollm2, tiny

RECIPES = {
    "kvcat_tiny": tiny.kvcat_tiny,
    "kvcat_tiny_prefix": tiny.kvcat_tiny_prefix,
    "kvcat_smollm2_135m": smollm2.kvcat_smollm2_135m,
    "kvcat_qwen25_0p5b": qwen.kvcat_qwen25_0p5b,
    "kvcat_qwen25_1p5b": qwen.kvcat_qwen25_1p5b,
    "kvcat_qwen25_7b": qwen.kvcat_qwen25_7b,
    "kvcat_qwen3_1p7b": qwen.kvcat_qwen3_1p7b,
    "kvcat_llama31_8b": llama.kvcat_llama31_8b,
}

__all__ = ["RECIPES"]
