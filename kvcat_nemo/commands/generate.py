"""`kvcat generate`: ask a compressed document."""

from __future__ import annotations

import click

from kvcat_nemo.commands.options import DTYPES, friendly_errors


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--cache",
    "cache_file",
    required=True,
    type=click.Path(exists=True, dir_okay=False),
    help="What kvcat compress wrote.",
)
@click.option(
    "--prompt",
    "prompts",
    required=True,
    multiple=True,
    help="What follows the document. Give it several times: each is asked of the same cache.",
)
@click.option("--tokens", default=60, show_default=True, type=click.IntRange(1), help="New tokens at most.")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: greedy.")
@click.option("--seed", default=0, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
def command(model, cache_file, prompts, tokens, temperature, seed, dtype):
    """Let MODEL go on after a compressed document and a prompt; the document itself is not needed any more.

    MODEL must be the model that made the cache.

    \b
    Example:
      kvcat generate models/smollm2-135m --cache paper.safetensors --prompt "We evaluate on" --prompt "In conclusion,"
    """
    with friendly_errors():
        _generate(model, cache_file, prompts, tokens, temperature, seed, dtype)


def _generate(model, cache_file, prompts, tokens, temperature, seed, dtype):
    from kvcat_nemo.compress import KVCache, generate
    from kvcat_nemo.evaluate.models import load_model

    cache = KVCache.load(cache_file)
    empty = [prompt for prompt in prompts if not prompt]
    if empty:
        raise ValueError("--prompt '': give at least one character")
    network, tokenizer, facts = load_model(model, dtype=dtype)
    if cache.facts.get("model") not in (None, facts.fingerprint):
        raise ValueError(
            f"{cache_file} was made by {cache.facts.get('model_name')} ({cache.facts['model'][:12]}…), not by {model}"
            f" ({facts.fingerprint[:12]}…): another model's cache means nothing to it; compress the text again"
        )
    full = int(cache.lengths_B[0])
    click.echo(
        f"{cache_file}: {cache.slots:.1f} slots per layer and head for {full} tokens of text,"
        f" {cache.nbytes / 2**20:.2f} MiB ({cache.facts.get('compressor', 'unknown compressor')})",
        err=True,
    )
    stop = tokenizer.eos_token_id
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        out = generate(
            network,
            cache,
            ids,
            max_new_tokens=tokens,
            stop_ids=() if stop is None else (stop,),
            temperature=temperature,
            seed=seed,
        )
        click.echo(prompt + tokenizer.decode(out, skip_special_tokens=True))
        if len(prompts) > 1:
            click.echo("---")
