"""How long does each compressor take, in units of the prefill of the same prefix?

Prefill and compression alternate in one process, so that both see the same machine; the ratio is of medians. The text
is Python's own language reference, which comes with every Python. Writes one JSON with a manifest.

    python benchmarks/compressors.py                                      # 768 tokens, keep 10 %, two threads
    python benchmarks/compressors.py --only attention-matching --keep 0.4 --repeats 5 --out /tmp/c.json
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcat_nemo.compress import Budget, make, prefill
from kvcat_nemo.manifest import manifest

ROOT = Path(__file__).resolve().parent.parent
SPECIFICATIONS = (
    "attention-matching",
    "attention-matching:selection=omp",
    "attention-matching:selection=highest",
    "attention-matching:queries=repeat",
    "attention-matching:queries=context",
    "random",
)


def measure(model, ids: list[int], specification: str, budget: Budget, repeats: int) -> dict:
    """Seconds of prefill (nothing recorded) and of compression, and of recording what the compressor needs."""
    compressor = make(specification)
    seconds: dict[str, list[float]] = {"prefill": [], "recording": [], "compress": []}
    for _ in range(repeats):
        start = time.perf_counter()
        prefilled = prefill(model, [ids])
        after = time.perf_counter()
        if compressor.needs:
            prefilled = prefill(model, [ids], needs=compressor.needs)
        recorded = time.perf_counter()
        cache = compressor.compress(prefilled, budget)
        done = time.perf_counter()
        seconds["prefill"].append(after - start)
        # What recording adds to the prefill, not the second prefill itself.
        seconds["recording"].append(max(0.0, recorded - after - (after - start)) if compressor.needs else 0.0)
        seconds["compress"].append(done - recorded)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return {
        "compressor": specification,
        "settings": compressor.settings,
        "slots": cache.slots,
        "seconds": median,
        "seconds_each": seconds,
        "ratio": (median["compress"] + median["recording"]) / median["prefill"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=ROOT / "models/smollm2-135m", help="Hugging Face folder"
    )
    parser.add_argument("--tokens", type=int, default=768, help="length of the prefix")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.1], help="kept fractions")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(SPECIFICATIONS), help="specifications")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/compressors.json")
    args = parser.parse_args()
    if not args.model.is_dir():
        sys.exit(f"--model {args.model}: no such folder; `kvcat model fetch` gets one")
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))[: 20 * args.tokens]
    ids = AutoTokenizer.from_pretrained(args.model)(text)["input_ids"][: args.tokens]
    prefill(model, [ids])  # warm
    rows = []
    for keep in args.keep:
        for specification in args.only:
            row = {
                "keep": keep,
                **measure(model, ids, specification, Budget(keep_fraction=keep), args.repeats),
            }
            rows.append(row)
            print(
                f"{keep:5.0%} {specification:45s} prefill {row['seconds']['prefill']:6.2f} s, compression"
                f" {row['seconds']['compress']:6.2f} s, ratio {row['ratio']:.2f}",
                flush=True,
            )
    facts = {
        "model": args.model.name,
        "tokens": len(ids),
        "threads": args.threads,
        "repeats": args.repeats,
        "dtype": "float32",
    }
    temporary = args.out.with_suffix(".tmp")
    temporary.write_text(json.dumps({"manifest": manifest(**facts), "rows": rows}, indent=1) + "\n")
    temporary.replace(args.out)


if __name__ == "__main__":
    main()
