"""Trims the results of the continuation sweep to benchmarks/continuation.json, and checks what must hold of them.

    python -m benchmarks.continuation                     # after the sweeps that benchmarks/continuation.yaml tells of
    python -m benchmarks.continuation results/mine --out /tmp/mine.json

Checked: all runs scored the same windows of the same model, and ΔPPL falls as the budget grows, for every compressor.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from benchmarks.smoke import add_option, shrink
from kvcat_nemo.common.files import new_file

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    "model", "compressor", "keep", "slots", "bytes", "windows", "ppl_dense", "delta_ppl", "delta_ppl_se",
    "delta_ppl_windows", "delta_ppl_windows_se", "kl", "kl_se", "top1", "top1_se", "seconds", "nll_by_window",
)  # fmt: skip


def trimmed(row: dict[str, Any]) -> dict[str, Any]:
    """A row's figures to six digits."""

    def short(value):
        if isinstance(value, list):
            return [short(x) for x in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    return {name: short(row[name]) for name in COLUMNS}


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One list of rows, and each run's manifest.

    Raises:
        ValueError: when runs scored other windows or other models.
    """
    first = results[0]["manifest"]
    rows: dict[tuple, dict] = {}
    for one in results:
        manifest = one["manifest"]
        if manifest["data"] != first["data"] or manifest["settings"] != first["settings"]:
            raise ValueError(
                "the runs scored other windows, or with other settings; they cannot stand in one table"
            )
        # Weights alone: windows are token ids, and transformers 4 and 5 read one tokenizer file into two states.
        known = {name: facts["fingerprint"] for name, facts in first["models"].items()}
        facts = {name: facts["fingerprint"] for name, facts in manifest["models"].items()}
        if any(known.get(name, weights) != weights for name, weights in facts.items()):
            raise ValueError("models of the same name differ between the runs")
        for row in one["rows"]:
            rows.setdefault((row["model"], row["compressor"], row["budget"]), trimmed(row))
    return {
        "protocol": "continuation",
        "rows": list(rows.values()),
        "manifests": [x["manifest"] for x in results],
    }


def rises(rows: list[dict[str, Any]]) -> list[str]:
    """Where ΔPPL is larger at a larger budget, in words."""
    found = []

    def about(row):
        return row["model"], row["compressor"]

    for (model, compressor), group in groupby(sorted(rows, key=lambda r: (*about(r), r["keep"])), about):
        for small, large in pairwise(group):
            if large["delta_ppl"] > small["delta_ppl"]:
                found.append(
                    f"{model} {compressor}: ΔPPL {small['delta_ppl']:.3f} at {small['keep']:g},"
                    f" {large['delta_ppl']:.3f} at {large['keep']:g}"
                )
    return found


def remade(page: Path, folder: Path) -> list[Path]:
    """Results files from which a page of results came: the rows of each of its runs."""
    known = json.loads(page.read_text(encoding="utf-8"))
    rows = [row | {"budget": row["keep"]} for row in known["rows"]]
    for number, manifest in enumerate(known["manifests"]):
        (folder / str(number)).mkdir(parents=True)
        text = json.dumps({"manifest": manifest, "rows": rows[number :: len(known["manifests"])]})
        (folder / str(number) / "results.json").write_text(text, encoding="utf-8")
    return [folder]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="*", type=Path, default=[ROOT / "results" / "continuation"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "continuation.json")
    add_option(parser)
    options = shrink(parser.parse_args(argv), parser)
    if options.smoke:
        options.results = remade(parser.get_default("out"), options.folder / "results")
    files = sorted({file for folder in options.results for file in folder.rglob("results.json")})
    if not files:
        sys.exit(f"no results.json under {', '.join(map(str, options.results))}; run the sweep first")
    merged = merge([json.loads(file.read_text(encoding="utf-8")) for file in files])
    rows = ",\n".join(json.dumps(row) for row in merged["rows"])
    manifests = json.dumps(merged["manifests"], indent=1)
    with new_file(options.out) as temporary:
        temporary.write_text(
            f'{{\n"protocol": "continuation",\n"rows": [\n{rows}\n],\n"manifests": {manifests}\n}}\n',
            encoding="utf-8",
        )
    for row in merged["rows"]:
        print(
            f"{row['compressor']:40} {row['keep']:5.3g} {row['delta_ppl']:9.4f} {row['kl']:8.4f} {row['top1']:6.2f}"
        )
    print(f"wrote {options.out}")
    if found := rises(merged["rows"]):
        sys.exit("ΔPPL rises with the budget:\n  " + "\n  ".join(found))


if __name__ == "__main__":
    main()
