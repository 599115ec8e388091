"""`kvcat report`: results as one page."""

from __future__ import annotations

import click

from kvcat_nemo.commands.options import friendly_errors


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True))
@click.option(
    "--out", default="report.html", show_default=True, type=click.Path(dir_okay=False), help="The page."
)
@click.option("--title", default="KV cache compression", show_default=True)
def command(results, out, title):
    """Write one self-contained HTML page, and a Markdown file beside it, from RESULTS.

    RESULTS are results files or folders that kvcat evaluate wrote with --out; a folder of several is searched. Files of
    the same protocol stand in one table and must have been measured on the same data.

    \b
    Example:
      kvcat report results/continuation results/needle --out report.html
    """
    with friendly_errors():
        from kvcat_nemo.evaluate.report import write_report

        for path in write_report(results, out, title=title):
            click.echo(str(path))
