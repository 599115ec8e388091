"""Perplexity over the full cache on held-out text, of the exported models: what the training is not to cost.

Validation during training sees a few dozen windows. Whether two models differ by one percent takes more of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.study.windows import TokenWindows
from kvcat_nemo.evaluate.models import find_model, load_model, weights_fingerprint
from kvcat_nemo.evaluate.runner import set_threads
from kvcat_nemo.runs.metrics_file import write_atomically

FILE = "dense.json"


def measure(models: dict[str, Path], heldout: Path, tokens: int, windows: int, out: Path) -> Path:
    """Mean negative log-likelihood (nats per token) of each window, by model; a model that is measured is skipped.

    Args:
        models: name → exported folder; heldout: prefix of an indexed dataset; tokens: of a window; windows: how many, spread
            evenly over the dataset; out: the JSON to write, after every model.
    """
    set_threads(1)  # as the other measurements
    inputs, labels = TokenWindows(heldout, tokens).spread(windows)
    known = json.loads(out.read_text()) if out.is_file() else {}
    settings = {"windows": len(inputs), "tokens": tokens}
    if known.get("settings") != settings:
        known = {"settings": settings, "models": {}}
    for name, folder in models.items():
        weights = weights_fingerprint(find_model(folder))
        if known["models"].get(name, {}).get("weights") == weights:
            continue
        each = _nll(load_model(folder)[0], inputs, labels, name)
        known["models"][name] = {"weights": weights, "nll_by_window": each}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(known) + "\n")
    return out


@torch.inference_mode()
def _nll(model, inputs_NT: torch.Tensor, labels_NT: torch.Tensor, name: str) -> list[float]:
    rows = tqdm(zip(inputs_NT, labels_NT, strict=True), total=len(inputs_NT), desc=name)
    return [
        torch.nn.functional.cross_entropy(
            model(ids[None].to(model.device)).logits[0].float(), to.to(model.device)
        ).item()
        for ids, to in rows
    ]
