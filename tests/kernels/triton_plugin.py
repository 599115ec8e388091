"""A pytest plugin: every case of test_token_loss.py takes the Triton form of the losses, which Triton interprets on the CPU."""

import pytest

from kvcat_nemo.kernels.losses import token_loss


@pytest.fixture(autouse=True)
def triton_form(monkeypatch):
    monkeypatch.setattr(token_loss, "select_loss_kernel", lambda name, device, group=None: "triton")
