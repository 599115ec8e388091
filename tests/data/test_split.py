import random

import pytest

from kvcat_nemo.data.reading import Document
from kvcat_nemo.data.split import HELD_OUT, SKIP, TRAIN, plan_split


def documents(texts):
    return [Document(str(i), text) for i, text in enumerate(texts)]


def held_out_texts(texts, share=0.1, seed=1234):
    verdicts = plan_split(documents(texts), share, seed).verdicts
    return {text for text, verdict in zip(texts, verdicts, strict=True) if verdict == HELD_OUT}


TEXTS = [f"text {i}" for i in range(2000)]


def test_the_share_is_about_what_was_asked():
    # Binomial with p = 0.1 and n = 2000: five standard deviations are 67.
    assert abs(len(held_out_texts(TEXTS)) - 200) < 67


def test_a_text_keeps_its_split_when_others_come_or_the_order_changes():
    before = held_out_texts(TEXTS[:1000])
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    assert held_out_texts(shuffled) & set(TEXTS[:1000]) == before


def test_another_seed_holds_out_other_texts():
    assert held_out_texts(TEXTS, seed=1) != held_out_texts(TEXTS, seed=2)


def test_duplicates_and_empty_texts_are_skipped_and_counted():
    plan = plan_split(documents(["a", " \n", "b", "a", "", "c", "a"]), 0.0, 1)
    assert list(plan.verdicts) == [TRAIN, SKIP, TRAIN, SKIP, SKIP, TRAIN, SKIP]
    assert (plan.empty, plan.duplicates, plan.characters) == (2, 2, 3)


@pytest.mark.parametrize("share", [0.001, 0.999])
@pytest.mark.parametrize("count", [2, 3])
def test_a_small_corpus_leaves_no_split_empty(count, share):
    verdicts = plan_split(documents(TEXTS[:count]), share, 7).verdicts
    assert sorted(set(verdicts)) == [TRAIN, HELD_OUT]
    assert verdicts.count(HELD_OUT if share < 0.5 else TRAIN) == 1


def test_the_fingerprint_is_of_texts_in_order():
    def fingerprint(texts):
        return plan_split(documents(texts), 0.0, 1).fingerprint

    assert fingerprint(["a", "b"]) == fingerprint(["a", "b"])
    assert len({fingerprint(t) for t in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""])}) == 4


def test_impossible_splits_are_refused():
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="held_out is"):
            plan_split(documents(TEXTS), share, 1)
    with pytest.raises(ValueError, match="one document can't be split"):
        plan_split(documents(["a", "a", ""]), 0.1, 1)
    with pytest.raises(ValueError, match="no document with text"):
        plan_split(documents(["", " "]), 0.1, 1)
