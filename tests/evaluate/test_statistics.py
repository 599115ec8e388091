"""Statistics against closed forms and plain counting."""

import itertools
import math

import numpy as np
import pytest

from kvcat_nemo.evaluate.statistics import jackknife, mean, paired, standard_error


def test_mean_and_standard_error():
    assert mean([1, 2, 6]) == 3 and mean([1, 3], weights=[3, 1]) == 1.5
    assert standard_error([1, 2, 6]) == pytest.approx(math.sqrt(14 / 2 / 3))
    assert standard_error([4]) is None
    with pytest.raises(ValueError, match="at least one"):
        mean([])
    with pytest.raises(ValueError, match="weights"):
        mean([1, 2], weights=[0, 0])


def test_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).normal(size=17)
    assert jackknife(lambda i: x[i].mean(), 17) == pytest.approx(standard_error(x), rel=1e-12)
    assert jackknife(lambda i: 0.0, 1) is None


def test_paired_p_is_a_count_of_sign_vectors():
    before, after = [1.0, 2.0, 3.0, 4.0, 5.0], [1.4, 2.1, 3.3, 3.8, 5.0]
    x = np.subtract(after, before)
    count = [abs(sum(s * v for s, v in zip(signs, x, strict=True))) >= abs(x.sum()) - 1e-12
             for signs in itertools.product((1, -1), repeat=5)]  # fmt: skip
    got = paired(before, after)
    assert got.p == sum(count) / 32 and got.n == 5
    assert got.difference == pytest.approx(x.mean()) and got.standard_error == standard_error(x)
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1


def test_paired_by_draws():
    generator = np.random.default_rng(1)
    before = generator.normal(size=200)
    nothing = paired(before, before + generator.normal(size=200))
    effect = paired(before, before + 0.5 + generator.normal(size=200))
    assert nothing.p > 0.05 and effect.p < 1e-3 and effect.p > 0
    # Close to the t-test where that holds: p of t = 2 at 199 degrees of freedom is 0.0469.
    x = generator.normal(size=200)
    x = (x - x.mean()) / x.std(ddof=1) + 2 / math.sqrt(200)
    assert paired(np.zeros(200), x).p == pytest.approx(0.0469, abs=0.006)
    with pytest.raises(ValueError, match="same items"):
        paired([1.0], [1.0, 2.0])
