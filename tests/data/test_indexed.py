import json
import shutil

import numpy as np
import pytest

from kvcat_nemo.data import indexed
from kvcat_nemo.data.indexed import build_dataset, dataset_fingerprint, read_manifest
from kvcat_nemo.data.inspect import inspect_dataset

from .conftest import TEXTS, write_jsonl


def build(source, tokenizer_dir, out, **options):
    said = []
    manifest = build_dataset([source], tokenizer_dir, out, progress=False, say=said.append, **options)
    return manifest, said


def read_back(prefix):
    """Documents through Megatron-core's reader, as lists of token ids."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    bounds = dataset.document_indices
    return [
        np.concatenate([dataset[i] for i in range(start, end)]).tolist()
        for start, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def test_documents_come_back_with_eod_and_no_document_is_in_both_splits(corpus, tokenizer_dir, tmp_path):
    from transformers import AutoTokenizer

    manifest, _ = build(corpus, tokenizer_dir, tmp_path / "out", held_out=0.3)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    splits = {}
    for name, counts in manifest.splits.items():
        documents = read_back(tmp_path / "out" / name)
        assert all(document[-1] == 0 and 0 not in document[:-1] for document in documents)
        splits[name] = [tokenizer.decode(document[:-1]) for document in documents]
        lengths = [len(document) for document in documents]
        assert (counts.documents, counts.tokens) == (len(documents), sum(lengths))
        assert (counts.shortest, counts.longest) == (min(lengths), max(lengths))
        lines = (tmp_path / "out" / f"{name}.documents.jsonl").read_text().splitlines()
        ids = [json.loads(line) for line in lines]
        assert [TEXTS[int(r["id"].removeprefix("doc-"))] for r in ids] == splits[name]
        assert [record["tokens"] for record in ids] == lengths
    assert splits["train"] and splits["heldout"]
    assert sorted(splits["train"] + splits["heldout"]) == sorted(TEXTS)


def test_megatrons_own_gpt_dataset_reads_it(corpus, tokenizer_dir, tmp_path):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    build(corpus, tokenizer_dir, tmp_path / "out", held_out=0)
    documents = read_back(tmp_path / "out" / "train")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        split="1,0,0",
        tokenizer=type("Tokenizer", (), {"eod": 0, "pad": 1, "unique_identifiers": {"class": "test"}})(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        path_to_cache=str(tmp_path / "cache"),
    )
    low = GPTDataset.build_low_level_dataset(str(tmp_path / "out" / "train"), config)
    dataset = GPTDataset(
        low,
        str(tmp_path / "out" / "train"),
        np.arange(len(documents), dtype=np.int32),
        None,
        Split.train,
        config,
    )
    samples = [dataset[i] for i in range(len(dataset))]
    assert all(torch_equal(a["tokens"][1:], a["labels"][:-1]) for a in samples)
    # One epoch deals out every document's tokens; what follows an EOD begins some document.
    starts = {tuple(document[:4]) for document in documents}
    stream = [
        t
        for _, sample in sorted(zip(dataset.shuffle_index, samples, strict=True))
        for t in sample["tokens"].tolist()
    ]
    after_eod = [tuple(stream[i + 1 : i + 5]) for i, token in enumerate(stream[:-5]) if token == 0]
    assert len(after_eod) >= len(documents) - 2
    assert set(after_eod) <= starts


def torch_equal(a, b):
    import torch

    return torch.equal(a, b)


def test_a_special_token_in_the_text_is_text(tokenizer_dir, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "before <end> after <other>"}])
    build(source, tokenizer_dir, tmp_path / "out", held_out=0)
    (document,) = read_back(tmp_path / "out" / "train")
    assert document.count(0) == 1 and document[-1] == 0 and 1 not in document


def test_eod_token_can_be_chosen(corpus, tokenizer_dir, tmp_path):
    manifest, _ = build(corpus, tokenizer_dir, tmp_path / "out", held_out=0, eod_token="<other>")
    assert manifest.tokenizer["eod_id"] == 1
    assert {document[-1] for document in read_back(tmp_path / "out" / "train")} == {1}
    with pytest.raises(ValueError, match="'<none>' is not in the vocabulary"):
        build(corpus, tokenizer_dir, tmp_path / "other", eod_token="<none>")


def test_same_inputs_are_reused_and_other_inputs_need_force(corpus, tokenizer_dir, tmp_path):
    out = tmp_path / "out"
    first, _ = build(corpus, tokenizer_dir, out)
    stamp = (out / "train.bin").stat().st_mtime_ns
    again, said = build(corpus, tokenizer_dir, out)
    assert again.reused and not first.reused and "re-used" in said[0]
    assert (out / "train.bin").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="built from other inputs: seed .--force"):
        build(corpus, tokenizer_dir, out, seed=5)
    before = dataset_fingerprint(out)
    changed, _ = build(corpus, tokenizer_dir, out, seed=5, force=True)
    assert not changed.reused and read_manifest(out).seed == 5
    assert dataset_fingerprint(out) != before
    build(corpus, tokenizer_dir, tmp_path / "twin", seed=5)
    assert dataset_fingerprint(tmp_path / "twin") == dataset_fingerprint(out)


def test_a_damaged_dataset_is_noticed_and_rebuilt_only_with_force(corpus, tokenizer_dir, tmp_path):
    out = tmp_path / "out"
    build(corpus, tokenizer_dir, out)
    whole = dataset_fingerprint(out)
    with open(out / "train.bin", "r+b") as file:
        file.truncate(10)
    with pytest.raises(ValueError, match="train.bin is 10 bytes long"):
        dataset_fingerprint(out)
    with pytest.raises(ValueError, match="--force replaces it"):
        build(corpus, tokenizer_dir, out)
    build(corpus, tokenizer_dir, out, force=True)
    assert dataset_fingerprint(out) == whole


def test_force_never_deletes_a_folder_with_other_files(corpus, tokenizer_dir, tmp_path):
    with pytest.raises(ValueError, match="holds .*corpus.jsonl, which is read"):
        build(corpus, tokenizer_dir, tmp_path, force=True)
    assert corpus.exists()


@pytest.mark.parametrize("kind", ["GPTDataset", "EpochDataset"])
def test_kept_orders_of_windows_stay_on_reuse_and_go_when_the_data_changes(
    corpus, tokenizer_dir, tmp_path, kind
):
    from megatron.core.datasets import gpt_dataset

    from kvcat_nemo.engine import epochs

    out = tmp_path / "out"
    build(corpus, tokenizer_dir, out)
    build_windows(
        {"GPTDataset": gpt_dataset.GPTDataset, "EpochDataset": epochs.EpochDataset}[kind], out / "train"
    )
    cache = out / "train" / "cache"
    assert list(cache.rglob("*.npy"))
    again, _ = build(corpus, tokenizer_dir, out, force=True)
    assert again.reused and cache.exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="kvcat did not write .*notes.txt"):
        build(corpus, tokenizer_dir, out, seed=5, force=True)
    assert (out / "notes.txt").exists() and cache.exists()
    (out / "notes.txt").unlink()
    build(corpus, tokenizer_dir, out, seed=5, force=True)
    assert not cache.exists()


def build_windows(kind, prefix):
    """As training makes them, with the order kept beside the data."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    class Tokenizer:
        unique_identifiers = {"name": "x"}
        eod = 0

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=8, tokenizer=Tokenizer(), blend_per_split=[([str(prefix)], None), None, None],
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(kind, [3, 0, 0], lambda: True, config).build()[0]


def test_an_interrupted_build_leaves_nothing(corpus, tokenizer_dir, tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(indexed._SplitWriter, "finish", interrupted)
        build(corpus, tokenizer_dir, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.jsonl"]
    with pytest.raises(ValueError, match="no manifest.json"):
        dataset_fingerprint(tmp_path / "out")


def test_left_out_documents_are_counted(tokenizer_dir, tmp_path):
    source = tmp_path / "a.jsonl"
    write_jsonl(source, [{"text": t} for t in ("a", "b", "", "a", "c")])
    source.write_text(source.read_text() + "broken\n")
    manifest, said = build(source, tokenizer_dir, tmp_path / "out", held_out=0, skip_bad=True)
    assert [manifest.source[k] for k in ("documents", "empty", "duplicates", "bad")] == [5, 1, 1, 1]
    assert manifest.splits["train"].documents == 3 and set(manifest.splits) == {"train"}
    assert "1 empty, 1 duplicate, 1 broken" in said[-1]


def test_a_large_vocabulary_is_stored_in_four_bytes(corpus, tokenizer_dir, tmp_path):
    large = shutil.copytree(tokenizer_dir, tmp_path / "large")
    (large / "config.json").write_text('{"vocab_size": 151936}')
    two, _ = build(corpus, tokenizer_dir, tmp_path / "two", held_out=0)
    four, _ = build(corpus, large, tmp_path / "four", held_out=0)
    assert (two.dtype, four.dtype) == ("uint16", "int32")
    assert read_back(tmp_path / "two" / "train") == read_back(tmp_path / "four" / "train")


def test_a_tokenizer_that_does_not_fit_is_refused(corpus, tokenizer_dir, tmp_path):
    small = shutil.copytree(tokenizer_dir, tmp_path / "small")
    (small / "config.json").write_text('{"vocab_size": 256}')
    with pytest.raises(ValueError, match="ids up to 299, the model's vocabulary .config.json. is 256"):
        build(corpus, small, tmp_path / "out")
    with pytest.raises(ValueError, match="no tokenizer there"):
        build(corpus, tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="workers is 0"):
        build(corpus, tokenizer_dir, tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_inspection_finds_a_missing_eod(corpus, tokenizer_dir, tmp_path):
    out = tmp_path / "out"
    manifest, _ = build(corpus, tokenizer_dir, out, held_out=0)
    report = inspect_dataset(out / "train")
    assert (report.documents, report.ended, report.eod_inside) == (30, 30, 0)
    assert report.tokens == manifest.splits["train"].tokens
    assert TEXTS[0].startswith(report.beginning[:20])
    ids = np.memmap(out / "train.bin", dtype=np.uint16, mode="r+")
    ids[-1] = 5
    ids[0] = 0
    ids.flush()
    report = inspect_dataset(out / "train")
    assert (report.ended, report.eod_inside) == (29, 1)


def test_inspection_refuses_damaged_files(corpus, tokenizer_dir, tmp_path):
    build(corpus, tokenizer_dir, tmp_path / "out", held_out=0)
    with pytest.raises(ValueError, match="not both there"):
        inspect_dataset(tmp_path / "out" / "heldout")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "out" / "train.bin", tmp_path / "alone" / "x.bin")
    (tmp_path / "alone" / "x.idx").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="x.idx is damaged"):
        inspect_dataset(tmp_path / "alone" / "x", tokenizer_dir)
