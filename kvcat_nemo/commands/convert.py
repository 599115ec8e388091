"""`kvcat convert`: checkpoints between Hugging Face and Megatron."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from kvcat_nemo.commands.options import friendly_errors

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Size(click.ParamType):
    """A number of bytes, such as 5GB, 500MB or 1000000."""

    name = "size"

    def convert(self, value, param, ctx):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B)?", str(value).strip().upper())
        unit = "" if match is None or match.group(2) in (None, "B") else match.group(2)
        if match is None or float(match.group(1)) * _UNITS[unit] < 1:
            self.fail(f"{value!r} is not a size; write 5GB or 500MB", param, ctx)
        return int(float(match.group(1)) * _UNITS[unit])


def dtype_option(function):
    return click.option(
        "--dtype",
        type=click.Choice(["keep", "float32", "bfloat16"]),
        default="keep",
        show_default=True,
        help="Type of the written tensors.",
    )(function)


def force_option(function):
    return click.option(
        "--force", is_flag=True, help="Replace OUT if kvcat wrote it and nothing else lies in it."
    )(function)


def unverified_option(function):
    return click.option(
        "--unverified",
        is_flag=True,
        help="Take a checkpoint without kvcat_seal.json: a plain NeMo or Megatron one, or a folder that an older kvcat imported.",
    )(function)


@click.group()
def command():
    """Move checkpoints between Hugging Face and Megatron, and prove that both are the same model.

    \b
    Supported: Llama 2, 3 and 3.1 (SmolLM2 too), Qwen2 and Qwen2.5, Qwen3 dense.
    """


@command.command("import")
@click.argument("hf_dir", metavar="MODEL")
@click.argument("out", type=click.Path())
@dtype_option
@force_option
def import_(hf_dir, out, dtype, force):
    """Convert MODEL, a Hugging Face folder or a hub id (owner/name or owner/name@revision), into the Megatron checkpoint
    folder OUT.

    OUT holds weights/ (distributed checkpoint, loadable at any tensor and pipeline parallel size), hf/
    (config and tokenizer) and kvcat_checkpoint.json. It appears only when the conversion is complete.

    \b
    Examples:
      kvcat convert import Qwen/Qwen2.5-0.5B checkpoints/qwen2.5-0.5b
      kvcat convert import models/smollm2-135m checkpoints/smollm2-135m --dtype bfloat16
    """
    from kvcat_nemo.conversion.importing import import_hf

    with friendly_errors():
        click.echo(f"wrote {import_hf(hf_dir, out, dtype=dtype, force=force)}")


@command.command()
@click.argument("ckpt", type=click.Path(exists=True, file_okay=False))
@click.argument("out", type=click.Path())
@click.option(
    "--hf-config",
    help="Hugging Face or imported folder, or hub id, with config and tokenizer; needed when CKPT holds none.",
)
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Bytes per file.")
@dtype_option
@force_option
@unverified_option
def export(ckpt, out, hf_config, max_shard_size, dtype, force, unverified):
    """Write the plain Hugging Face model of the Megatron checkpoint CKPT to the folder OUT.

    Optimizer state and routers are left out; vocabulary padding is cut off. CKPT's files are compared with its manifest.

    \b
    Examples:
      kvcat convert export checkpoints/smollm2-135m exported/smollm2-135m
      kvcat convert export run/checkpoints/step=100 exported/mine --hf-config models/smollm2-135m
    """
    from kvcat_nemo.conversion.exporting import export_hf

    with friendly_errors():
        options = dict(base=hf_config, max_shard_size=max_shard_size, dtype=dtype)
        options |= dict(force=force, unverified=unverified)
        click.echo(f"wrote {export_hf(ckpt, out, **options)}")


@command.command()
@click.argument("hf_dir", metavar="MODEL")
@click.argument("ckpt", type=click.Path(exists=True, file_okay=False))
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="Tensor parallel size.")
@click.option("--pp", type=click.IntRange(1), default=1, show_default=True, help="Pipeline parallel size.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    default=1e-4,
    show_default=True,
    help="Largest absolute difference of logits.",
)
@click.option(
    "--tokens", type=click.IntRange(1), default=32, show_default=True, help="Tokens to decode with both."
)
@click.option("--text", help="Text to compare on; a paragraph of Jane Austen by default.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "float64"]),
    default="float32",
    show_default=True,
    help="Of the computation. float64 tells rounding from error: tensor parallel ranks sum in another order.",
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write the report to this file.")
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=1800,
    show_default=True,
    help="Seconds for the Megatron processes.",
)
@unverified_option
def verify(hf_dir, ckpt, tp, pp, tolerance, tokens, text, precision, json_file, timeout, unverified):
    """Prove that the Megatron checkpoint CKPT is the same model as MODEL, a Hugging Face folder or hub id.

    Compares every tensor bit by bit, float32 logits over a text, and greedily decoded tokens. Starts
    tp × pp processes. The exit code is 1 unless all three agree.

    \b
    Examples:
      kvcat convert verify models/smollm2-135m checkpoints/smollm2-135m
      kvcat convert verify models/smollm2-135m checkpoints/smollm2-135m --tp 3 --json report.json
    """
    from kvcat_nemo.conversion.verify import verify as run

    with friendly_errors():
        options = dict(
            tolerance=tolerance, new_tokens=tokens, text=text, precision=precision, timeout=timeout
        )
        options["unverified"] = unverified
        (report,) = run(hf_dir, ckpt, layouts=[(tp, pp)], **options)
        if json_file:
            Path(json_file).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    same = report.tensors - len(report.different_tensors)
    equal = sum(a == b for a, b in zip(report.decoded, report.decoded_hf, strict=True))
    click.echo(f"layout   tensor parallel {tp}, pipeline parallel {pp}")
    click.echo(f"weights  {same} of {report.tensors} tensors bit-exact ({report.stored_dtype})")
    click.echo(
        f"logits   {precision}, max |difference| {report.max_abs_difference:.3g} (tolerance {tolerance:g}), "
        f"KL {report.mean_kl:.3g} nats, top-1 agreement {report.top1_agreement:.2%}, "
        f"{report.text_tokens} tokens of {report.text_source}"
    )
    click.echo(f"greedy   {equal} of {len(report.decoded)} tokens equal")
    if not report.ok:
        raise click.ClickException("not the same model: " + "; ".join(report.failures))
    click.echo("the same model")
