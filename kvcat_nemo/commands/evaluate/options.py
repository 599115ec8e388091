"""Options that protocols share, and the way from options to a run."""

from __future__ import annotations

import click

from kvcat_nemo.commands.options import friendly_errors

_SHARED = [
    click.option("--out", required=True, help="Folder of the results; one that is there is gone on with."),
    click.option("--limit", type=int, help="Measure the first N items only.", metavar="N"),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
        default="float32",
        show_default=True,
        help="Of weights and cache.",
    ),
    click.option(
        "--device", default="auto", show_default=True, help="As torch names it; auto: CUDA if there is one."
    ),
    click.option("--threads", type=int, help="CPU threads.  [default: torch's choice]"),
    click.option("--seed", default=0, show_default=True, help="Of everything that is drawn."),
    click.option("--dry-run", is_flag=True, help="Check everything and print the plan; measure nothing."),
]
_COMPRESSION = [
    click.option(
        "--compressors",
        default="attention-matching",
        show_default=True,
        help="Comma-separated: NAME or NAME:setting=value:…, stacked with + (random+int8); SPEC@KEEP gives one a"
        " budget of its own (int8@1). `kvcat compress --list` shows the names.",
    ),
    click.option(
        "--keep",
        default="0.05,0.1,0.2,0.4",
        show_default=True,
        help="Comma-separated budgets: kept fractions (0.1 keeps a tenth), or kept slots (76t).",
    ),
    click.option(
        "--bos",
        type=click.Choice(["auto", "always", "never"]),
        default="auto",
        show_default=True,
        help="BOS before each text: auto: as the model's tokenizer puts it there by itself.",
    ),
]
_QUESTION = [
    click.option(
        "--question",
        type=click.Choice(["unknown", "known"]),
        default="unknown",
        show_default=True,
        help="Whether the compressor sees the question; rows say which.",
    ),
    click.option(
        "--text",
        multiple=True,
        help="File or folder whose sentences are the text.  [default: made-up sentences]",
    ),
]
_WINDOWS = [
    click.option(
        "--windows",
        default="20",
        show_default=True,
        help='How many to cut from the text, or a JSON file of them: a list of {"source", "doc", "start", "ids"}.',
    ),
    click.option(
        "--text", multiple=True, help="File or folder to cut windows from; may be given several times."
    ),
    click.option(
        "--corpora",
        default="",
        help="Comma-separated named corpora to cut from (`kvcat data fetch --help`).  [default: six of them]",
    ),
    click.option(
        "--corpora-folder",
        default="data/corpora",
        show_default=True,
        help="Where they are kept, fetched or not.",
    ),
]


def shared_options(function=None, *, batches: int | bool = 1):
    """--out, --limit, --dtype, --device, --threads, --seed, --dry-run, and --batch-size unless `batches` is False.

    Args:
        batches: the default of --batch-size.
    """
    if function is None:
        return lambda function: shared_options(function, batches=batches)
    size = click.option(
        "--batch-size", default=batches, show_default=True, help="Items that go through the model together."
    )
    return _apply(_SHARED if batches is False else [*_SHARED, size], function)


def question_options(function):
    """--question and --text, of protocols that hide things in text."""
    return _apply(_QUESTION, function)


def compression_options(function):
    """--compressors, --keep and --bos."""
    return _apply(_COMPRESSION, function)


def window_options(function):
    """--windows, --text, --corpora, --corpora-folder."""
    return _apply(_WINDOWS, function)


def _apply(options, function):
    for option in reversed(options):
        function = option(function)
    return function


def run_protocol(name: str, models: tuple[str, ...], dry_run: bool, **options) -> None:
    """Check a protocol's settings as a whole, print its plan, and run it unless it is a dry run."""
    from kvcat_nemo.evaluate.protocol import protocol_class

    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    with friendly_errors():
        protocol = protocol_class(name).of({"models": list(models), **settings})
        for line in protocol.check():
            click.echo(line, err=not dry_run)
        if not dry_run:
            path = protocol.run()
            click.echo(f"wrote {path}", err=True)
            print_rows(path, protocol.shown)


def print_rows(path, figures: tuple[str, ...]) -> None:
    """The rows of a results file as a table, the named figures alone."""
    import json

    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    names = [x for x in ("model", "task", "compressor", "budget", *figures) if any(x in row for row in rows)]

    def shown(value):
        return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)

    lines = [names, *([shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(x.ljust(n) for x, n in zip(line, widths, strict=True)).rstrip())
