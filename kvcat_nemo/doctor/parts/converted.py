"""A converted model against transformers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from kvcat_nemo.doctor import small_model
from kvcat_nemo.doctor.parts.host import Differs, Host, need
from kvcat_nemo.doctor.report import Check, checked


def checks(host: Host) -> Iterator[Check]:
    """A converted model under the layers that this host trains with: dense perplexity against transformers."""
    need("megatron.core")
    if host.model is not None:
        yield checked(host.model.name, functools.partial(_perplexity, host, host.model, None))
        return
    for name in small_model.SHAPES if host.cuda else list(small_model.SHAPES)[1:]:
        yield checked(f"random, {name}", functools.partial(_perplexity, host, None, name))


def _perplexity(host: Host, hf: Path | None, name: str | None) -> dict[str, float]:
    from kvcat_nemo.doctor.perplexity import compare_perplexity

    if hf is None:
        shape = small_model.shape_of(name, host.device)
        hf, base = small_model.make(shape, host.folder / f"model {name}")
    else:
        from kvcat_nemo.conversion.importing import import_hf

        base = host.folder / "given model"
        if not base.exists():
            import_hf(hf, base)
    found = compare_perplexity(hf, base, host.device, host.folder / "perplexity")
    bound = 1e-2
    if not abs(found["log perplexity"] - found["transformers"]) <= bound * max(1.0, found["transformers"]):
        raise Differs(
            f"log perplexity {found['log perplexity']:.5f}, transformers' {found['transformers']:.5f}"
        )
    if not found["mean KL"] <= bound:
        raise Differs(f"KL(transformers ‖ ours) {found['mean KL']:.3g} a token, bound {bound:g}")
    return found
