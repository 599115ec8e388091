"""What a cache's file holds, in words and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcat_nemo.common.files import sha256_of
from kvcat_nemo.compress.cache import KVCache, LayerCache
from kvcat_nemo.compress.servable import servable_facts
from kvcat_nemo.compress.storage import load


def described(path: str | Path) -> dict[str, Any]:
    """What `kvcat cache inspect` prints, in its order; "facts" is all that the file says of itself.

    Raises:
        ValueError: no cache of ours, or a damaged one.
    """
    cache = load(path)
    facts = cache.facts
    servable = servable_facts(cache, str(path)) if "servable" in facts else None
    ids = facts.get("ids") if isinstance(facts.get("ids"), dict) else {}
    form = ids.get("chat_template") or {}
    length = servable["text_tokens"] if servable else int(cache.lengths_B[0])
    dtypes = sorted({str(x.dtype).removeprefix("torch.") for layer in cache.layers for x in _stored(layer)})
    return {
        "file": f"{path} (sha256 {sha256_of(path)})",
        "model": f"{facts.get('model_name', 'unknown')} (fingerprint {facts.get('model', 'unknown')})",
        "document": f"{facts.get('text', 'unknown')} (sha256 of its token ids {facts.get('text_ids_sha256', 'unknown')})",
        "text tokens": length,
        "slots": _slots(cache),
        "kept": f"{cache.slots / length:.4f} of the text's tokens",
        "bytes": f"{cache.nbytes:,} ({', '.join(dtypes)})",
        "compressor": facts.get("compressor", "unknown"),
        "budget": _budget(facts.get("budget")),
        "chat": form.get("name", "no template") if isinstance(form, dict) else "damaged",
        "servable": _form(servable) if servable else "no: kvcat compress … --servable makes one for engines",
        "next token": f"at position {int(cache.lengths_B[0])}",
        "facts": facts,
    }


def _stored(layer: LayerCache):
    plain = getattr(layer, "recent", layer)
    return plain.keys_BGSD, plain.values_BGSE


def _slots(cache: KVCache) -> str:
    counts = [layer.slots_BG for layer in cache.layers]
    low, high = min(int(x.min()) for x in counts), max(int(x.max()) for x in counts)
    where = f"{len(cache.layers)} layers of {cache.layers[0].bias_BGS.shape[1]} KV heads"
    return f"{low} in each of {where}" if low == high else f"{low} to {high} ({cache.slots:.1f}) in {where}"


def _budget(budget: Any) -> str | None:
    if not isinstance(budget, dict):
        return None
    return ", ".join(f"{name} {value}" for name, value in budget.items() if value is not None)


def _form(facts: dict[str, Any]) -> str:
    return f"yes: {facts['slots']} slots in blocks of {facts['block']}, {facts['dtype']}, without biases"
