"""`kvcat generate`: ask a compressed document."""

from __future__ import annotations

import click

from kvcat_nemo.commands.options import DTYPES, friendly_errors, special_tokens_option


@click.command()
@click.argument("model")
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
@click.option(
    "--chat-template",
    help="The template in which the document was compressed, or none: the prompt alone, without the template's rest."
    "  [default: as the cache was made]",
)
@special_tokens_option("a prompt")
def command(model, cache_file, prompts, tokens, temperature, seed, dtype, chat_template, special_tokens):
    """Let MODEL go on after a compressed document and a prompt; the document itself is not needed any more.

    MODEL, a Hugging Face folder or a hub id, must be the model that made the cache. Nothing is put between document and prompt: begin a question with line
    ends of its own. Where the document was compressed in a chat template, the template's rest follows the prompt (the end
    of the user's message, the beginning of the answer). The text ends at any of the model's end tokens.

    \b
    Example:
      kvcat generate models/smollm2-135m --cache paper.safetensors --prompt "We evaluate on" --prompt "In conclusion,"
    """
    with friendly_errors():
        _generate(model, cache_file, prompts, tokens, temperature, seed, dtype, chat_template, special_tokens)


def _generate(model, cache_file, prompts, tokens, temperature, seed, dtype, chat_template, special_tokens):
    from kvcat_nemo.compress import KVCache, generate
    from kvcat_nemo.compress.context_limit import check_positions
    from kvcat_nemo.compress.fit import check_fits
    from kvcat_nemo.evaluate.models import find_model, load_model
    from kvcat_nemo.tokens import IdRules, end_ids, load, text_of
    from kvcat_nemo.tokens.chat import prompt_ids

    cache = KVCache.load(cache_file)
    empty = [prompt for prompt in prompts if not prompt]
    if empty:
        raise ValueError("--prompt '': give at least one character")
    folder = find_model(model)
    tokenizer = load(folder.path)
    after = _after(cache_file, cache, tokenizer, chat_template)
    rules = IdRules("never", special_tokens)
    asked = [prompt_ids(tokenizer, prompt, after, rules) for prompt in prompts]
    # All prompts before the weights are loaded: none is answered when one of them is too long.
    for prompt, ids in zip(prompts, asked, strict=True):
        check_positions(
            folder.config,
            cache.lengths_B.tolist(),
            len(ids) + tokens,
            what=f"{cache_file}, --prompt {prompt[:20]!r} and --tokens {tokens}",
            fix="give fewer --tokens, a shorter prompt, or compress a shorter text",
        )
    network, _, _ = load_model(folder, dtype=dtype)
    cache = cache.to(network.device)
    check_fits(network, cache)
    full = int(cache.lengths_B[0])
    click.echo(
        f"{cache_file}: {cache.slots:.1f} slots per layer and head for {full} tokens of text,"
        f" {cache.nbytes / 2**20:.2f} MiB ({cache.facts.get('compressor', 'unknown compressor')})",
        err=True,
    )
    stop = end_ids(tokenizer, network)
    for prompt, ids in zip(prompts, asked, strict=True):
        out = generate(
            network,
            cache,
            ids,
            max_new_tokens=tokens,
            stop_ids=stop,
            temperature=temperature,
            seed=seed,
        )
        answer = text_of(tokenizer, out, after=ids, special_tokens=False)
        click.echo(f"{prompt}\n{answer}" if after else prompt + answer)
        if len(prompts) > 1:
            click.echo("---")


def _after(cache_file, cache, tokenizer, chat_template) -> str:
    """What a template puts behind the prompt; "" without one. Caches of older versions know of none."""
    from kvcat_nemo.tokens.chat import NONE, template_digest

    ids = cache.facts.get("ids") or {}
    made = ids.get("chat_template") if isinstance(ids, dict) else None
    if made is not None and not (
        isinstance(made, dict) and all(isinstance(made.get(x), str) for x in ("name", "sha256", "after"))
    ):
        raise ValueError(
            f"{cache_file}: damaged cache file (ids.chat_template = {made!r}); compress the text again"
        )
    if chat_template == NONE or (chat_template is None and made is None):
        return ""
    if made is None:
        raise ValueError(
            f"--chat-template {chat_template}: {cache_file} was made without a template, so its text does not begin as"
            f" the template does; compress it again with --chat-template {chat_template}, or leave the option out"
        )
    if chat_template is not None and template_digest(tokenizer, chat_template) != made["sha256"]:
        raise ValueError(
            f"--chat-template {chat_template}: {cache_file} was made in another template ({made['name']}); leave the"
            " option out, or compress it again"
        )
    return made["after"]
