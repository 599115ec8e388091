"""What decides ids and limits is asked in one place: no other file loads a tokenizer, adds special tokens or reads limits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOKENS = "kvcat_nemo/tokens/"
WORDS = {
    r"\bAutoTokenizer\b": {
        TOKENS: "the place",
        "kvcat_nemo/nemo/data_module.py": "NeMo's wrapper, for its end-of-document id; texts are tokenised by then",
        "kvcat_nemo/compress/compat.py": "puts ours in the place of the one that a press loads",
        "benchmarks/attention_matching_authors.py": "the authors' code, as it is",
    },
    r"\b(add_special_tokens|split_special_tokens)\s*=": {
        TOKENS: "the place",
        "kvcat_nemo/evaluate/harness.py": "the signature of lm-evaluation-harness, answered by ours",
        "benchmarks/attention_matching_authors.py": "the authors' code, as it is",
    },
    r"\bapply_chat_template\b": {TOKENS: "the place"},
    r"(?<!ggml)\.eos_token_id\b": {
        TOKENS: "the place",
        "benchmarks/study/model.py": "writes a model's configuration",
    },
    r"\.max_position_embeddings\b(?!\()": {  # limits.py reads it by a name of its own
        "conversion/arch.py": "hands on what the one reader of config.json read",
    },
}


@pytest.mark.parametrize("pattern", WORDS)
def test_the_question_is_asked_in_one_place(pattern):
    found = set()
    for folder in ("kvcat_nemo", "benchmarks", "conversion", "recipes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if re.search(pattern, path.read_text(encoding="utf-8")):
                found.add(TOKENS if name.startswith(TOKENS) else name)
    assert found == set(WORDS[pattern])
