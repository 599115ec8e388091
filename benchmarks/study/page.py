"""The page of results, made from the results' JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcat_nemo.runs.metrics_file import write_atomically

_PAPER = "The paper's 0.5B (arXiv 2605.05971), ΔPPL base → KV-CAT: 5 % .780 → .461, 10 % .662 → .422, 20 % .777 → .438, 40 % .592 → .360."


def with_spread(value: dict[str, Any] | None, digits: int = 3) -> str:
    """mean ± sd (n)."""
    if value is None:
        return "–"
    text = f"{value['mean']:.{digits}f}"
    return text + (f" ± {value['sd']:.{digits}f}" if value["sd"] is not None else "") + f" ({value['n']})"


def render(reports: list[dict[str, Any]], conclusions: str = "") -> str:
    """Markdown of reports that `report.make_report` made, one per scale."""
    lines = ["# Evidence: are the caches more compressible?", ""]
    if conclusions:
        lines += [conclusions.strip(), ""]
    lines += [
        "Made by `make study` (benchmarks/study; figures in benchmarks/study/*.json). Means ± standard deviation over seeds, number "
        "of seeds in brackets. “Beyond seeds”: the difference to the control exceeds twice the standard error that the spread over "
        "seeds gives. p: paired test over windows of the excess loss, NLL(compressed) − NLL(dense).",
        "",
        _PAPER,
        "",
    ]
    for report in reports:
        lines += _scale(report)
    return "\n".join(lines)


def _scale(report: dict[str, Any]) -> list[str]:
    base, scale = report["base"], report["scale"]
    image = lambda what, text: [f"![{text}](img/study-{scale}-{what}.png)", ""]  # noqa: E731
    title = base["model"] or "A model of our own"
    lines = [f"## {title}", ""]
    if not report["evidence"]:
        lines += [
            f"**Scale `{scale}`: a test of the chain on a model that has learnt nothing. None of its figures is evidence.**",
            "",
        ]
    about = f"{base['parameters']:,} parameters without embeddings, vocabulary {base['vocabulary']:,}, windows of {base['window']} tokens"
    if "training" in base:
        done = base["training"]
        about += (
            f"; trained from nothing on {done['tokens']:,} tokens in {done['steps']:,} steps, {done['hours']:.2f} h; held-out perplexity "
            f"{done['before']['dense_ppl']:.1f} → {done['after']['dense_ppl']:.2f}"
        )
    lines += [about + ".", ""]
    if report["measurable"]:
        lines += [
            "| kept | random eviction, ΔPPL | Attention Matching, ΔPPL | ratio |",
            "|---|---|---|---|",
            *(
                f"| {x['keep']} | {x['random']:.3f} | {x['attention-matching']:.3f} | {_ratio(x['ratio'])} |"
                for x in report["measurable"]
            ),
            "",
            "On the base model. A ratio near 1 would mean that it uses too little context for compressibility to be measured.",
            "",
        ]
    lines += ["### Continued pretraining at equal tokens", "", *_training(report["training"], "policy"), ""]
    if report["policies_not_run"]:
        lines += ["Not run yet: " + ", ".join(report["policies_not_run"]) + ".", ""]
    if report["dense"]:
        lines += ["### Over the full cache", "", *_dense(report["dense"]), ""]
    lines += [
        "### Compressed-prefix continuation",
        "",
        *image("continuation", "ΔPPL by compressor, budget and policy"),
    ]
    lines += [*_table(report["continuation"]), ""]
    if report["gradient"]:
        lines += [
            "### Caches optimised by gradient",
            "",
            *image("gradient", "ΔPPL over steps of Adam on the cache"),
        ]
        lines += [*_curves(report["gradient"]), ""]
    if report["needle"]:
        lines += ["### Needle", "", *_needle(report["needle"]), ""]
    if report["masks"]:
        lines += [
            "### Health of the routers' training",
            "",
            *image("health", "loss parts, keep rates, perplexity"),
        ]
        lines += ["What they keep, means over seeds, by layer group:", "", *_masks(report["masks"]), ""]
        lines += image("masks", "kept slots of a window by layer group")
    if report["ablations"]["training"]:
        lines += ["### Ablations", "", "One factor changed against `default`; shorter runs.", ""]
        lines += [*_training(report["ablations"]["training"], "setting"), ""]
        lines += [*_table(report["ablations"]["continuation"]), ""]
    if report["ablations"]["not_run"]:
        lines += ["Not run yet: " + ", ".join(report["ablations"]["not_run"]) + ".", ""]
    return lines


def _dense(found: dict) -> list[str]:
    out = [
        f"{found['windows']} held-out windows of {found['tokens']} tokens, evenly spread, of the exported models.",
        "",
        "| models | perplexity | against the control of the same seed | p (windows) |",
        "|---|---|---|---|",
    ]
    for name, group in found["groups"].items():
        p = f"{group['p']:.2g}" if "p" in group else "–"
        percent = f"{with_spread(group['percent'], 2)} %" if "percent" in group else "–"
        out.append(f"| {name} | {with_spread(group['perplexity'], 2)} | {percent} | {p} |")
    return out


def _needle(rows: list[dict]) -> list[str]:
    out = ["| compressor | kept | models | keys found, % | NLL of the key |", "|---|---|---|---|---|"]
    return out + [
        f"| {r['compressor']} | {100 * r['keep']:.3g} % | {r['group']} | {with_spread(r['accuracy'], 1)} | {with_spread(r['nll'], 2)} |"
        for r in rows
    ]


def _masks(runs: dict[str, dict]) -> list[str]:
    each = list(runs.values())
    count = len(each[0]["kept"])
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    out = [
        "| tokens | share | " + " | ".join(f"group {i}" for i in range(count)) + " |",
        "|---" * (count + 2) + "|",
        "| all | 100 % | "
        + " | ".join(f"{mean([r['kept'][i] for r in each]):.2f}" for i in range(count))
        + " |",
    ]
    for kind, first in each[0]["by_kind"].items():
        there = [r["by_kind"][kind]["kept"] for r in each if kind in r["by_kind"]]
        kept = " | ".join(f"{mean([k[i] for k in there]):.2f}" for i in range(count))
        out.append(f"| {kind} | {100 * first['share']:.1f} % | {kept} |")
    return out


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
        "| compressor | kept | models | ΔPPL | KL | top-1, % | against the control | beyond seeds: ΔPPL, KL | p (windows) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (r["compressor"], r["keep"])):
        versus = f"{r['difference']:+.3f} ({_ratio(r['ratio'])})" if "difference" in r else "–"
        word = {None: "–", True: "yes", False: "no"}
        beyond = f"{word[r.get('beyond_seeds')]}, {word[r.get('kl_beyond_seeds')]}"
        p = f"{r['p']:.2g}" if "p" in r else "–"
        out.append(
            f"| {r['compressor']} | {100 * r['keep']:.3g} % | {r['group']} | {with_spread(r['delta_ppl'])} | {with_spread(r['kl'], 4)} | "
            f"{with_spread(r['top1'], 1)} | {versus} | {beyond} | {p} |"
        )
    return out


def _curves(rows: list[dict]) -> list[str]:
    out = [
        "| models | kept | ΔPPL at the start | at the end | speed-up to the control's end, by seed |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        speeds = ", ".join("never" if x is None else _ratio(x) for x in r["speed_up"])
        out.append(
            f"| {r['group']} | {100 * r['keep']:.3g} % | {with_spread(r['start'])} | {with_spread(r['end'])} | {speeds} |"
        )
    return out


def write_page(
    reports: list[dict[str, Any]], path: Path, *, evidence_page: Path, conclusions: str = ""
) -> Path:
    """Write the page; docs/evidence.md only from a scale that is evidence.

    Raises:
        ValueError: when a scale that is none is to be written there.
    """
    for report in reports:
        if path.resolve() == evidence_page.resolve() and not report["evidence"]:
            raise ValueError(
                f"{path}: the scale {report['scale']!r} is no evidence; its page stays with its results"
            )
    write_atomically(path, render(reports, conclusions).rstrip() + "\n")
    return path
