"""Tokenizers of every kind that makes a difference to ids, as Hugging Face folders; and small models around them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    f"the cache of text number {i} grows with every token of it: {i * 37}, and so on." for i in range(40)
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]"
NAMED = {"default": CHATML, "rag": "{{ bos_token }}Text: {{ messages[0].content }}<|im_end|>\nAnswer:"}


@dataclass(frozen=True)
class Case:
    """A tokenizer, and what is known of it without any code of ours."""

    name: str
    first: tuple[str, ...] = ()
    """Tokens that stand before a document."""
    kind: str = "bytes"
    """bytes, prefix-bytes (a space before every text), metaspace or llama (sentencepiece's, the older way)."""
    adds: str = "$A"
    """What the post-processor makes of a text."""
    template: str | dict | None = None
    generation_eos: int | list[int] | None = None
    config_eos: int | list[int] | None = 1
    ends: tuple[int, ...] = field(default=(1,))
    """Every end token."""


CASES = [
    Case("plain", template=CHATML),
    Case("bos", ("<s>",), adds="<s> $A", template=INST),
    Case("bos-and-eos", ("<s>",), adds="<s> $A </s>", template=CHATML),
    Case("eos", adds="$A </s>"),
    Case("prefix-space", ("<s>",), kind="prefix-bytes", adds="<s> $A", template=INST),
    Case("metaspace", ("<s>",), kind="metaspace", adds="<s> $A", template=INST),
    Case("llama", ("<s>",), kind="llama", adds="<s> $A </s>", template=INST),
    Case("several-ends", ("<s>",), adds="<s> $A", generation_eos=[1, 3], config_eos=2, ends=(1, 2, 3)),
    Case("named-templates", ("<s>",), adds="<s> $A", template=NAMED),
]
BY_NAME = {case.name: case for case in CASES}


def backend(case: Case):
    """The `tokenizers.Tokenizer` of a case, trained on TEXTS."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if case.kind in ("bytes", "prefix-bytes"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=case.kind == "prefix-bytes")
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        alphabet = [chr(i) for i in range(33, 127)] + ["\n", "\r", "▁", "é"]
        if case.kind == "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
            tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        else:
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
            tokenizer.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
    special = [*SPECIAL, *(["<unk>"] if case.kind in ("metaspace", "llama") else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    if (
        case.kind == "llama"
    ):  # words are learnt apart, as sentencepiece does; the tokenizer itself parts nothing
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(TEXTS, trainer)
    if case.kind == "llama":
        tokenizer.pre_tokenizer = None
    if case.adds != "$A":
        pairs = [(token, number) for number, token in enumerate(SPECIAL)]
        tokenizer.post_processor = processors.TemplateProcessing(single=case.adds, special_tokens=pairs)
    return tokenizer


def save_tokenizer(case: Case, folder):
    """Write a case's tokenizer."""
    from transformers import PreTrainedTokenizerFast

    more = {"chat_template": case.template} if case.template else {}
    if case.kind == "prefix-bytes":
        more["add_prefix_space"] = True
    if case.kind in ("metaspace", "llama"):
        more["unk_token"] = "<unk>"
    PreTrainedTokenizerFast(
        tokenizer_object=backend(case),
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
        **more,
    ).save_pretrained(folder)
    return folder


def save_model(case: Case, folder, **sizes):
    """Write a small random model with a case's tokenizer and end tokens."""
    from tests.support.hf_models import small_model

    model = small_model(vocab_size=380, **sizes)
    model.config.eos_token_id, model.config.bos_token_id = case.config_eos, 0
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    generation = folder / "generation_config.json"
    generation.unlink(missing_ok=True)
    if case.generation_eos is not None:
        generation.write_text(json.dumps({"eos_token_id": case.generation_eos}))
    return save_tokenizer(case, folder)


def expected(case: Case, folder, text: str, place: str = "document") -> list[int]:
    """A text's ids by the tokenizers library alone.

    Args:
        place: "document", with what stands before one; or "alone".
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [tokenizer.token_to_id(token) for token in case.first] * (place == "document") + ids
