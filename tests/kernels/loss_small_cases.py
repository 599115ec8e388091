"""Program of test_token_loss_triton: prints what row_losses_triton.failure says of right and of wrong kernels, as JSON."""

import json

import torch

from kvcat_nemo.kernels.losses import row_losses_triton as form

CPU = torch.device("cpu")


def changed(when=torch.bfloat16, x=1.0, y=1.0, metric=0.0, best=0):
    """The plain form with results that are changed where logits have the dtype `when`."""

    def row_losses(a, b, labels, weights, s, out):
        wide = [None if z is None else z.float() for z in (a, b)]
        found = form.plain_row_losses(*wide, labels, weights, s, out)
        off = a.dtype == when
        for z, to, factor in zip(wide, (a, b), (x, y), strict=True):
            if z is not None:
                to.copy_(z * factor if off else z)
        if off:
            out += metric
            found += best
        return found

    return row_losses


def refuses_bf16(a, *rest):
    if a.dtype == torch.bfloat16:
        raise RuntimeError("no such type\nsecond line")
    return changed()(a, *rest)


def main():
    found = {"as it is": form.failure(CPU)}
    wrong = {
        "bf16 gradients 2 % too large": changed(x=1.02),
        "bf16 gradients of the masked pass are zero": changed(y=0.0),
        "metrics": changed(torch.float32, metric=0.01),
        "likeliest tokens": changed(best=1),
        "cannot be compiled in bf16": refuses_bf16,
    }
    for name, row_losses in wrong.items():
        form.row_losses = row_losses
        found[name] = form.failure.__wrapped__(CPU)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
