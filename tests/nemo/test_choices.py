"""Settings with a few words to choose from: the words stand in one type each, and every one of them is taken."""

from typing import get_args, get_type_hints

import pytest

pytestmark = pytest.mark.nemo


def places():
    """field → class, argument, how to make it with a value."""
    from megatron.core.optimizer import OptimizerConfig

    from kvcat_nemo.nemo.checkpoint import KVCatCheckpoint
    from kvcat_nemo.nemo.optimizer import KVCatOptimizerModule
    from kvcat_nemo.nemo.resume import KVCatResume
    from kvcat_nemo.nemo.synthetic import SyntheticDataModule

    def resume(**field):
        KVCatResume(resume_from_path="/nowhere", **field).setup(None)

    return {
        "log.ckpt.on_failed_save": (KVCatCheckpoint.__init__, KVCatCheckpoint),
        "optim.nonfinite": (
            KVCatOptimizerModule.__init__,
            lambda **field: KVCatOptimizerModule(OptimizerConfig(lr=1e-3), **field),
        ),
        "data.on_change": (SyntheticDataModule.__init__, SyntheticDataModule),
        "resume.mode": (KVCatResume, resume),
        "resume.verify": (KVCatResume, resume),
    }


@pytest.mark.parametrize(
    "field", ["log.ckpt.on_failed_save", "optim.nonfinite", "data.on_change", "resume.mode", "resume.verify"]
)
def test_the_type_is_what_is_checked(field):
    owner, make = places()[field]
    name = field.rpartition(".")[2]
    words = get_args(get_type_hints(owner)[name])
    assert len(words) >= 2
    listed = ", ".join(words[:-1]) + f" or {words[-1]}"
    for wrong in ("of_yore", words[0].upper(), "", None):
        with pytest.raises(ValueError) as error:
            make(**{name: wrong})
        assert str(error.value) == f"{field}={wrong!r}: choose {listed}"
    for word in words:
        if field.startswith("resume"):
            with pytest.raises(ValueError, match="resume_from_path='/nowhere'"):  # past the check of words
                make(**{name: word})
        else:
            make(**{name: word})
