"""The yardstick for Attention Matching: its authors' public code on our windows, scored by our metric.

Their repository (github adamzweiger/compaction, arXiv 2602.16284) is no dependency and no line of it is here; get it,
and this script drives it: their compactors and their query configurations by their own names, the whole prefix
compressed, nothing kept aside, 255 predictions per window (kvcat_nemo/evaluate/continuation.py tells the metric).

    python -m benchmarks.attention_matching_authors run --code COMPACTION --windows results/windows.json \\
        --out results/am_authors.json AM-HighestAttnKeys:repeat:0.05,0.1:20 AM-OMP:repeat:0.05:10
    python -m benchmarks.attention_matching_authors summary results/am_authors.json --windows results/windows.json

Two things are done once instead of over and over, which changes no figure: a window's reference queries are kept for
all its budgets, and on-policy queries of a layer go on from the hidden states of the layer below (the authors run all
layers below again; checked on a window: equal to the last bit, 13 s instead of 100 s). Rows are written as they come;
a second run goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import sys
import tempfile
import time
import types
from pathlib import Path

import torch

from kvcat_nemo.evaluate.continuation import compare, summary

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "2e59cc8959f5fc9212724fa66691cc27ad7f46dc"
"""Of their repository, as measured."""
PREFIX, CONTINUATION = 768, 256
METRICS = ("nll", "nll_dense", "kl", "top1", "seconds")


class ExactTokens:
    """A model's tokenizer to which the context, and its repetition, are the window's very tokens."""

    def __init__(self, tokenizer, ids: list[int]):
        self.tokenizer, self.ids = tokenizer, ids
        self.text = tokenizer.decode(ids)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **options):
        if not text.startswith(self.text):
            return self.tokenizer(text, **options)
        ids, rest = list(self.ids), text[len(self.text) :]
        if rest:  # a prompt, and the context again
            if not rest.endswith(self.text):
                raise ValueError("only context-prefill and repeat queries go without their generation server")
            ids += self.tokenizer(rest[: -len(self.text)], add_special_tokens=False).input_ids + self.ids
        batch = types.SimpleNamespace(input_ids=torch.tensor([ids]))
        batch.to = lambda device: batch
        return batch


def carried_queries(self, model, sequences, compacted_cache_prefix, original_seq_len, layer_idx, **rest):
    """Their on-policy queries of a layer, one layer further than at the last call: [KV heads, queries, head dim]."""
    from models.cache import CompactedPrefixCache
    from models.llama.modeling_llama import apply_rotary_pos_emb

    if len(sequences) != 1 or any(rest.get(f"{what}_subsample_idx") is not None for what in ("token", "kv")):
        raise ValueError("carried queries are for one repetition without subsampling")
    ids, layers = sequences[0]["suffix_token_ids"], model.model.layers
    N = ids.shape[1]
    if layer_idx == 1:
        self.hidden = model.model.embed_tokens(ids)
        places = torch.arange(original_seq_len, original_seq_len + N)[None]
        self.rope = model.model.rotary_emb(self.hidden, places)
    slots = compacted_cache_prefix[layer_idx - 1][0].shape[2]
    mask = torch.zeros(1, 1, N, slots + N)
    mask[..., slots:] = torch.full((N, N), -math.inf).triu(1)
    cache = CompactedPrefixCache(compacted_cache_prefix, original_seq_len=original_seq_len, clone=True)
    self.hidden = layers[layer_idx - 1](
        self.hidden, attention_mask=mask, past_key_values=cache, position_embeddings=self.rope
    )
    attention = layers[layer_idx].self_attn
    q = attention.q_proj(layers[layer_idx].input_layernorm(self.hidden))
    q = q.view(1, N, -1, attention.head_dim).transpose(1, 2)
    q, _ = apply_rotary_pos_emb(q, q, *self.rope)
    return q[0].reshape(model.config.num_key_value_heads, -1, attention.head_dim)


class Authors:
    """Their code on one model, one window at a time."""

    def __init__(self, code: Path, model: Path):
        sys.path.insert(0, str(code))
        import evaluation  # noqa: F401 (before the rest: their packages import each other)
        from compaction.query_generation import QueryGenerator
        from models.llama import LlamaForCausalLM
        from transformers import AutoTokenizer

        from kvcat_nemo.models.hf_config import read_model
        from kvcat_nemo.models.load import check_loaded, hf_config

        os.chdir(code)  # their configurations are files below the folder they are started in
        self.model = LlamaForCausalLM.from_pretrained(
            model, config=hf_config(model), dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        check_loaded(self.model, read_model(model), str(model))
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.known: dict = {}
        generate = QueryGenerator.generate_queries

        def once(generator, **options):
            mode = self.known["mode"]
            if mode not in self.known:
                self.known[mode] = generate(generator, **{**options, "return_sequences": True})
            queries, facts, sequences = self.known[mode]
            return queries, copy.deepcopy(facts), sequences

        QueryGenerator.generate_queries = once

    def _open(self, ids: list[int]) -> None:
        from transformers.cache_utils import DynamicCache

        if self.known.get("ids") == ids:
            return
        cache, start = DynamicCache(config=self.model.config), time.perf_counter()
        self.model(torch.tensor([ids[:PREFIX]]), past_key_values=cache, use_cache=True)
        seconds = time.perf_counter() - start
        dense = self.model(torch.tensor([ids]), use_cache=False).logits[0, PREFIX : PREFIX + CONTINUATION - 1]
        self.known = {"ids": ids, "cache": cache, "seconds": seconds, "dense": dense}
        self.known["tokens"] = ExactTokens(self.tokenizer, ids[:PREFIX])

    @torch.no_grad()
    def row(self, ids: list[int], method: str, queries: str, keep: float) -> dict:
        from compaction.compaction_methods.registry import get_compaction_method
        from evaluation.configs.algorithms.default import config
        from evaluation.configs.utils import load_query_config
        from models.cache import CompactedPrefixCache

        self._open(ids)
        known, budget = self.known, int(PREFIX * keep)
        compactor = get_compaction_method(method, method_kwargs=dict(config[method]))
        if hasattr(compactor, "_extract_on_policy_queries_for_layer"):
            compactor._extract_on_policy_queries_for_layer = types.MethodType(carried_queries, compactor)
        reused, known["mode"] = queries in known, queries
        torch.manual_seed(0)
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()) as said:
            layers, facts = compactor.compact_kv_cache(
                past_key_values=known["cache"],
                target_size=budget,
                indices=range(PREFIX),
                query_config=load_query_config(queries),
                model=self.model,
                tokenizer=known["tokens"],
                formatted_context=known["tokens"].text,
            )
        seconds = time.perf_counter() - start
        cache = CompactedPrefixCache(tuple(layers), original_seq_len=PREFIX)
        fed = torch.tensor([ids[PREFIX : PREFIX + CONTINUATION - 1]])
        logits = self.model(fed, past_key_values=cache, use_cache=True).logits[0]
        heads = self.model.config.num_key_value_heads * len(layers)
        return {
            **compare(known["dense"], logits, torch.tensor(ids[PREFIX + 1 : PREFIX + CONTINUATION])),
            "budget": budget,
            "slots_per_head": sum(int((bias > -math.inf).sum()) for _, bias, _ in layers) / heads,
            "seconds": seconds,
            "seconds_prefill": known["seconds"],
            "queries_reused": reused,
            "queries": facts["query_generation"]["final_n_queries_per_kv_head"],
            "max_abs_value": max(values.abs().max().item() for _, _, values in layers),
            "lstsq_failures": said.getvalue().count("lstsq failed"),
        }


def run(code: Path, model: Path, windows: Path, out: Path, plans: list[str]) -> None:
    """Rows of every METHOD:QUERIES:KEEP,KEEP…:WINDOWS, window by window."""
    parts = [plan.split(":") for plan in plans]
    code, model, out = code.resolve(), model.resolve(), out.resolve()
    cut = json.loads(windows.read_text())
    rows = json.loads(out.read_text()) if out.exists() else []
    seen = {(row["method"], row["queries_mode"], row["keep"], row["window"]) for row in rows}
    authors = Authors(code, model)
    for i, window in enumerate(cut):
        for method, queries, keeps, count in parts:
            for keep in map(float, keeps.split(",")):
                if i >= int(count) or (method, queries, keep, i) in seen:
                    continue
                row = {"method": method, "queries_mode": queries, "keep": keep, "window": i}
                row |= {key: window[key] for key in ("source", "doc", "start")}
                row |= authors.row(window["ids"], method, queries, keep)
                rows.append(row)
                partial = out.with_suffix(".partial")
                partial.write_text(json.dumps(rows, indent=0))
                os.replace(partial, out)
                print(
                    method,
                    queries,
                    keep,
                    i,
                    {name: round(row[name], 4) for name in METRICS},
                    flush=True,
                )


def summarise(rows: list[dict]) -> list[dict]:
    """One row per method, queries and budget, with the figures of `kvcat evaluate continuation` under its names.

    Seconds are the least of those rows whose reference queries were not at hand already.
    """
    out = []
    for key in sorted({(row["method"], row["queries_mode"], row["keep"]) for row in rows}):
        group = [row for row in rows if (row["method"], row["queries_mode"], row["keep"]) == key]
        group.sort(key=lambda row: row["window"])
        items = [
            {"slots": row["slots_per_head"], "bytes": 0, **{name: row[name] for name in METRICS}}
            for row in group
        ]
        figures = summary(items, CONTINUATION - 1)
        timed = [row["seconds"] for row in group if not row.get("queries_reused")]
        figures |= {
            "seconds": min(timed, default=None),
            "max_abs_value": max(row["max_abs_value"] for row in group),
        }
        del figures["bytes"]
        head = dict(zip(("method", "queries", "keep"), key, strict=True))
        out.append({**head, "which_windows": [row["window"] for row in group], **figures})
    return out


def smoke() -> None:
    """Both commands on a random model, with a stand-in for the authors' code that keeps the whole cache."""
    from benchmarks import authors_standin
    from benchmarks.smoke import tiny_model

    authors_standin.install()
    folder = Path(tempfile.mkdtemp(prefix="kvcat-smoke-"))
    (folder / "code").mkdir()
    model, windows, rows = tiny_model(folder / "model"), folder / "windows.json", folder / "rows.json"
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 257, (2, PREFIX + CONTINUATION), generator=rng).tolist()
    cut = [{"source": "random", "doc": i, "start": 0, "ids": one} for i, one in enumerate(ids)]
    windows.write_text(json.dumps(cut))
    plan = f"{authors_standin.METHOD}:{authors_standin.QUERIES}:1.0:2"
    main(
        [
            "run",
            "--code",
            str(folder / "code"),
            "--model",
            str(model),
            "--windows",
            str(windows),
            "--out",
            str(rows),
            plan,
        ]
    )
    page = folder / "page.json"
    main(["summary", str(rows), "--windows", str(windows), "--out", str(page)])
    (line,) = json.loads(page.read_text())["rows"]
    assert (
        line["slots"] == PREFIX and abs(line["delta_ppl"]) < 1e-3 * line["ppl_dense"] and line["top1"] > 99
    ), line


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command")
    parser.add_argument("--smoke", action="store_true", help="both commands without their code, in seconds")
    first = commands.add_parser("run")
    first.add_argument("--code", type=Path, required=True, help="a checkout of their repository")
    first.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m")
    first.add_argument("plans", nargs="+", metavar="METHOD:QUERIES:KEEP,…:WINDOWS")
    second = commands.add_parser("summary")
    second.add_argument("rows", type=Path)
    for command, default in (
        (first, ROOT / "results" / "am_authors.json"),
        (second, Path(__file__).with_suffix(".json")),
    ):
        command.add_argument("--windows", type=Path, default=ROOT / "results" / "windows.json")
        command.add_argument("--out", type=Path, default=default)
    told = parser.parse_args(argv)
    if told.smoke:
        return smoke()
    if told.command is None:
        parser.error("give run or summary")
    if told.command == "run":
        torch.set_num_threads(1)
        run(told.code, told.model, told.windows, told.out, told.plans)
        return
    from kvcat_nemo.runs.provenance import manifest

    page = {
        "code": f"the authors' public code, github adamzweiger/compaction at {COMMIT}",
        "model": "SmolLM2-135M-Instruct, float32",
        "protocol": f"prefix {PREFIX}, continuation {CONTINUATION}: {CONTINUATION - 1} predictions a window",
        "windows_sha256": hashlib.sha256(told.windows.read_bytes()).hexdigest(),
        "rows": summarise(json.loads(told.rows.read_text())),
        "manifest": manifest(rows=told.rows.name, windows=told.windows.name),
    }
    partial = told.out.with_suffix(".partial")
    partial.write_text(json.dumps(page, indent=1) + "\n")
    os.replace(partial, told.out)
    print(f"wrote {told.out}")


if __name__ == "__main__":
    main()
