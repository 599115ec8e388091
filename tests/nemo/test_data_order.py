"""The data modules keep their order of windows over changes of the trainer, the batch and the files, or refuse them."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from tests.engine.corpus_files import Tokenizer, write_corpus

pytestmark = pytest.mark.nemo


S, LENGTHS = 16, [int(x) for x in np.random.RandomState(0).randint(1, 60, 40)]
EPOCH = (sum(LENGTHS) - 1) // S


def trainer(max_steps, **changes):
    settings = {
        "limit_val_batches": 2,
        "limit_test_batches": 0,
        "val_check_interval": 10,
        "global_step": 0,
        "strategy": None,
    }
    return SimpleNamespace(max_steps=max_steps, ckpt_path="RUN/checkpoints/step=3", **settings | changes)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A data module on a corpus whose tokens are all different, set up for a trainer; and what it would log."""
    from megatron.core import num_microbatches_calculator as calculator

    from kvcat_nemo.nemo.data_module import KVCatDataModule

    monkeypatch.setattr(calculator, "update_num_microbatches", lambda **_: None)
    write_corpus(tmp_path / "train", LENGTHS)
    write_corpus(tmp_path / "heldout", [200, 100], first=10**5)

    def make(steps, state=None, trainer_settings=None, **settings):
        given = {
            "paths": tmp_path,
            "seq_length": S,
            "global_batch_size": 4,
            "num_workers": 0,
            "tokenizer": Tokenizer(),
        }
        data = KVCatDataModule(**given | settings)
        data.trainer = data.data_sampler.trainer = trainer(steps, **trainer_settings or {})
        data.setup()
        if state is not None:
            data.load_state_dict(state)
        return data

    return make


def state(data, consumed):
    return data.state_dict() | {"consumed_samples": consumed}


def read(data, start, stop):
    """Tokens of the training windows start … stop − 1."""
    dataset = data.train_dataloader().dataset
    assert len(dataset) >= stop, "the loader would end, and begin anew"
    return np.stack([dataset[i]["tokens"].numpy() for i in range(start, stop)])


def test_an_extended_run_reads_every_token_once_an_epoch(module):
    steps = EPOCH // 4
    first = module(steps)
    seen = read(first, 0, 4 * steps)
    longer = module(4 * steps, state(first, 4 * steps), {"global_step": steps})
    seen = np.concatenate([seen, read(longer, 4 * steps, 16 * steps)])
    counts = np.bincount(seen.ravel(), minlength=sum(LENGTHS))
    np.testing.assert_array_equal(read(module(4 * steps), 0, 16 * steps), seen)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("batch", [1, 2, 12])
def test_another_batch_goes_on_with_the_next_window(module, batch, caplog):
    """And the set reaches as far as the steps to come, which max_steps × the new batch would not."""
    first, consumed = module(30), 20 * 4
    later = module(30, state(first, consumed), {"global_step": 20}, global_batch_size=batch)
    end = consumed + 10 * batch
    np.testing.assert_array_equal(read(later, consumed, end), read(module(100), consumed, end))


def test_validation_windows_stay(module):
    windows = [
        np.stack([x["tokens"].numpy() for x in (data._validation_ds[i] for i in range(4))])
        for data in (
            module(3),
            module(300),
            module(3, trainer_settings={"limit_val_batches": 5}),
            module(3, global_batch_size=8),
        )
    ]
    assert all((w == windows[0]).all() for w in windows[1:])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 5}, "data.seed=5, which was 1234"),
        ({"seq_length": 8}, "data.seq_length=8, which was 16"),
        ({"split": "50,50,0"}, "data.split (the train part)='50,50,0', which was '60,40,0'"),
        ({"corpus": "other"}, "data.paths (the train part)"),
        ({"weights": ["1", "3"]}, "data.paths (weights of the train part)"),
    ],
    ids=str,
)
def test_another_order_is_refused_and_may_be_chosen(module, tmp_path, changes, name, monkeypatch):
    a, b, c = (write_corpus(tmp_path / n, LENGTHS[i : i + 12], first=1000 * i) for i, n in enumerate("abc"))
    changes = dict(changes)
    other, weights = changes.pop("corpus", None), changes.pop("weights", ["1", "2"])
    one = {"paths": ["1", a, "2", b], "split": "60,40,0"}
    two = one | {"paths": [weights[0], a, weights[1], c if other else b]} | changes
    before = state(module(5, **one), 12)
    module(5, before, **one)
    with pytest.raises(ValueError) as error:
        module(5, before, **two)
    assert name in str(error.value) and "RUN/checkpoints/step=3" in str(error.value)
    said = []
    monkeypatch.setattr("kvcat_nemo.nemo.data_order.logging.warning", said.append)
    data = module(5, before, **two, on_change="say")
    assert any(name in text for text in said)
    assert data.state_dict()["order"] == data.order_record() != before["order"]


def test_it_is_refused_before_anything_is_started_where_the_run_has_its_record(module, tmp_path):
    record, checkpoint = (
        tmp_path / "run" / "kvcat" / "data_order.json",
        tmp_path / "run" / "checkpoints" / "step=3",
    )
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps(module(5).order_record()))
    module(9).check_run(trainer(9), [checkpoint])
    with pytest.raises(ValueError, match="data.seed=5, which was 1234"):
        module(9, seed=5).check_run(trainer(9), [checkpoint])
    record.write_text("{")
    module(9, seed=5).check_run(
        trainer(9), [checkpoint]
    )  # the checkpoint's own record is asked when it is loaded


def test_an_old_run_goes_on_as_it_would_have_and_says_what_is_not_known(module, monkeypatch, tmp_path):
    from megatron.core.datasets.gpt_dataset import GPTDataset

    from tests.engine.corpus_files import build, tokens

    said = []
    monkeypatch.setattr("kvcat_nemo.nemo.data_order.logging.warning", said.append)
    steps = 3 * EPOCH // 4
    old = module(steps, {"consumed_samples": 8}, {"global_step": 2})
    assert any("Megatron's own order" in text and "trainer.max_steps" in text for text in said)
    theirs = build(GPTDataset, [str(tmp_path / "train")], steps * 4, seed=1234)
    np.testing.assert_array_equal(read(old, 0, steps * 4), tokens(theirs, 0, steps * 4))
    again = module(steps, state(old, 12), {"global_step": 3})  # its record is kept from here on
    np.testing.assert_array_equal(read(again, 0, steps * 4), tokens(theirs, 0, steps * 4))
    with pytest.raises(ValueError, match=r"trainer\.max_steps"):
        module(2 * steps, state(old, 12), {"global_step": 3})


def test_corpora_without_weights_are_read_in_the_ratio_of_their_tokens_for_ever(module, tmp_path):
    corpora = [
        write_corpus(tmp_path / n, LENGTHS[: 5 * (i + 1)], first=2000 * i) for i, n in enumerate("abc")
    ]
    paths = {"train": corpora, "validation": [corpora[0]]}
    short, longer = (module(n, paths=paths) for n in (10, 100))
    np.testing.assert_array_equal(read(short, 0, 40), read(longer, 0, 40))
    seen = read(longer, 0, 400)[:, 0] // 2000
    shares = np.array([sum(LENGTHS[: 5 * (i + 1)]) for i in range(3)])
    np.testing.assert_allclose(np.bincount(seen) / 400, shares / shares.sum(), atol=0.01)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "100,0,0"}, None),
        ({"split": "0,100,0"}, "no document is left for training"),
        ({"split": "99.9,0.1,0"}, "validation split of .* has no token"),
        ({"split": "a"}, "data.split='a'"),
        ({"seq_length": "1e9"}, "data.seq_length='1e9'"),
        ({"micro_batch_size": 0}, "data.micro_batch_size=0"),
        ({"global_batch_size": 10**30}, "data.global_batch_size=10+: at most"),
        ({"num_workers": "10000"}, "data.num_workers='10000': at most"),
        ({"seed": -1}, "data.seed=-1"),
        ({"on_change": "no"}, "data.on_change='no'"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(module, tmp_path, settings, message):
    paths = {"paths": str(tmp_path / "train")}
    if message is None:
        return module(3, **paths, **settings)
    with pytest.raises(ValueError, match=message):
        module(3, **paths, **settings)


def test_numbers_as_text_are_numbers(module):
    data = module(3, seq_length="16", global_batch_size="4", seed="7")
    assert (data.seq_length, data.data_sampler.global_batch_size, data.seed) == (16, 4, 7)


def test_weights_are_positive(tmp_path):
    from kvcat_nemo.nemo.data_module import dataset_paths

    prefix = write_corpus(tmp_path / "a", [5])
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match=f"weight {weight}: give a positive number"):
            dataset_paths([weight, prefix])


def test_synthetic_windows_go_on_too(monkeypatch):
    from kvcat_nemo.nemo.data_module import SyntheticDataModule

    def make(steps, step=0, state=None, **settings):
        data = SyntheticDataModule(**settings)
        data.trainer = data.data_sampler.trainer = trainer(steps, global_step=step)
        data.setup()
        if state:
            data.load_state_dict(state)
        return data

    before = make(10).state_dict() | {"consumed_samples": 24}
    later = make(10, 6, before, global_batch_size=2)
    assert len(later.train_dataloader().dataset) == 24 + 4 * 2
    make(10, 6, {"consumed_samples": 24})  # an old run: the same windows
    for changes in ({"seed": 5}, {"seq_length": 32}, {"vocab_size": 64}):
        with pytest.raises(ValueError, match=f"data.{next(iter(changes))}="):
            make(10, 6, before, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate_grad_batches": 4}, "accumulate_grad_batches=4: Megatron accumulates gradients itself"),
        ({"accumulate_grad_batches": "4"}, "accumulate_grad_batches='4'"),
        ({"max_steps": -1}, "trainer.max_steps=-1: give at least 1"),
        ({"max_steps": 10**30}, "trainer.max_steps=10+: at most"),
        ({"limit_train_batches": 1}, "limit_train_batches=1: after so many batches"),
        ({"limit_train_batches": 0.5}, "limit_train_batches=0.5"),
        ({"overfit_batches": 2}, "overfit_batches=2"),
        ({"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs=1"),
        ({"limit_val_batches": 10**12}, "limit_val_batches=10+: at most"),
        ({"limit_val_batches": "4"}, "limit_val_batches='4': give a whole number"),
        ({"val_check_interval": 0}, "val_check_interval=0"),
        ({"devices": 10**9}, "trainer.devices=10+: at most"),
        ({"num_nodes": 0}, "trainer.num_nodes=0: give at least 1"),
        ({"strategy.tensor_model_parallel_size": 0}, "tensor_model_parallel_size=0: give at least 1"),
        ({"strategy.pipeline_model_parallel_size": 10**30}, "pipeline_model_parallel_size=10+: at most"),
        ({"model.num_layers": 10**30}, "model.config.num_layers=10+: at most 10,000"),
        ({"model.vocab_size": 10**12}, "model.config.vocab_size=10+: at most"),
        ({"model.kvcat.num_groups": 10**30}, "num_groups=10+: at most"),
        ({"data.global_batch_size": 10**30}, "data.global_batch_size=10+: at most"),
        ({"data.seq_length": 0}, "data.seq_length=0: give at least 1"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.timeout(60)
def test_plan_refuses_what_would_never_end(changes, message):
    from kvcat_nemo.nemo.plan import plan
    from kvcat_nemo.recipes import RECIPES

    recipe = RECIPES["kvcat_tiny"]()
    for name, value in changes.items():
        place = {"model": recipe.model.config, "data": recipe.data}.get(
            name.partition(".")[0], recipe.trainer
        )
        *path, last = [part for part in name.split(".") if part not in ("model", "data")]
        for part in path:
            place = getattr(place, part)
        setattr(place, last, value)
    with pytest.raises(ValueError, match=message):
        plan(recipe)


def test_all_recipes_pass_the_same_checks():
    from kvcat_nemo.nemo.plan import check_trainer
    from kvcat_nemo.recipes import RECIPES

    for make in RECIPES.values():
        check_trainer(make().trainer)


def test_a_trainer_that_is_built_passes_and_fails_alike():
    from nemo import lightning as nl

    from kvcat_nemo.nemo.plan import check_trainer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    check_trainer(nl.Trainer(max_steps=3, accelerator="cpu", logger=False))
    with pytest.raises(ValueError, match="accumulate_grad_batches=4"):
        check_trainer(nl.Trainer(max_steps=3, accumulate_grad_batches=4, accelerator="cpu", logger=False))
