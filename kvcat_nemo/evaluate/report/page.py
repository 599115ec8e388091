"""One self-contained HTML page, and the same tables in Markdown, from results files."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcat_nemo.common.files import new_file
from kvcat_nemo.evaluate.report import abilities, continuation, generic, questions
from kvcat_nemo.evaluate.report.tables import Section, markdown

# protocol → its section; any other gets plain tables.
SECTIONS: dict[str, Callable[[list[dict[str, Any]]], Section]] = {
    "continuation": continuation.build,
    "gradient": abilities.gradient,
    "needle": questions.needle,
    "ruler": questions.ruler,
    "long-qa": questions.long_qa,
    "base-ability": abilities.base_ability,
}


@dataclass(frozen=True)
class Results:
    """One results file."""

    path: Path
    protocol: str
    rows: list[dict[str, Any]]
    manifest: dict[str, Any]


def read_results(source: str | Path) -> list[Results]:
    """Results of a file, or of a folder: its results.json, else those of its sub-folders.

    Raises:
        ValueError: nothing there, or a file that holds no results; the message names it.
    """
    path = Path(source)
    if path.is_dir():
        own = path / "results.json"
        files = [own] if own.is_file() else sorted(path.rglob("results.json"))
        if not files:
            raise ValueError(f"{path}: no results.json there; did the evaluation finish?")
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"{path}: no such file or folder; give what kvcat evaluate wrote with --out")
    return [_read(file) for file in files]


def _read(path: Path) -> Results:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        out = Results(path, value["protocol"], value["rows"], value.get("manifest", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a results file of kvcat evaluate ({error!r})") from None
    if not isinstance(out.rows, list) or not out.rows or not all(isinstance(row, dict) for row in out.rows):
        raise ValueError(f"{path}: it holds no rows")
    return out


def sections_of(results: Sequence[Results]) -> list[Section]:
    """One section per protocol; rows of several files of a protocol stand together.

    Raises:
        ValueError: when two files of one protocol measured on different data, or a row lacks a field.
    """
    by_protocol: dict[str, list[Results]] = {}
    for one in results:
        by_protocol.setdefault(one.protocol, []).append(one)
    out = []
    for protocol, parts in by_protocol.items():
        data = {json.dumps(part.manifest.get("data"), sort_keys=True): part.path for part in parts}
        if len(data) > 1:
            raise ValueError(
                f"{' and '.join(map(str, data.values()))}: {protocol} on different data cannot stand in one table;"
                " report them apart"
            )
        rows = [row for part in parts for row in part.rows]
        build = SECTIONS.get(protocol, lambda rows, protocol=protocol: generic.build(protocol, rows))
        try:
            out.append(build(rows))
        except KeyError as error:
            names = ", ".join(str(part.path) for part in parts)
            raise ValueError(f"{names}: a row of {protocol} lacks the field {error}") from None
    return out


def html(results: Sequence[Results], *, title: str) -> str:
    """The page; needs nothing from anywhere else."""
    import jinja2

    template = importlib.resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    manifests = [
        {"name": str(one.path), "text": json.dumps(one.manifest, indent=1, sort_keys=True)} for one in results
    ]
    models = list(dict.fromkeys(row.get("model", "") for one in results for row in one.rows))
    subtitle = f"Models: {', '.join(filter(None, models))}. Written by kvcat report."
    return environment.from_string(template).render(
        title=title, subtitle=subtitle, sections=sections_of(results), manifests=manifests
    )


def markdown_text(results: Sequence[Results], *, title: str) -> str:
    """The tables alone."""
    parts = [f"# {title}"]
    for section in sections_of(results):
        parts += [f"## {section.title}", *section.text, *map(markdown, section.tables)]
    return "\n\n".join(parts) + "\n"


def write_report(sources: Sequence[str | Path], out: str | Path, *, title: str) -> tuple[Path, Path]:
    """Write OUT (HTML) and the Markdown file beside it.

    Raises:
        ValueError: as `read_results` and `sections_of`.
    """
    out = Path(out)
    beside = out.with_suffix(".md")
    if beside.exists() and not out.exists():
        raise ValueError(f"--out {out}: {beside} would be written beside it, and exists; choose another name")
    results = [one for source in sources for one in read_results(source)]
    texts = {out: html(results, title=title), out.with_suffix(".md"): markdown_text(results, title=title)}
    for path, text in texts.items():
        with new_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return out, out.with_suffix(".md")
