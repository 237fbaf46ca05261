"""Confidence intervals of differences: paired over seeds, and by a bootstrap over utterances."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval; the interval of a single value is NaN."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Compute Student's interval of the mean of paired differences."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(array) - 1) * stats.sem(array))
    return Interval(mean, mean - half, mean + half)


def bootstrap(errors: npt.ArrayLike, baseline: npt.ArrayLike, words: npt.ArrayLike) -> Interval:
    """Compute the interval of a difference of word error rates by resampling the test utterances.

    The same utterances are drawn for all seeds, and for errors and baseline.

    Args:
        errors: word errors in each utterance, ``[seeds, utterances]``.
        baseline: word errors of the baseline, ``[seeds, utterances]``.
        words: words in each utterance, ``[utterances]``.

    Returns:
        The difference in percentage points, averaged over seeds, and its interval.
    """
    difference = (np.asarray(errors, np.float64) - np.asarray(baseline, np.float64)).mean(0)  # [utterances]
    spoken = np.asarray(words, np.float64)
    drawn = np.random.default_rng(0).integers(len(spoken), size=(RESAMPLES, len(spoken)))
    rates = 100 * difference[drawn].sum(1) / spoken[drawn].sum(1)
    low, high = np.quantile(rates, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return Interval(100 * float(difference.sum() / spoken.sum()), float(low), float(high))
