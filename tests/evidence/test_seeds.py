"""The summary over seeds: its interval holds the truth when seeds vary and when they do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import t, ttest_1samp

from subnet_ft.evidence.seeds import mixed_difference, summarize_seeds
from subnet_ft.evidence.statistics import tango_interval

Outcomes = Mapping[int, NDArray[np.bool_]]
Interval = Callable[[Outcomes, Outcomes, float], tuple[float, float]]


def drawn(
    rng: np.random.Generator, num_seeds: int, n: int, *, gap: float, between: float
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Outcomes of two models; the first's accuracy lies `gap` above, by seed with a deviation of `between`."""
    hard = rng.uniform(0.2, 0.8, size=n)
    first, second = {}, {}
    for seed in range(num_seeds):
        own = gap + between * rng.standard_normal()
        second[seed] = rng.random(n) < hard
        first[seed] = rng.random(n) < np.clip(hard + own, 0, 1)
    return first, second


def coverage(num_seeds: int, n: int, between: float, interval: Interval, *, confidence: float = 0.95) -> float:
    """Return the share of simulated studies whose interval holds the true mean difference, 0."""
    rng, held, studies = np.random.default_rng(num_seeds), 0, 2000
    for _ in range(studies):
        low, high = interval(*drawn(rng, num_seeds, n, gap=0.0, between=between), confidence)
        held += low <= 0.0 <= high
    return held / studies


def mixed(first: Outcomes, second: Outcomes, confidence: float) -> tuple[float, float]:
    found = mixed_difference(first, second, confidence=confidence)
    return found.low, found.high


def satterthwaite(first: Outcomes, second: Outcomes, confidence: float) -> tuple[float, float]:
    """The interval with Satterthwaite's degrees of freedom whatever the number of seeds, without the common term."""
    values = np.array([first[s].astype(float) - second[s] for s in first])
    num_seeds, n = values.shape
    seeds, prompts = values.mean(1).var(ddof=1) / num_seeds, values.mean(0).var(ddof=1) / n
    variance, mean = seeds + prompts, values.mean()
    half = t.ppf((1 + confidence) / 2, variance**2 / (seeds**2 / (num_seeds - 1) + prompts**2 / (n - 1)))
    return mean - half * variance**0.5, mean + half * variance**0.5


# Three seeds that hardly vary make it cautious, up to 99 %, and two always. 2,000 draws: a standard error of 0.005.
@pytest.mark.parametrize("between", [0.0, 0.02, 0.05])
@pytest.mark.parametrize(("num_seeds", "most"), [(2, 1.0), (3, 0.995), (5, 0.995)])
def test_mixed_difference_holds_the_truth_over_seeds_and_prompts(num_seeds: int, most: float, between: float) -> None:
    assert 0.935 <= coverage(num_seeds, 400, between, mixed) <= most


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_mixed_difference_holds_the_truth_at_the_confidence_of_two_one_sided_tests(num_seeds: int) -> None:
    assert coverage(num_seeds, 400, 0.05, mixed, confidence=0.9) >= 0.885


def test_two_seeds_need_the_quantile_of_one_degree_of_freedom() -> None:
    assert coverage(2, 1000, 0.05, satterthwaite) < 0.92


def test_mixed_difference_over_pooled_prompts_would_not() -> None:
    """What the test above must catch: seeds that vary, taken for more prompts."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        first, second = drawn(rng, 3, 300, gap=0.05, between=0.03)
        values = np.concatenate([first[s].astype(float) - second[s] for s in first])
        low, high = ttest_1samp(values, 0.0).confidence_interval(0.95)
        held += low <= 0.05 <= high
    assert held / 1000 < 0.92


def test_mixed_difference_is_the_mean_over_seeds() -> None:
    first, second = drawn(np.random.default_rng(1), 3, 400, gap=0.1, between=0.0)
    found = mixed_difference(first, second, confidence=0.95)
    means = [first[s].mean() - second[s].mean() for s in first]
    assert list(found.by_seed.values()) == pytest.approx(means)
    assert found.mean == pytest.approx(np.mean(means))
    assert found.low < found.mean < found.high
    assert 2 <= found.degrees_of_freedom < 1000
    two = mixed_difference({s: first[s] for s in (0, 1)}, {s: second[s] for s in (0, 1)}, confidence=0.95)
    assert two.degrees_of_freedom == 1


def test_mixed_difference_recovers_the_spread_of_seeds() -> None:
    first, second = drawn(np.random.default_rng(2), 200, 400, gap=0.0, between=0.05)
    assert mixed_difference(first, second, confidence=0.95).sd_between_seeds == pytest.approx(0.05, rel=0.2)


def test_mixed_difference_of_seeds_far_apart_is_wide() -> None:
    right, wrong = np.ones(1000, dtype=bool), np.zeros(1000, dtype=bool)
    half = np.arange(1000) < 500
    found = mixed_difference({0: right, 1: half}, {0: wrong, 1: half}, confidence=0.95)
    assert (found.low, found.high) == (-1.0, 1.0)


def test_mixed_difference_of_equal_outcomes_is_no_point() -> None:
    same = dict.fromkeys(range(3), np.arange(40) < 20)
    found = mixed_difference(same, same, confidence=0.95)
    assert (found.low, found.high) == pytest.approx(tango_interval(0, 0, 40, confidence=0.95))


@pytest.mark.parametrize("second", [{0: np.ones(3, dtype=bool)}, {1: np.ones(3, dtype=bool)}])
def test_mixed_difference_refuses_one_seed_or_other_ones(second: dict[int, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="the same two seeds or more"):
        mixed_difference({0: np.ones(3, dtype=bool)}, second, confidence=0.95)


def test_summarize_seeds_judges_by_the_rule_of_one_seed() -> None:
    rng = np.random.default_rng(3)
    base = rng.random(2000) < 0.2
    solved = rng.random(2000) < 0.6
    flipped = solved ^ (rng.random(2000) < 0.02)
    full = {0: solved, 1: flipped}
    like = summarize_seeds("subnet", base, full, {0: flipped, 1: solved}, margin=0.04, confidence=0.95)
    assert (like.verdict, like.seeds, like.num_prompts) == ("recovered", [0, 1], 2000)
    far = summarize_seeds("control", base, full, dict.fromkeys(full, base), margin=0.04, confidence=0.95)
    assert far.verdict == "not_recovered"
    nothing = summarize_seeds("subnet", solved, full, full, margin=0.04, confidence=0.95)
    assert nothing.verdict == "nothing_to_recover"


def outcomes_of(share: float, n: int = 1000) -> NDArray[np.bool_]:
    return np.arange(n) < round(share * n)


def test_summarize_seeds_of_a_certain_gain_that_two_seeds_cannot_show_is_undecided() -> None:
    full = {0: outcomes_of(0.499), 1: outcomes_of(0.536)}
    found = summarize_seeds("subnet", outcomes_of(0.3), full, full, margin=0.04, confidence=0.95)
    assert found.full_minus_base.low <= 0 < found.full_minus_base.by_seed["0"]
    assert found.verdict == "undecided"
    assert found.reason.startswith("The gain over seeds is +21.8 points [95 %: -")
    assert "does not settle whether the full run is above the base model" in found.reason
    assert found.reason.endswith("two seeds give one degree of freedom, so intervals are wide.")


def test_summarize_seeds_finds_nothing_to_recover_only_where_the_gain_is_below_the_margin() -> None:
    base, small = outcomes_of(0.5), {seed: outcomes_of(0.5 + 0.002 * seed) for seed in (-1, 0, 1)}
    none = summarize_seeds("subnet", base, small, small, margin=0.04, confidence=0.95)
    assert none.verdict == "nothing_to_recover"
    assert "all of it below the margin of 4.0 points" in none.reason
    assert "degree of freedom" not in none.reason
    assert summarize_seeds("subnet", base, small, small, margin=0.004, confidence=0.95).verdict == "undecided"
    worse = {seed: outcomes_of(0.2 + 0.002 * seed) for seed in (-1, 0, 1)}
    assert summarize_seeds("subnet", base, worse, worse, margin=0.04, confidence=0.95).verdict == "nothing_to_recover"


@pytest.mark.parametrize(
    ("other", "margin", "verdict", "said"),
    [
        (0.5, 0.04, "recovered", "and the run lies within the margin of 4.0 points"),
        (0.7, 0.04, "recovered", "and the run lies above the full run"),
        (0.3, 0.04, "not_recovered", "below the full run by more than the margin of 4.0 points"),
        (0.46, 0.04, "undecided", "does not settle the margin of 4.0 points"),
        (0.5, 0.21, "undecided", "may be no more than the margin of 21.0 points, so the base model itself"),
    ],
)
def test_summarize_seeds_says_what_settled_the_verdict(other: float, margin: float, verdict: str, said: str) -> None:
    full = {seed: outcomes_of(0.5 + 0.001 * seed) for seed in range(3)}
    runs = {seed: outcomes_of(other + 0.001 * seed) for seed in range(3)}
    found = summarize_seeds("subnet", outcomes_of(0.3), full, runs, margin=margin, confidence=0.95)
    assert (found.verdict, said in found.reason) == (verdict, True), found.reason
