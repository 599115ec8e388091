"""`kvcat model`: a base model to try things with, and a look at what a model says."""

from __future__ import annotations

import click


@click.group()
def command():
    """Fetch a base model and write it as a Hugging Face checkpoint."""


@command.command("list")
def list_models():
    """List the base models that can be fetched."""
    from kvcat_nemo.commands.options import friendly_errors
    from kvcat_nemo.data.assets import registry_assets

    with friendly_errors():
        for name, model in registry_assets("base_models").MODELS.items():
            package = model.package
            click.echo(f"{name}  {model.about}; licence {package.license}; from {package.requirement}")


@command.command()
@click.argument("name")
@click.argument("out", required=False, type=click.Path(file_okay=False))
@click.option("--force", is_flag=True, help="Write the folder again even when it already holds the model.")
def fetch(name, out, force):
    """Fetch base model NAME and write it to the folder OUT (models/NAME by default).

    The package file is downloaded by pip, checked against its sha256 and kept in .cache/packages
    (set KVCAT_CACHE to keep it elsewhere). Needs a clone of the project (examples/registry_assets). For any other model
    give its hub id or folder to the commands that take a model; nothing need be fetched first.

    \b
    Examples:
      kvcat model fetch smollm2-135m
      kvcat model fetch smollm2-135m /data/models/smollm2
    """
    from kvcat_nemo.commands.options import friendly_errors
    from kvcat_nemo.data.assets import registry_assets

    with friendly_errors():
        fetch_model = registry_assets("base_models").fetch_model
        fetch_model(name, out, force=force, say=lambda line: click.echo(line, err=True))


@command.command()
@click.argument("model_name", metavar="MODEL")
@click.option("--prompt", default="The main idea of attention in neural networks is", show_default=True)
@click.option(
    "--tokens", default=40, show_default=True, type=click.IntRange(1), help="Tokens to generate, greedily."
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False), help="Also write prompt and text to this file."
)
def generate(model_name, prompt, tokens, json_file):
    """Load MODEL, a Hugging Face folder or a hub id, with transformers and let it continue a prompt.

    Fails when the checkpoint lacks a tensor of its architecture or holds one too many.

    \b
    Example:
      kvcat model generate results/quickstart/model --prompt "A KV cache is"
    """
    import json

    import torch

    from kvcat_nemo.compress.context_limit import check_positions
    from kvcat_nemo.models.hf_config import read_config
    from kvcat_nemo.models.hub import model_folder
    from kvcat_nemo.models.load import load_causal_lm
    from kvcat_nemo.runs.integrity import require_unchanged
    from kvcat_nemo.tokens import document_ids, end_ids, load, text_of

    try:
        folder = model_folder(model_name)
        config = read_config(folder)
        tokenizer = load(folder)
        ids = document_ids(tokenizer, prompt)
        if not ids:
            raise ValueError("--prompt '': give at least one character")
        check_positions(config, [len(ids)], tokens, what="--prompt and --tokens", fix="give fewer")
        require_unchanged(folder)
        model = load_causal_lm(folder)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    given = torch.tensor([ids])
    stop = list(end_ids(tokenizer, model)) or None
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stop or [None])[0],
    )
    text = text_of(tokenizer, out[0].tolist())
    if json_file:
        with open(json_file, "w", encoding="utf-8") as file:
            json.dump({"prompt": prompt, "text": text}, file)
    click.echo(text)
