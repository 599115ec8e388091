"""How long does each compressor take, in units of the prefill of the same prefix?

Prefill and compression alternate in one process, so that both see the same machine; the ratio is of medians. The text
is Python's own language reference, which comes with every Python. Writes one JSON with a manifest.

    python -m benchmarks.compressors                                      # 768 tokens, keep 10 %, two threads
    python -m benchmarks.compressors --only attention-matching --keep 0.4 --repeats 5 --out /tmp/c.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import pydoc_data.topics
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.smoke import add_option, shrink, tiny_model
from kvcat_nemo.compress import Budget, make, prefill
from kvcat_nemo.models.load import load_causal_lm
from kvcat_nemo.runs.provenance import manifest
from kvcat_nemo.tokens import document_ids, load

ROOT = Path(__file__).resolve().parent.parent
SPECIFICATIONS = (
    "attention-matching",
    "attention-matching:selection=highest",
    "attention-matching:queries=repeat",
    "attention-matching:queries=context",
    "attention-matching:queries=on-policy:reading_tokens=0",
    "random",
)


def measure(model, ids: list[int], specification: str, budget: Budget, repeats: int) -> dict:
    """Seconds of the plain prefill and of compression with what recording for it adds; on the clock, and of all cores.

    The clock is what a user waits for; time of the cores is what is left of it on a machine that does other work too.
    """
    compressor = make(specification)
    each: dict[str, list[float]] = {"prefill": [], "compress": [], "prefill_cpu": [], "compress_cpu": []}
    for _ in range(repeats):
        marks = [_now()]
        prefilled = prefill(model, [ids])
        marks.append(_now())
        if compressor.needs:
            prefilled = prefill(model, [ids], needs=compressor.needs)
        marks.append(_now())
        cache = compressor.compress(prefilled, budget)
        marks.append(_now())
        for kind, suffix in enumerate(("", "_cpu")):
            plain, again, compression = (y[kind] - x[kind] for x, y in itertools.pairwise(marks))
            recording = max(0.0, again - plain) if compressor.needs else 0.0
            each["prefill" + suffix].append(plain)
            each["compress" + suffix].append(compression + recording)
    median = {key: statistics.median(values) for key, values in each.items()}
    return {
        "compressor": specification,
        "settings": compressor.settings,
        "slots": cache.slots,
        "seconds": median,
        "seconds_each": each,
        "ratio": median["compress"] / median["prefill"],
        "ratio_cpu": median["compress_cpu"] / median["prefill_cpu"],
    }


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def main(argv=None) -> None:
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
    add_option(parser)
    args = shrink(parser.parse_args(argv), parser, tokens=48, repeats=1, threads=1, keep=[0.25])
    if args.smoke:
        args.model = tiny_model(args.folder / "model")
    if not args.model.is_dir():
        sys.exit(f"--model {args.model}: no such folder; `kvcat model fetch` gets one")
    torch.set_num_threads(args.threads)
    model = load_causal_lm(args.model)
    text = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))[: 20 * args.tokens]
    ids = document_ids(load(args.model), text)[: args.tokens]
    prefill(model, [ids])  # warm
    facts = {
        "model": args.model.name,
        "tokens": len(ids),
        "threads": args.threads,
        "repeats": args.repeats,
        "dtype": "float32",
    }
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
                f" {row['seconds']['compress']:6.2f} s, ratio {row['ratio']:.2f} (of CPU time {row['ratio_cpu']:.2f})",
                flush=True,
            )
            temporary = args.out.with_suffix(".tmp")
            temporary.write_text(json.dumps({"manifest": manifest(**facts), "rows": rows}, indent=1) + "\n")
            temporary.replace(args.out)


if __name__ == "__main__":
    main()
