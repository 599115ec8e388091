"""The router's state handed between segments of a window: who holds which tokens, and the state of everything earlier."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvcat_nemo.engine.segments import TokenSegments, pieces_of_ranks
from kvcat_nemo.kernels.attention.context_parallel import WindowSplit


@pytest.mark.parametrize(
    "tp,cp,tokens", [(1, 2, 6), (2, 2, 3), (2, 2, 4), (3, 2, 4), (4, 1, 2), (3, 1, 5), (2, 3, 2), (1, 4, 2)]
)
def test_every_token_is_held_once_and_where_megatron_puts_it(tp, cp, tokens):
    """Context-parallel chunks r and 2·cp − 1 − r, of which sequence parallelism gives each tensor-parallel rank a slice."""
    T = tokens * tp * cp
    ranks = pieces_of_ranks(tokens, tp, cp)
    held = [[place for start, end in rank for place in range(start, end)] for rank in ranks]
    assert sorted(sum(held, [])) == list(range(T))
    for c in range(cp):
        whole = list(range(T)) if cp == 1 else WindowSplit(None, cp, c).positions(T // cp).tolist()
        assert sum(held[c * tp : (c + 1) * tp], []) == whole
        assert {len(x) for x in held} == {tokens}


def test_first_tokens():
    pieces = (((0, 4), (12, 16)), ((4, 8), (8, 12)))
    segments = [TokenSegments(None, pieces, rank) for rank in range(2)]
    assert [s.lengths for s in segments] == [(4, 4), (4, 4)]
    assert [s.first(6, 1).lengths for s in segments] == [(4, 0), (2, 0)]
    assert [s.own_of_first(13) for s in segments] == [[0, 1, 2, 3, 4], list(range(8))]
    assert segments[0].places().tolist() == [0, 1, 2, 3, 12, 13, 14, 15]


@pytest.mark.multiprocess
def test_a_router_over_ranks_is_that_of_one_process(tmp_path):
    """Gates, probabilities, and gradients to hidden states and, summed over ranks, to every parameter; in float64."""
    program = str(Path(__file__).with_name("router_ranks.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ranks = [
        subprocess.Popen([sys.executable, program, str(tmp_path), str(rank), "4"], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(4)
    ]  # fmt: skip
    try:
        logs = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * 4, "\n---\n".join(logs)
    for rank in range(4):
        cases = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(cases) == 12
        for name, errors in cases.items():
            assert errors.pop("flipped gates") == 0, (rank, name)
            assert errors.pop("smallest scale") > 1e-6
            assert max(errors.values()) < 1e-11, (rank, name, errors)


def test_the_weights_of_documents():
    """A segment is handed what no later document's beginning has cut off."""
    #           a a a b | b b b b | c c c d | d d d d
    position = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4]])
    segments = TokenSegments(None, (((0, 4),), ((4, 8),), ((8, 12),), ((12, 16),)), 0, position)
    weights = segments._weights(torch.zeros(1, dtype=torch.float64))[0]
    expected = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]]
    # What reaches the third segment's beginning is masked there, for its first token begins a document.
    assert weights.tolist() == expected
