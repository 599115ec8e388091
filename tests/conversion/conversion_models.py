"""Small random Hugging Face models on disk, one per feature that a conversion can get wrong."""

import json
import os
import subprocess
import sys

import torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    # Not the values that Megatron fixes (1, 4, 8192), and short enough to matter within a test's text.
    "low_freq_factor": 2.0,
    "high_freq_factor": 8.0,
    "original_max_position_embeddings": 32,
}

_COMMON = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
)
# 131 is prime: tensor parallel 2 has to pad it.
CONFIGS = {
    "qwen2-tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2-untied": ("Qwen2", dict(tie_word_embeddings=False, vocab_size=131)),
    "qwen3": ("Qwen3", dict(head_dim=32, tie_word_embeddings=True, vocab_size=131)),
    "llama3": ("Llama", dict(head_dim=32, rope_scaling=LLAMA3_ROPE, tie_word_embeddings=False)),
    "llama2": ("Llama", dict(num_key_value_heads=4, rope_scaling={"type": "linear", "factor": 2.0})),
}


def build(name, folder, dtype=torch.float32, **overrides):
    """Write the model `name` of CONFIGS; every parameter is random, biases and norms included."""
    import transformers

    family, options = CONFIGS[name]
    config = getattr(transformers, family + "Config")(**(_COMMON | options | overrides))
    torch.manual_seed(len(name))
    model = getattr(transformers, family + "ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.15
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, spread)
    model.to(dtype).save_pretrained(folder)
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "remove"}))


def tensors_of(folder):
    """Name → tensor of all safetensors files in a folder, read by the safetensors library."""
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def same_bits(left, right):
    bits = {4: torch.int32, 2: torch.int16}
    return left.dtype == right.dtype and torch.equal(
        left.view(bits[left.itemsize]), right.view(bits[right.itemsize])
    )


def run_python(*arguments, timeout=120, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        timeout=timeout,
        text=True,
        capture_output=True,
        **options,
    )
