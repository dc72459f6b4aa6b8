"""Intervals for accuracies and for their paired differences: the only statistics that a verdict rests on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Outcomes: TypeAlias = Sequence[bool] | NDArray[np.bool_]

# 60 halvings of an interval of length 2 end below the spacing of doubles near 1e-2.
_HALVINGS = 60


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two accuracies on the same prompts, first minus second, with its score interval."""

    difference: float
    """Accuracy of the first minus accuracy of the second, in [-1, 1]."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    only_first: int
    """b: prompts that only the first solved."""
    only_second: int
    """c: prompts that only the second solved."""
    num_prompts: int
    """n: prompts that both answered."""
    confidence: float
    """Two-sided confidence of the interval, in (0, 1)."""

    @property
    def discordance(self) -> float:
        """Share of prompts on which the two differ, (b + c) / n."""
        return (self.only_first + self.only_second) / self.num_prompts


def wilson_interval(correct: int, n: int, confidence: float) -> tuple[float, float]:
    """Return the score interval of one proportion.

    Args:
        correct: Successes, in [0, n].
        n: Trials, >= 1.
        confidence: Two-sided confidence, in (0, 1).

    Raises:
        ValueError: An argument is out of range.

    Source: Wilson 1927; Newcombe 1998 (Statistics in Medicine 17, 857-872), method 3.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"wilson_interval needs 0 <= correct <= n and n >= 1, got correct={correct}, n={n}.")
    z = two_sided_quantile(confidence)
    share = correct / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half_width = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    low = 0.0 if correct == 0 else max(0.0, centre - half_width)
    high = 1.0 if correct == n else min(1.0, centre + half_width)
    return low, high


def paired_difference(a: Outcomes, b: Outcomes, *, confidence: float) -> PairedDifference:
    """Compare two models on the same prompts: accuracy of `a` minus accuracy of `b`, with Tango's interval.

    Args:
        a: (n,) bool, whether the first model solved each prompt.
        b: (n,) bool, the second model's outcomes in the same order.
        confidence: Two-sided confidence, in (0, 1).

    Raises:
        ValueError: The lengths differ or are zero, or an array is not one-dimensional and boolean.
    """
    first, second = _outcomes(a, "a"), _outcomes(b, "b")
    if len(first) != len(second):
        raise ValueError(f"Paired outcomes need equal lengths, got {len(first)} and {len(second)}.")
    only_first = int(np.count_nonzero(first & ~second))
    only_second = int(np.count_nonzero(second & ~first))
    n = len(first)
    low, high = tango_interval(only_first, only_second, n, confidence=confidence)
    return PairedDifference((only_first - only_second) / n, low, high, only_first, only_second, n, confidence)


def tango_interval(b: float, c: float, n: float, *, confidence: float) -> tuple[float, float]:
    """Return the score interval of a paired difference of proportions, (b - c) / n.

    The ends are the differences x whose score statistic is +-z,

        T(x) = (b - c - n x) / sqrt(n (2 q + x (1 - x))),  q = (sqrt(B^2 - 8 n C) - B) / (4 n),
        B = -b - c + (2 n - b + c) x,  C = -c x (1 - x),

    where q estimates the share of pairs in which only the second succeeded, given x. T falls with x, so bisection
    finds both. Without discordant pairs they are +-z^2 / (n + z^2), never a point.

    Args:
        b: Pairs in which only the first succeeded, >= 0; real-valued for planning.
        c: Pairs in which only the second succeeded, >= 0.
        n: All pairs, >= b + c and > 0.
        confidence: Two-sided confidence, in (0, 1).

    Raises:
        ValueError: An argument is out of range.

    Example:
        b = 1, c = 7, n = 21 at 0.95: (-0.517, -0.026), as in Fagerland, Lydersen and Laake 2014, table V.

    Source: Tango 1998 (Statistics in Medicine 17, 891-908), the efficient score and its restricted estimate.
    """
    if not (b >= 0 and c >= 0 and n > 0 and b + c <= n * (1 + 1e-12)):
        raise ValueError(f"tango_interval needs b, c >= 0 and b + c <= n > 0, got b={b}, c={c}, n={n}.")
    z = two_sided_quantile(confidence)
    difference = (b - c) / n

    def excess(candidate: float) -> float:
        return b - c - n * candidate

    low = _last_true(lambda x: excess(x) > z * _score_deviation(b, c, n, x), -1.0, difference)
    high = -_last_true(lambda x: -excess(-x) > z * _score_deviation(b, c, n, -x), -1.0, -difference)
    return low, high


def two_sided_quantile(confidence: float) -> float:
    """Return z such that a standard normal lies within +-z with probability `confidence`."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}.")
    return float(norm.ppf((1 + confidence) / 2))


def _score_deviation(b: float, c: float, n: float, candidate: float) -> float:
    """Return the standard deviation of b - c under a true difference `candidate`, the root of n (2 q + x (1 - x))."""
    linear = -b - c + (2 * n - b + c) * candidate
    constant = -c * candidate * (1 - candidate)
    root = math.sqrt(max(0.0, linear * linear - 8 * n * constant))
    only_second = (root - linear) / (4 * n)
    return math.sqrt(max(0.0, n * (2 * only_second + candidate * (1 - candidate))))


def _last_true(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return where `holds` turns false between `low` (true, or the limit itself) and `high` (false)."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _outcomes(values: Outcomes, name: str) -> NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype != np.bool_ or array.size == 0:
        raise ValueError(
            f"Outcomes `{name}` must be a one-dimensional, non-empty bool array, "
            f"got shape {array.shape} and dtype {array.dtype}."
        )
    return array
