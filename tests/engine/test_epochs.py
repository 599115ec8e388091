"""The order of windows: epoch by epoch, each token once in each, and the same however long the run is."""

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset

from kvcat_nemo.data.window_counts import windows_in
from kvcat_nemo.engine.epochs import EpochDataset, build_index
from tests.engine.corpus_files import S, build, tokens, write_corpus

CORPORA = {
    "documents of many lengths": [int(x) for x in np.random.RandomState(0).randint(1, 60, 37)],
    "shorter than a window": [3, 1, 4, 1, 5],
    "one document": [83],
    "an epoch is whole windows and one label": [S, S, S + 1],
    "an epoch is whole windows": [S, 2 * S],
    "one token": [1],
}


@pytest.fixture(params=CORPORA, ids=lambda name: name)
def corpus(request, tmp_path):
    lengths = CORPORA[request.param]
    return write_corpus(tmp_path / "a", lengths), sum(lengths)


@pytest.mark.parametrize("epochs", [1, 2, 3, 7])
def test_every_token_is_read_once_in_every_epoch(corpus, epochs):
    """The windows of so many epochs are the stream's: an epoch's tokens in some order, then the next epoch's."""
    prefix, N = corpus
    windows = windows_in(epochs, N, S)
    if not windows:
        assert epochs * N <= S  # inputs and the last label: no window is whole yet
        return
    read = tokens(build(EpochDataset, [prefix], windows), 0, windows)
    counts = np.bincount(read.ravel(), minlength=N)
    left = epochs * N - windows * S  # the last epoch's end: it begins the next epoch's first window
    assert 1 <= left <= S
    whole, rest = divmod(epochs * N - left, N)
    assert counts.min() >= whole and counts.max() <= epochs and counts.sum() == windows * S
    if whole == epochs - 1:  # less than an epoch is left out: of each token at most one reading
        assert (counts == epochs).sum() == rest and (counts == whole).sum() == N - rest
    # Window by window, too: those that end in epoch e hold the tokens of e and the rest of e − 1.
    for epoch in range(epochs):
        begin, end = windows_in(epoch, N, S), windows_in(epoch + 1, N, S)
        assert np.bincount(read[begin:end].ravel(), minlength=N).max(initial=0) <= 2


@pytest.mark.parametrize("more", [1, 2, 90])
def test_a_longer_run_begins_with_the_shorter_ones_windows(corpus, more):
    prefix, _ = corpus
    short = build(EpochDataset, [prefix], 20)
    longer = build(EpochDataset, [prefix], 20 + more)
    assert len(longer) >= 20 + more
    np.testing.assert_array_equal(tokens(short), tokens(longer, 0, len(short)))


def test_an_extension_reads_what_was_left(tmp_path):
    """Stopped within an epoch, extended over its end: every token once an epoch, which Megatron's own order does not do."""
    lengths = CORPORA["documents of many lengths"]
    prefix, N = write_corpus(tmp_path / "a", lengths), sum(lengths)
    epoch = windows_in(1, N, S)
    read = epoch * 2 // 3

    def counts(kind):
        before = tokens(build(kind, [prefix], epoch), 0, read)
        after = tokens(build(kind, [prefix], 3 * epoch), read, 2 * epoch)
        return np.bincount(np.concatenate([before, after]).ravel(), minlength=N)

    ours = counts(EpochDataset)
    assert ours.max() == 2 and ours.min() >= 1 and (ours < 2).sum() <= S
    megatron = counts(GPTDataset)  # the fault: another max_steps is another order
    assert megatron.max() > 2 and megatron.min() == 0


def test_one_epoch_is_megatrons_bit_for_bit(tmp_path):
    lengths = CORPORA["documents of many lengths"]
    prefix = write_corpus(tmp_path / "a", lengths)
    for split in (None, "70,30,0"):
        for windows in (1, 20, 30):
            for seed in (0, 7, 2**32 - 1):
                a, b = (
                    build(kind, [prefix], windows, seed=seed, split=split)
                    for kind in (GPTDataset, EpochDataset)
                )
                np.testing.assert_array_equal(tokens(a), tokens(b))


def test_epochs_and_seeds_are_orders_of_their_own():
    lengths, documents = np.full(50, 3 * S, np.int32), np.arange(50)
    index = build_index(lengths, documents, S, 3, seed=1)
    orders = index.document_index.reshape(3, 50)
    assert all(sorted(order) == list(documents) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    other = build_index(lengths, documents, S, 3, seed=2)
    assert (other.document_index != index.document_index).mean() > 0.9
    again = build_index(lengths, documents, S, 3, seed=1)
    np.testing.assert_array_equal(again.shuffle_index, index.shuffle_index)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, 99.0], [0.5, 0.25, 0.25]], ids=str)
def test_blends_keep_their_order_and_read_each_corpus_epoch_by_epoch(tmp_path, weights):
    corpora, first = [], 0
    for i in range(len(weights)):
        lengths = np.random.RandomState(i).randint(1, 60, 11)
        corpora.append((write_corpus(tmp_path / f"c{i}", lengths, first), first, int(lengths.sum())))
        first += int(lengths.sum())
    prefixes = [prefix for prefix, _, _ in corpora]
    short, longer = (build(EpochDataset, prefixes, n, weights=weights) for n in (30, 300))
    np.testing.assert_array_equal(tokens(short, 0, 30), tokens(longer, 0, 30))
    read = tokens(longer)
    for (_, begin, N), weight in zip(corpora, weights, strict=True):
        mine = read[(read[:, 0] >= begin) & (read[:, 0] < begin + N)]
        assert abs(len(mine) - weight / sum(weights) * len(read)) <= 2
        counts = np.bincount(mine.ravel() - begin, minlength=N)
        passes = len(mine) * S // N
        # Windows of an epoch are shuffled: within one, up to an epoch's windows may be read before a token comes again.
        assert counts.min() >= passes - 1 and counts.max() <= passes + 2


def test_an_index_is_kept_whole_and_for_its_files_alone(tmp_path, monkeypatch):
    import kvcat_nemo.engine.epochs as epochs

    made = []
    real = epochs.build_index
    monkeypatch.setattr(epochs, "build_index", lambda *x: made.append(1) or real(*x))
    prefix, cache = write_corpus(tmp_path / "a", [40, 50]), tmp_path / "cache"
    first = tokens(build(EpochDataset, [prefix], 9, cache=str(cache)))
    again = tokens(build(EpochDataset, [prefix], 9, cache=str(cache)))
    np.testing.assert_array_equal(first, again)
    assert len(made) == 1 and not list(cache.glob(".*"))
    write_corpus(tmp_path / "a", [50, 40], first=1000)  # built anew under the same name
    other = tokens(build(EpochDataset, [prefix], 9, cache=str(cache)))
    assert len(made) == 2 and other.min() >= 1000
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match=r"data\.index_mapping_dir.*give a folder"):
        build(EpochDataset, [prefix], 9, cache=str(blocked))


@pytest.mark.parametrize(
    ("lengths", "windows", "split", "message"),
    [
        ([5], 10**7, None, "would be read"),
        ([5] * 1000, 10**12, None, "would be read"),
        ([20, 20], 3, "0.1,99.9,0", "has no token"),
    ],
    ids=str,
)
@pytest.mark.timeout(60)
def test_what_megatron_would_build_for_ever_is_refused(tmp_path, lengths, windows, split, message):
    prefix = write_corpus(tmp_path / "a", lengths)
    with pytest.raises(ValueError, match=message):
        build(EpochDataset, [prefix], windows, split=split)
    assert not (tmp_path / "a").exists()  # the index beside it


def test_a_split_that_nothing_is_asked_of_may_be_empty(tmp_path):
    assert len(build(EpochDataset, [write_corpus(tmp_path / "a", [5, 5])], 0, split="0.1,99.9,0")) == 0
