import math

import numpy as np
import pytest
from scipy import stats

from fedomc_speech.experiments.statistics import bootstrap, interval


def test_the_interval_is_that_of_scipy() -> None:
    values = [0.3, -0.2, 1.1, 0.4]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(np.mean(values))


def test_one_value_has_no_interval() -> None:
    found = interval([2.0])
    assert found.mean == 2.0 and math.isnan(found.low) and math.isnan(found.high)


def test_the_bootstrap_is_that_of_scipy() -> None:
    random = np.random.default_rng(1)
    words = random.integers(2, 7, size=200)
    errors, baseline = random.binomial(words, 0.1, size=(3, 200)), random.binomial(words, 0.05, size=(3, 200))

    def difference(chosen: np.ndarray) -> float:
        return float(100 * (errors[:, chosen] - baseline[:, chosen]).mean(0).sum() / words[chosen].sum())

    expected = stats.bootstrap(
        (np.arange(200),), difference, vectorized=False, n_resamples=4000, method="percentile", rng=2
    ).confidence_interval
    found = bootstrap(errors, baseline, words)
    assert found.mean == pytest.approx(difference(np.arange(200)))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.15)


def test_what_is_the_same_for_each_utterance_differs_by_nothing() -> None:
    found = bootstrap([[1, 0, 2]], [[1, 0, 2]], [3, 3, 3])
    assert (found.mean, found.low, found.high) == (0, 0, 0)
