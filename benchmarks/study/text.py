"""Stage 1: texts, a small BPE vocabulary made from their training part, and the indexed dataset."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

from kvcat_nemo.common.files import new_file
from kvcat_nemo.common.folders import new_folder
from kvcat_nemo.data.assets import registry_assets
from kvcat_nemo.data.indexed import build_dataset
from kvcat_nemo.data.reading import ReadOptions, find_files, read_documents
from kvcat_nemo.data.split import position
from kvcat_nemo.runs.checkpoint_manifest import hash_and_write_manifest, listed_names

EOS = "<|endoftext|>"
SPLIT_SEED = 1234


def gather(names: tuple[str, ...], folder: Path) -> list[Path]:
    """Every corpus as a file of JSON lines; `python-topics` is text that comes with Python itself."""
    paths = []
    for name in names:
        path = folder / f"{name}.jsonl"
        if name != "python-topics":
            registry_assets("corpora").fetch_corpus(name, path)
        elif not path.exists():
            with new_file(path) as temporary:
                lines = [
                    json.dumps({"id": topic, "text": text})
                    for topic, text in sorted(pydoc_data.topics.topics.items())
                ]
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def training_texts(paths: list[Path], held_out: float) -> Iterator[str]:
    """Texts of the documents that `build_dataset` will train on."""
    for document in read_documents(find_files(paths), ReadOptions("text")):
        if position(document.text, SPLIT_SEED) >= held_out:
            yield document.text


def make_tokenizer(paths: list[Path], out: Path, vocabulary: int, held_out: float, window: int) -> Path:
    """A byte-level BPE fast tokenizer as a Hugging Face folder; held-out documents have no say in it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(paths, held_out), trainer)
    with new_folder(out, listed_names) as folder:
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=EOS,
            model_max_length=window,
            clean_up_tokenization_spaces=False,
        )
        fast.save_pretrained(folder)
        hash_and_write_manifest(folder, kind="tokenizer")
    return out


def make_dataset(paths: list[Path], tokenizer: Path, out: Path, held_out: float) -> None:
    """The indexed dataset, train and held-out."""
    build_dataset(paths, tokenizer, out, held_out=held_out, seed=SPLIT_SEED, progress=False)
