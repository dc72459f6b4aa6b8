"""Two further looks at a paired difference: McNemar's test and a bootstrap, beside the interval of the verdict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from subnet_ft.evidence.statistics import Outcomes, PairedDifference, paired_difference


@dataclass(frozen=True)
class PairedTests:
    """Evidence on the accuracy of one model minus that of another; no verdict rests on it."""

    mcnemar_p: float
    """Two-sided mid-p value of McNemar's test that both are equally often right."""
    bootstrap_low: float
    """Lower end of the percentile interval of a bootstrap over prompts."""
    bootstrap_high: float
    """Upper end."""
    confidence: float
    """Two-sided confidence of that interval."""


def paired_tests(a: Outcomes, b: Outcomes, *, confidence: float, seed: int = 0, resamples: int = 10_000) -> PairedTests:
    """Test and bootstrap the accuracy of `a` minus that of `b` on the same prompts.

    Args:
        a: (n,) bool, whether the first model solved each prompt.
        b: (n,) bool, the second model's outcomes in the same order.
        confidence: Two-sided confidence, in (0, 1).
        seed: Of the bootstrap.
        resamples: Number of resamples.

    Raises:
        ValueError: The lengths differ or are zero, or an array is not one-dimensional and boolean.
    """
    return counted_tests(paired_difference(a, b, confidence=confidence), seed=seed, resamples=resamples)


def counted_tests(paired: PairedDifference, *, seed: int = 0, resamples: int = 10_000) -> PairedTests:
    """Do the same for a difference that was counted already."""
    b, c, confidence = paired.only_first, paired.only_second, paired.confidence
    low, high = bootstrap_interval(b, c, paired.num_prompts, confidence=confidence, seed=seed, resamples=resamples)
    return PairedTests(mcnemar_mid_p(b, c), low, high, confidence)


def mcnemar_mid_p(b: int, c: int) -> float:
    """Return the two-sided mid-p value of McNemar's test: b and c are equally likely among discordant pairs.

    Args:
        b: Pairs in which only the first succeeded.
        c: Pairs in which only the second succeeded.

    Source: Fagerland, Lydersen and Laake 2013 (BMC Medical Research Methodology 13, 91), who find that mid-p keeps the
    level without the exact test's caution.
    """
    smaller, n = min(b, c), b + c
    if n == 0:
        return 1.0
    # With b = c the point probability lies on both sides, and the sum is 1 by symmetry.
    return 1.0 if b == c else float(2 * binom.cdf(smaller, n, 0.5) - binom.pmf(smaller, n, 0.5))


def bootstrap_interval(
    b: int, c: int, n: int, *, confidence: float, seed: int, resamples: int = 10_000
) -> tuple[float, float]:
    """Return the percentile interval of (b - c) / n under resampling of the n pairs.

    A resample's b and c are multinomial in the observed shares, so no pair need be drawn.

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, [b / n, c / n, (n - b - c) / n], size=resamples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
