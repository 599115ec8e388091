"""`kvcat compress`: a document's KV cache, made small and kept in a file."""

from __future__ import annotations

import click

from kvcat_nemo.commands.options import DTYPES, SERVED_DTYPES, friendly_errors, id_options


@click.command()
@click.argument("model")
@click.option(
    "--text",
    "text_file",
    required=True,
    type=click.Path(exists=True, dir_okay=False),
    help="The document, plain UTF-8 text.",
)
@click.option(
    "--compressor",
    default="attention-matching",
    show_default=True,
    help="NAME, NAME:setting=value:…, stacked with +: attention-matching+int4. --list shows the names.",
)
@click.option("--keep", type=float, help="Fraction of the slots to keep, in (0, 1]: 0.1 keeps a tenth.")
@click.option("--keep-tokens", type=int, help="Slots to keep per layer and head, instead of --keep.")
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="The cache, as safetensors.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option(
    "--chat-template",
    default="none",
    show_default=True,
    help="Put the document into a user's message: none, default (the tokenizer's template), the NAME of one of its named"
    " templates, or a file of Jinja.",
)
@click.option(
    "--servable",
    is_flag=True,
    help="Write the form that transformers' generate and vLLM read: as many slots in every layer and head (rounded up to whole"
    " blocks), no biases, keys moved to positions 0 to the number of slots.",
)
@click.option(
    "--block",
    type=click.IntRange(1),
    help="With --servable: slots are a multiple of this, the tokens of an engine's page.  [default: 16]",
)
@click.option(
    "--cache-dtype",
    type=click.Choice(SERVED_DTYPES),
    help="With --servable: the dtype of the engine that will read the cache.  [default: as --dtype]",
)
@click.option(
    "--fold",
    "mode",
    flag_value="fold",
    help="With --servable, a document longer than the model's window: read it in chunks, each alone.",
)
@click.option(
    "--rolling",
    "mode",
    flag_value="rolling",
    help="With --servable, the same, but each chunk is read behind the compressed chunks before it.",
)
@click.option(
    "--chunk",
    type=click.IntRange(1),
    help="With --fold or --rolling: tokens of a chunk at most.  [default: half of what the model reads]",
)
@id_options
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, _, wanted: wanted and (_list(), ctx.exit()),
    help="List the compressors and their settings.",
)
def command(
    model,
    text_file,
    compressor,
    keep,
    keep_tokens,
    out,
    dtype,
    chat_template,
    servable,
    block,
    cache_dtype,
    mode,
    chunk,
    bos,
    special_tokens,
):
    """Read a document with MODEL (a Hugging Face folder or a hub id), compress its KV cache, and write the cache to a file.

    The file is then asked as often as you like, without the document: kvcat generate.

    With --chat-template the cache holds the template's text up to the end of the document; kvcat generate puts the
    prompt behind the document, in the same message, and then the template's rest.

    \b
    Examples:
      kvcat compress Qwen/Qwen2.5-0.5B --text paper.txt --keep 0.1 --out paper.safetensors
      kvcat compress models/smollm2-135m --text paper.txt --compressor attention-matching+int4 --keep 0.2 --out p.safetensors
      kvcat compress models/chat --text paper.txt --chat-template default --keep 0.1 --out paper.safetensors
      kvcat compress models/smollm2-135m --text paper.txt --keep 0.1 --servable --cache-dtype bfloat16 --out paper.kv
      kvcat generate models/smollm2-135m --cache paper.safetensors --prompt "In summary, the paper"
    """
    with friendly_errors():
        form = _form(servable, block, cache_dtype, mode, chunk)
        _compress(
            model,
            text_file,
            compressor,
            keep,
            keep_tokens,
            out,
            dtype,
            chat_template,
            bos,
            special_tokens,
            form,
            (mode, chunk) if mode else None,
        )


def _form(servable, block, cache_dtype, mode, chunk):
    """The form of --servable and its options; None without."""
    given = {"--block": block, "--cache-dtype": cache_dtype, "--chunk": chunk}
    if mode and not servable:
        raise ValueError(f"--{mode}: chunks make one cache in the form of --servable alone; add --servable")
    if chunk is not None and not mode:
        raise ValueError(
            f"--chunk {chunk}: it is the size of a part with --fold or --rolling; add one of them"
        )
    if not servable:
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} {value}: it shapes the form of --servable; add --servable")
        return None
    from kvcat_nemo.compress import Servable

    return Servable(block=16 if block is None else block, dtype=cache_dtype)


def _list() -> None:
    from dataclasses import fields

    from kvcat_nemo.compress.kvpress_adapter import PRESSES
    from kvcat_nemo.compress.registry import COMPRESSORS, kind_of

    for name in COMPRESSORS:
        kind = kind_of(name)
        settings = " ".join(f"{field.name}={field.default}" for field in fields(kind))
        click.echo(f"{name}\n    {(kind.__doc__ or '').strip().splitlines()[0]}")
        if settings:
            click.echo(f"    settings: {settings}")
    for name, (press, _) in PRESSES.items():
        click.echo(f"{name}\n    {press} of kvpress, with its settings (pip install 'kvcat-nemo[kvpress]')")
    click.echo("kvpress.CLASS\n    any other press of kvpress, by the name of its class")


def _compress(
    model,
    text_file,
    compressor,
    keep,
    keep_tokens,
    out,
    dtype,
    chat_template,
    bos,
    special_tokens,
    serving,
    long,
):
    from dataclasses import asdict
    from pathlib import Path

    from kvcat_nemo.compress import Budget, compress, compress_servable, make
    from kvcat_nemo.compress.context_limit import check_positions
    from kvcat_nemo.compress.long_text import check_rolls, chunks_of, remove_parts
    from kvcat_nemo.compress.servable import check_can_serve, document_digest
    from kvcat_nemo.compress.storage import check_target
    from kvcat_nemo.data.reading import read_text
    from kvcat_nemo.evaluate.models import find_model, load_model
    from kvcat_nemo.tokens import IdRules, beginning, chat_form, document_ids, load, text_of

    if (keep is None) == (keep_tokens is None):
        raise ValueError("give either --keep FRACTION or --keep-tokens N")
    budget = Budget(keep_fraction=keep, tokens=keep_tokens)
    maker = make(compressor)
    if serving is not None:
        check_can_serve(maker)
    check_target(out)
    text = read_text(text_file)
    if not text.strip():
        raise ValueError(f"--text {text_file}: the document is empty")
    rules, folder = IdRules(bos, special_tokens), find_model(model)
    tokenizer = load(folder.path)
    form = chat_form(tokenizer, chat_template)
    ids = form.document_ids(tokenizer, text, rules) if form else document_ids(tokenizer, text, rules)
    first = [] if form else beginning(tokenizer, bos)
    begun = f", {text_of(tokenizer, first)} first" if first else ""
    where = f", in the chat template {form.name}" if form else begun
    click.echo(f"{text_file}: {len(ids):,} tokens{where}", err=True)
    after = maker.tokens_after(len(ids)) if budget.slots(len(ids)) < len(ids) else 0
    if long is not None:
        chunks_of(len(ids), budget, serving, folder.context, long[1])
    else:
        fix = (
            "give a shorter text"
            if serving is None
            else "give a shorter text, or read it in chunks: --fold or --rolling"
        )
        check_positions(folder.config, [len(ids)], after, what=f"--text {text_file}", fix=fix)
    if serving is not None:
        serving.slots(budget, len(ids))  # what it refuses, it refuses before the weights are loaded
    if long is not None and long[0] == "rolling":
        check_rolls(maker)
    network, _, facts = load_model(folder, dtype=dtype)
    if long is not None:
        done = _in_chunks(network, ids, maker, budget, serving, *long, out)
    elif serving is None:
        done = compress(network, [ids], maker, budget)
    else:
        done = compress_servable(network, ids, maker, budget, serving)
    cache = done.cache
    full = done.full_nbytes
    cache.facts |= {"model": facts.fingerprint, "model_name": facts.name, "text": Path(text_file).name}
    cache.facts["text_ids_sha256"] = document_digest(ids)
    cache.facts["ids"] = {
        **asdict(rules),
        "beginning": first,
        "chat_template": form.facts() if form else None,
    }
    cache.save(out)
    if long is not None:
        remove_parts(Path(f"{out}.parts"))  # not before: the chunks took hours
    click.echo(
        f"{maker} at {budget}: {cache.slots:.1f} of {len(ids)} slots per layer and head, {_size(cache.nbytes)} of"
        f" {_size(full)} ({100 * cache.nbytes / full:.1f} %), in {done.seconds:.1f} s → {out}"
    )


def _in_chunks(network, ids, maker, budget, form, mode, chunk, out):
    """A long document, with a progress bar; finished chunks wait beside the result."""
    import time
    from pathlib import Path

    from tqdm import tqdm

    from kvcat_nemo.compress import Compressed
    from kvcat_nemo.compress.long_text import compress_long

    parts, began = Path(f"{out}.parts"), time.perf_counter()
    if parts.is_dir() and any(parts.iterdir()):
        click.echo(f"{parts}: chunks of an earlier run; those that fit are taken", err=True)
    cache = compress_long(
        network,
        ids,
        maker,
        budget,
        form,
        mode=mode,
        chunk=chunk,
        parts=parts,
        progress=lambda chunks: tqdm(chunks, desc=mode, unit="chunk"),
    )
    config = network.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers * config.num_key_value_heads
    return Compressed(
        cache, len(ids) * layers * 2 * size * network.dtype.itemsize, time.perf_counter() - began
    )


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
