"""McNemar and bootstrap against scipy, and the coverage of every interval that a report shows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from scipy.stats import binom, binomtest, bootstrap, norm

from subnet_ft.evidence.paired_tests import bootstrap_interval, mcnemar_mid_p, paired_tests
from subnet_ft.evidence.statistics import paired_difference, tango_interval

Interval = Callable[[int, int, int], tuple[float, float]]
SIMULATIONS = 20_000


def outcomes(b: int, c: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n pairs, b of them right in the first only, c in the second only."""
    first = np.arange(n) < b
    second = (np.arange(n) >= b) & (np.arange(n) < b + c)
    return first, second


@pytest.mark.parametrize(("b", "c"), [(7, 1), (30, 45), (0, 5), (5, 0), (1, 0)])
def test_mcnemar_is_scipys_exact_test_less_half_the_observed_outcome(b: int, c: int) -> None:
    exact = binomtest(b, b + c, 0.5).pvalue
    point = binomtest(b, b + c, 0.5, alternative="greater").pvalue - (
        binomtest(b + 1, b + c, 0.5, alternative="greater").pvalue if b < b + c else 0.0
    )
    assert mcnemar_mid_p(b, c) == pytest.approx(exact - point)


def test_mcnemar_sees_nothing_where_nothing_differs() -> None:
    assert mcnemar_mid_p(0, 0) == mcnemar_mid_p(9, 9) == 1.0


def test_paired_tests_bootstrap_agrees_with_scipys() -> None:
    first, second = outcomes(60, 35, 500)
    ours = paired_tests(first, second, confidence=0.9)
    differences = first.astype(float) - second.astype(float)
    theirs = bootstrap((differences,), np.mean, confidence_level=0.9, method="percentile").confidence_interval
    assert ours.bootstrap_low == pytest.approx(theirs.low, abs=0.004)
    assert ours.bootstrap_high == pytest.approx(theirs.high, abs=0.004)
    assert ours == paired_tests(first, second, confidence=0.9)


def test_paired_tests_stand_beside_the_interval_of_the_verdict() -> None:
    first, second = outcomes(60, 35, 1000)
    tests, tango = paired_tests(first, second, confidence=0.95), paired_difference(first, second, confidence=0.95)
    assert tests.bootstrap_low == pytest.approx(tango.low, abs=0.003)
    assert tests.mcnemar_p < 0.05
    assert tango.low > 0


def _tango(b: int, c: int, n: int) -> tuple[float, float]:
    return tango_interval(b, c, n, confidence=0.95)


def _bootstrap(b: int, c: int, n: int) -> tuple[float, float]:
    return bootstrap_interval(b, c, n, confidence=0.95, seed=0, resamples=2000)


def _too_narrow(b: int, c: int, n: int) -> tuple[float, float]:
    """A wrong quantile: that of a one-sided 95 %."""
    return tango_interval(b, c, n, confidence=0.90)


def _unpaired(b: int, c: int, n: int) -> tuple[float, float]:
    """Two accuracies near one half taken for independent: far too wide."""
    half = float(norm.ppf(0.975)) * np.sqrt(0.5 / n)
    return (b - c) / n - half, (b - c) / n + half


def coverage(interval: Interval, n: int, discordance: float, *, gap: float = 0.02) -> float:
    """Return the share of simulated samples whose interval holds the true difference `gap`."""
    shares = [(discordance + gap) / 2, (discordance - gap) / 2, 1 - discordance]
    drawn = np.random.default_rng(0).multinomial(n, shares, size=SIMULATIONS)
    known = cache(interval)
    held = sum(low <= gap <= high for low, high in (known(int(b), int(c), n) for b, c, _ in drawn))
    return held / SIMULATIONS


@pytest.mark.parametrize("discordance", [0.05, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("n", [400, 1000])
def test_intervals_of_a_paired_difference_hold_the_truth_as_often_as_they_say(n: int, discordance: float) -> None:
    assert 0.935 <= coverage(_tango, n, discordance) <= 0.97


@pytest.mark.parametrize("discordance", [0.1, 0.3])
def test_bootstrap_holds_the_truth_as_often_as_it_says(discordance: float) -> None:
    assert 0.935 <= coverage(_bootstrap, 400, discordance) <= 0.97


@pytest.mark.parametrize("wrong", [_too_narrow, _unpaired])
def test_coverage_tells_a_wrong_interval(wrong: Interval) -> None:
    assert not 0.935 <= coverage(wrong, 400, 0.2) <= 0.97


def _wald(b: int, c: int, n: int) -> tuple[float, float]:
    """The textbook's normal interval."""
    shift = (b - c) / n
    half = float(norm.ppf(0.975)) * np.sqrt(((b + c) / n - shift**2) / n)
    return shift - half, shift + half


def exact_coverage(interval: Interval, n: int, gap: float) -> float:
    """The same without chance, where only the first model solves what the other does not: b is binomial, c is 0."""
    low, high = (int(end) for end in binom.interval(1 - 1e-12, n, gap))
    ends = {b: interval(b, 0, n) for b in range(low, high + 1)}
    return float(sum(binom.pmf(b, n, gap) for b, (left, right) in ends.items() if left <= gap <= right))


def test_interval_of_the_verdict_holds_where_every_discordant_prompt_goes_one_way() -> None:
    """5 % of 400 prompts, the hardest place of the grid above: the normal interval covers 92.7 %, Tango's 95.0 %."""
    assert exact_coverage(_tango, 400, 0.05) == pytest.approx(0.950, abs=0.001)
    assert exact_coverage(_wald, 400, 0.05) < 0.93


@pytest.mark.parametrize("gap", [0.0, 0.04])
@pytest.mark.parametrize("discordance", [0.05, 0.3])
@pytest.mark.parametrize("n", [400, 1000])
def test_intervals_hold_the_truth_of_no_difference_and_of_one_at_a_margin(
    n: int, discordance: float, gap: float
) -> None:
    assert 0.935 <= coverage(_tango, n, discordance, gap=gap) <= 0.97
