"""The page of results, made from the results' JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcat_nemo.tracking.metrics_file import write_atomically

_PAPER = "The paper's 0.5B (arXiv 2605.05971), ΔPPL base → KV-CAT: 5 % .780 → .461, 10 % .662 → .422, 20 % .777 → .438, 40 % .592 → .360."


def with_spread(value: dict[str, Any] | None, digits: int = 3) -> str:
    """mean ± sd (n)."""
    if value is None:
        return "–"
    text = f"{value['mean']:.{digits}f}"
    return text + (f" ± {value['sd']:.{digits}f}" if value["sd"] is not None else "") + f" ({value['n']})"


def render(report: dict[str, Any]) -> str:
    """Markdown of a report that `__main__.report` made."""
    smoke = not report["evidence"]
    lines = ["# Evidence: are the caches more compressible?", ""]
    if smoke:
        lines += [
            f"**Scale `{report['scale']}`: a test of the chain on a model that has learnt nothing. None of its figures is evidence.**",
            "",
        ]
    base = report["base"]
    lines += [
        "Made by `make study` from benchmarks/study; means ± standard deviation over seeds, number of seeds in brackets.",
        "",
        "## The base model",
        "",
        f"{base['parameters']:,} parameters without embeddings, vocabulary {base['vocabulary']:,}, T = {base['window']}; "
        f"{base['training']['tokens']:,} tokens in {base['training']['steps']:,} steps, {base['training']['hours']:.2f} h; held-out "
        f"perplexity {base['training']['before']['dense_ppl']:.2f} → {base['training']['after']['dense_ppl']:.2f}.",
        "",
    ]
    if report["measurable"]:
        lines += [
            "| kept | random eviction, ΔPPL | Attention Matching, ΔPPL | ratio |",
            "|---|---|---|---|",
            *(
                f"| {x['keep']} | {x['random']:.3f} | {x['attention-matching']:.3f} | {_ratio(x['ratio'])} |"
                for x in report["measurable"]
            ),
            "",
            "A ratio near 1 would mean that the model uses too little context for compressibility to be measured.",
            "",
        ]
    lines += ["## Continued pretraining at equal tokens", "", *_training(report["training"], "policy"), ""]
    lines += ["## Compressed-prefix continuation", "", _PAPER, "", *_table(report["continuation"]), ""]
    lines += ["## Caches optimised by gradient", "", *_curves(report["gradient"]), ""]
    if report["ablations"]["training"]:
        lines += ["## Ablations", "", "One factor changed against `default`; shorter runs.", ""]
        lines += [*_training(report["ablations"]["training"], "setting"), ""]
        lines += [*_table(report["ablations"]["continuation"]), ""]
    if report["ablations"]["not_run"]:
        lines += ["Not run, because the method cannot do them yet:", ""]
        lines += [f"- {name}: needs {why}" for name, why in report["ablations"]["not_run"].items()] + [""]
    return "\n".join(lines)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ×"


def _training(groups: dict[str, dict], title: str) -> list[str]:
    head = [
        f"| {title} | tokens | dense perplexity | masked perplexity | keep rate, last tenth |",
        "|---|---|---|---|---|",
    ]
    return head + [
        f"| {name} | {g['tokens']:,} | {with_spread(g['dense_ppl'])} | {with_spread(g.get('masked_ppl'))} | {with_spread(g.get('keep_rate'))} |"
        for name, g in groups.items()
    ]


def _table(rows: list[dict]) -> list[str]:
    out = [
        "| compressor | kept | models | ΔPPL | KL | top-1, % | against the control | beyond seeds | p (windows) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (r["compressor"], r["keep"])):
        versus = f"{r['difference']:+.3f} ({_ratio(r['ratio'])})" if "difference" in r else "–"
        beyond = {None: "–", True: "yes", False: "no"}[r.get("beyond_seeds")]
        p = f"{r['p']:.2g}" if "p" in r else "–"
        out.append(
            f"| {r['compressor']} | {100 * r['keep']:.3g} % | {r['group']} | {with_spread(r['delta_ppl'])} | {with_spread(r['kl'], 4)} | "
            f"{with_spread(r['top1'], 1)} | {versus} | {beyond} | {p} |"
        )
    return out


def _curves(rows: list[dict]) -> list[str]:
    out = [
        "| models | kept | ΔPPL at the start | at the end | speed-up to the control's end |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        out.append(
            f"| {r['group']} | {100 * r['keep']:.3g} % | {with_spread(r['start'])} | {with_spread(r['end'])} | "
            f"{', '.join(_ratio(x) for x in r['speed_up']) or '–'} |"
        )
    return out


def write_page(report: dict[str, Any], path: Path, *, evidence_page: Path) -> Path:
    """Write the page; docs/evidence.md only from a scale that is evidence.

    Raises:
        ValueError: when a scale that is none is to be written there.
    """
    if path.resolve() == evidence_page.resolve() and not report["evidence"]:
        raise ValueError(
            f"{path}: the scale {report['scale']!r} is no evidence; its page stays with its results"
        )
    write_atomically(path, render(report).rstrip() + "\n")
    return path
