"""The summary over seeds: its interval holds the truth when seeds vary and when they do not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from subnet_ft.evidence.seeds import mixed_difference, summarize_seeds


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


@pytest.mark.parametrize("between", [0.0, 0.03])
@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_mixed_difference_holds_the_truth_over_seeds_and_prompts(num_seeds: int, between: float) -> None:
    """Satterthwaite's quantile is cautious where seeds hardly vary, and close where they do."""
    rng = np.random.default_rng(num_seeds)
    held = 0
    for _ in range(2000):
        found = mixed_difference(*drawn(rng, num_seeds, 300, gap=0.05, between=between), confidence=0.95)
        held += found.low <= 0.05 <= found.high
    assert 0.92 <= held / 2000 <= 0.995


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
    assert found.degrees_of_freedom >= 1


def test_mixed_difference_recovers_the_spread_of_seeds() -> None:
    first, second = drawn(np.random.default_rng(2), 200, 400, gap=0.0, between=0.05)
    assert mixed_difference(first, second, confidence=0.95).sd_between_seeds == pytest.approx(0.05, rel=0.2)


def test_mixed_difference_of_seeds_far_apart_is_wide() -> None:
    right, wrong = np.ones(1000, dtype=bool), np.zeros(1000, dtype=bool)
    half = np.arange(1000) < 500
    found = mixed_difference({0: right, 1: half}, {0: wrong, 1: half}, confidence=0.95)
    assert (found.low, found.high) == (-1.0, 1.0)


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
