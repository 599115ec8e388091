"""What a servable cache costs and saves in transformers' generate: quality against the free form, bytes, first token, decoding.

Quality: prefix and continuation of one text, Attention Matching with its weights (free) and in the servable form, at the same
number of slots, on the same windows: KL to the full cache per window, and the ratio of the means with a paired bootstrap's 95 %
interval. bf16 is the servable form whose keys and values were rounded to bfloat16, computed in float32.

Times, taking turns in one process, so that only ratios mean something: the first token with the prefix prefilled by the model against
loaded from the file; a decoding step over the servable cache against one over the model's own cache of as many tokens, and over the full cache.
Bytes of the cache are those of the tensors that the process holds. vLLM is not measured here.

    python -m benchmarks.serving                                   # 768 tokens, 5 to 40 %, 8 windows
    python -m benchmarks.serving --windows 50 --keep 0.1 --only quality
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.smoke import add_option, shrink, tiny_model
from kvcat_nemo.common.files import new_file
from kvcat_nemo.compress import (
    Budget,
    KVCache,
    LayerCache,
    Servable,
    compress_servable,
    make,
    next_logits,
    prefill,
)
from kvcat_nemo.models.load import load_causal_lm
from kvcat_nemo.runs.provenance import manifest
from kvcat_nemo.serve import fork, inputs_for, load_cache
from kvcat_nemo.tokens import document_ids, load

ROOT = Path(__file__).resolve().parent.parent


@torch.no_grad()
def _log_probs(model, cache: KVCache, ids: list[int]):
    return next_logits(model, cache, torch.tensor([ids])).double().log_softmax(-1)[0]


def quality(model, windows: list[list[int]], prefix: int, compressor: str, keep: float) -> dict:
    """KL per window of each form, nats per prediction."""
    kl: dict[str, list[float]] = {"free": [], "servable": [], "bf16": []}
    form, maker = Servable(), make(compressor)
    slots = form.slots(Budget(keep_fraction=keep), prefix)
    for ids in windows:
        text, feed = ids[:prefix], ids[prefix:-1]
        prefilled = prefill(model, [text], needs=maker.needs)
        dense = _log_probs(model, prefilled.cache, feed)
        served = compress_servable(model, text, maker, Budget(tokens=slots), form).cache
        rounded = [
            LayerCache(*(x.bfloat16().float() for x in layer.read()), layer.bias_BGS)
            for layer in served.layers
        ]
        forms = {
            "free": maker.compress(prefilled, Budget(tokens=slots)),
            "servable": served,
            "bf16": KVCache(rounded, served.lengths_B, served.facts),
        }
        for name, cache in forms.items():
            other = _log_probs(model, cache, feed)
            kl[name].append(float((dense.exp() * (dense - other)).sum(-1).mean()))
    ratios = {name: _ratio(kl[name], kl["free"]) for name in ("servable", "bf16")}
    return {
        "slots": slots,
        "kept": slots / prefix,
        "kl_by_window": kl,
        "kl": _means(kl),
        "ratio_to_free": ratios,
    }


def _means(columns: dict[str, list[float]]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in columns.items()}


def _ratio(values: list[float], base: list[float]) -> dict[str, float]:
    """Ratio of the means, and its 95 % interval over windows drawn again (paired)."""
    a, b = np.array(values), np.array(base)
    draws = np.random.default_rng(0).integers(0, len(a), (10_000, len(a)))
    low, high = np.quantile(a[draws].mean(1) / b[draws].mean(1), [0.025, 0.975])
    return {"mean": float(a.mean() / b.mean()), "low": float(low), "high": float(high)}


@torch.no_grad()
def times(model, tokenizer, ids: list[int], keep: float, compressor: str, repeats: int, steps: int) -> dict:
    """Seconds of each, in turns; medians."""
    done = compress_servable(model, ids, make(compressor), Budget(keep_fraction=keep), Servable())
    slots = int(done.cache.slots)
    prompt = document_ids(tokenizer, "The main point is")
    each: dict[str, list[float]] = {}

    def timed(name: str, run):
        began = time.perf_counter()
        out = run()
        each.setdefault(name, []).append(time.perf_counter() - began)
        return out

    def first(tokens: list[int], cache=None):
        ids_BN = torch.tensor([tokens])
        return model(ids_BN, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    def decode(cache):
        cache = fork(cache)
        token = torch.tensor([[prompt[-1]]])
        began = time.perf_counter()
        for _ in range(steps):
            model(token, past_key_values=cache, use_cache=True)
        return (time.perf_counter() - began) / steps

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.kv"
        done.cache.save(file)
        for _ in range(repeats):
            full = timed("first_token_prefilled", lambda: first(ids + prompt))
            served = timed("first_token_loaded", lambda: first(prompt, load_cache(file, model)))
            own = first(ids[:slots] + prompt)
            for name, cache in (("served", served), ("own_of_as_many", own), ("full", full)):
                each.setdefault(f"step_{name}", []).append(decode(cache))
        document = load_cache(file, model)
        inputs_for(document, tokenizer, "The main point is")  # what a user writes works on this cache
    held = sum(x.keys.nbytes + x.values.nbytes for x in document.layers)
    prefix = held // slots * len(ids)
    median = {name: statistics.median(values) for name, values in each.items()}
    return {
        "slots": slots,
        "bytes": held,
        "bytes_full": prefix,
        "bytes_ratio": held / prefix,
        "seconds": median,
        "first_token_sooner": median["first_token_prefilled"] / median["first_token_loaded"],
        "step_to_own": median["step_served"] / median["step_own_of_as_many"],
        "step_to_full": median["step_served"] / median["step_full"],
        "seconds_each": each,
    }


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=ROOT / "models/smollm2-135m", help="Hugging Face folder"
    )
    parser.add_argument("--compressor", default="attention-matching")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--prefix", type=int, default=768, help="tokens of a window's compressed part")
    parser.add_argument("--continuation", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024], help="prefixes whose times are taken"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="decoding steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["quality", "times"], help="one of the two")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/serving.json")
    add_option(parser)
    args = shrink(
        parser.parse_args(argv),
        parser,
        keep=[0.3],
        prefix=64,
        continuation=16,
        windows=2,
        tokens=[64],
        repeats=1,
        steps=2,
        threads=1,
    )
    if args.smoke:
        args.model = tiny_model(args.folder / "model")
    if not args.model.is_dir():
        sys.exit(f"--model {args.model}: no such folder; `kvcat model fetch` gets one")
    torch.set_num_threads(args.threads)
    model, tokenizer = load_causal_lm(args.model), load(args.model)
    text = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    size = args.prefix + args.continuation
    ids = document_ids(tokenizer, text[: 8 * size * args.windows + 8 * max(args.tokens)])
    places = np.linspace(0, len(ids) - size, args.windows).astype(int)
    windows = [ids[at : at + size - 1] for at in places]
    facts = {
        "model": args.model.name,
        "text": "pydoc_data.topics of this Python",
        "threads": args.threads,
        "dtype": "float32",
        "compressor": args.compressor,
        "prefix": args.prefix,
        "continuation": args.continuation,
        "windows": args.windows,
        "times": "ratios alone mean something: taken in turns in one process, on a machine that may be busy",
    }
    rows = []
    for keep in args.keep:
        row: dict = {"keep": keep}
        if args.only != "times":
            row["quality"] = quality(model, windows, args.prefix, args.compressor, keep)
        if args.only != "quality":
            row["times"] = {
                str(n): times(model, tokenizer, ids[:n], keep, args.compressor, args.repeats, args.steps)
                for n in args.tokens
            }
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "quality"})[:400], flush=True)
        if "quality" in row:
            print(f"{keep:.0%}: KL {row['quality']['kl']}, {row['quality']['ratio_to_free']}", flush=True)
        with new_file(args.out) as file:
            file.write_text(json.dumps({"manifest": manifest(**facts), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
