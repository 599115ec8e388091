"""The cases of `kvcat train doctor --gpu` for kernels (kvcat_nemo.doctor.kernel_cases): on the CPU with its fused kernel, so
that nothing is first executed on a GPU; with CUDA on every kernel that is installed (`pytest -m gpu`).
"""

import importlib.util

import pytest
import torch

from kvcat_nemo.doctor.kernel_cases import CASES, HOSTS, run_case
from kvcat_nemo.kernels.fused.selection import PACKAGES


@pytest.fixture(
    params=[
        name if not host.cuda else pytest.param(name, marks=pytest.mark.gpu) for name, host in HOSTS.items()
    ]
)
def host(request):
    host = HOSTS[request.param]
    if host.cuda:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device: this test has only run on the CPU")
        package = PACKAGES.get(host.backend)
        if package and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return host


@pytest.mark.parametrize("name", CASES)
def test_case(host, name):
    try:
        run_case(host, CASES[name])
    except LookupError as nothing_claimed:  # or refused by name, while auto has another kernel
        if host.cuda:
            pytest.skip(str(nothing_claimed))
        assert name.startswith("which backend ran")
