"""A model that is large beside its largest tensor: memory stays bounded, and a kill leaves nothing complete."""

import shutil
import signal
import subprocess
import sys
import time

import pytest

from kvcat_nemo.conversion.folders import find_weights
from tests.conversion.conversion_models import edit_config, run_python

_BIG = """
import sys, torch
from pathlib import Path
from kvcat_nemo.conversion.arch import from_hf_config
from kvcat_nemo.conversion.folders import read_config
from kvcat_nemo.conversion.safetensors_io import SafetensorsWriter
from kvcat_nemo.conversion.weight_map import hf_shapes
folder = Path(sys.argv[1])
shapes = hf_shapes(from_hf_config(read_config(folder)))
writer = SafetensorsWriter(folder, {n: (s, torch.float32) for n, s in shapes.items()}, 10**12)
for name, shape in shapes.items():
    writer.write(name, torch.rand(shape))
writer.close()
"""


@pytest.fixture(scope="module")
def big_model(hf_models, tmp_path_factory):
    """A float32 model of 0.4 GB whose largest tensor is 17 MB: holding all of it would show."""
    folder = tmp_path_factory.mktemp("big") / "hf"
    folder.mkdir()
    shutil.copyfile(hf_models["llama2"] / "config.json", folder / "config.json")
    sizes = dict(hidden_size=1024, intermediate_size=4096, head_dim=256, num_hidden_layers=6, vocab_size=512)
    edit_config(folder, **sizes)
    made = run_python("-c", _BIG, folder)
    assert made.returncode == 0, made.stderr
    yield folder
    shutil.rmtree(folder)


_MEASURED = """
import re, sys
from kvcat_nemo.conversion.{module} import {function} as convert
convert(sys.argv[1], sys.argv[2])
# Not ru_maxrss: that starts at the resident set of the process which started this one.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024)
"""


def test_peak_memory_is_three_tensors_and_500_mb(big_model, tmp_path):
    size = (big_model / "model.safetensors").stat().st_size
    bound = 3 * 4096 * 1024 * 4 + 500 * 10**6
    steps = [
        ("importing", "import_hf", big_model, "mid"),
        ("exporting", "export_hf", tmp_path / "mid", "out"),
    ]
    for module, function, source, out in steps:
        code = _MEASURED.format(module=module, function=function)
        done = run_python("-c", code, source, tmp_path / out)
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout.split()[-1])
        print(f"{function}: peak {peak / 1e6:.0f} MB of {bound / 1e6:.0f} MB, model {size / 1e6:.0f} MB")
        # The whole process counts, interpreter and torch included: about 300 MB before the first tensor.
        assert peak < bound, f"{function}: {peak / 1e6:.0f} MB"
        assert bound < 250e6 + size, "the model is too small for this test to fail"
    shutil.rmtree(tmp_path / "mid")
    shutil.rmtree(tmp_path / "out")


def test_a_killed_import_leaves_nothing_that_looks_complete(big_model, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from kvcat_nemo.cli import main; main()"]
    process = subprocess.Popen([*command, "convert", "import", str(big_model), str(out)])
    try:
        deadline = time.monotonic() + 60
        while not any(p.stat().st_size > 50e6 for p in tmp_path.glob(".out.partial-*/weights/*.distcp")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].name.startswith(".out.partial-")
    with pytest.raises(ValueError, match="no Megatron distributed checkpoint"):
        find_weights(tmp_path)
    for folder in (left[0], left[0] / "weights"):
        with pytest.raises(ValueError, match="no Megatron distributed checkpoint"):
            find_weights(folder)
    shutil.rmtree(left[0])
