import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from subnet_ft.evidence.statistics import paired_difference, tango_interval, wilson_interval


def outcomes(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.repeat([True, True, False, False], [both, only_first, only_second, neither])
    second = np.repeat([True, False, True, False], [both, only_first, only_second, neither])
    return first, second


def quartic_ends(b: int, c: int, n: int, confidence: float) -> tuple[float, float]:
    """Yang, Sun and Hardin 2013 (Statistics in Medicine 32, 1336-1342): Tango's ends are roots of a quartic."""
    g = norm.ppf((1 + confidence) / 2) ** 2
    d, s = b - c, b + c
    roots = np.roots(
        [
            n**2 * (n / g + 1) ** 2,
            -n * d * (n / g + 1) * (4 * n / g + 1),
            2 * n * d**2 * (3 * n / g + 2) / g - n**2 * (s / g + 1),
            n * d * (2 * s / g + 1) - d**3 * (4 * n / g + 1) / g,
            d**2 * (d**2 / g - s) / g,
        ]
    )
    return float(roots.real.min()), float(roots.real.max())


def profile_score(b: int, c: int, n: int, difference: float) -> float:
    """The score statistic with the restricted estimate found by brute force, as a check on the closed form."""
    lowest, highest = max(0.0, -difference), (1 - difference) / 2

    def minus_log_likelihood(q: float) -> float:
        cells = [(b, q + difference), (c, q), (n - b - c, 1 - 2 * q - difference)]
        return -sum(count * np.log(max(share, 1e-300)) for count, share in cells if count)

    options = {"xatol": 1e-12}
    q = minimize_scalar(minus_log_likelihood, bounds=(lowest, highest), method="bounded", options=options).x
    return (b - c - n * difference) / np.sqrt(n * (2 * q + difference - difference**2))


# Fagerland, Lydersen and Laake 2014 (Statistics in Medicine 33, 2850-2875), table V, airway hyper-responsiveness;
# R's PropCIs::scoreci.mp(25, 28, 618, 0.90), whose difference is the second count minus the first.
@pytest.mark.parametrize(
    ("b", "c", "n", "confidence", "expected"),
    [(1, 7, 21, 0.95, (-0.517, -0.026)), (28, 25, 618, 0.90, (-0.0148, 0.0247))],
)
def test_tango_interval_equals_published_examples(b, c, n, confidence, expected):
    assert tango_interval(b, c, n, confidence=confidence) == pytest.approx(expected, abs=5e-4 if n == 21 else 5e-5)


@pytest.mark.parametrize(("b", "c", "n"), [(40, 20, 160), (3, 9, 32), (12, 2, 50), (37, 48, 1000), (1, 7, 21)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_tango_interval_equals_the_closed_form(b, c, n, confidence):
    assert tango_interval(b, c, n, confidence=confidence) == pytest.approx(quartic_ends(b, c, n, confidence), abs=1e-7)


@pytest.mark.parametrize(("b", "c", "n"), [(7, 1, 21), (40, 20, 160), (0, 5, 30)])
def test_tango_interval_ends_where_the_score_is_at_its_quantile(b, c, n):
    low, high = tango_interval(b, c, n, confidence=0.95)
    z = norm.ppf(0.975)
    assert profile_score(b, c, n, low) == pytest.approx(z, abs=1e-3)
    assert profile_score(b, c, n, high) == pytest.approx(-z, abs=1e-3)


def test_tango_interval_without_discordant_pairs_has_width():
    z2 = norm.ppf(0.975) ** 2
    expected = z2 / (100 + z2)
    assert tango_interval(0, 0, 100, confidence=0.95) == pytest.approx((-expected, expected), abs=1e-12)


def test_tango_interval_at_the_extremes_stays_inside_minus_one_and_one():
    low, high = tango_interval(10, 0, 10, confidence=0.95)
    assert 0.4 < low < 0.5
    assert high == 1.0
    assert tango_interval(0, 10, 10, confidence=0.95) == pytest.approx((-high, -low))


def test_tango_interval_swaps_with_its_arguments():
    low, high = tango_interval(30, 12, 200, confidence=0.9)
    assert tango_interval(12, 30, 200, confidence=0.9) == pytest.approx((-high, -low), abs=1e-12)


# n = 400, 4000 draws: the simulation's own standard error is 0.0034.
@pytest.mark.parametrize("discordance", [0.1, 0.3])
@pytest.mark.parametrize("difference", [0.0, 0.05])
def test_paired_difference_covers_the_truth_as_often_as_it_says(discordance, difference):
    n, draws = 400, 4000
    b_share = (discordance + difference) / 2
    generator = np.random.default_rng(7)
    counts = generator.multinomial(n, [b_share, discordance - b_share, 1 - discordance], size=draws)
    pairs, repeats = np.unique(counts[:, :2], axis=0, return_counts=True)
    covered = 0
    for (b, c), times in zip(pairs, repeats, strict=True):
        first, second = outcomes(n - b - c, b, c, 0)
        interval = paired_difference(first, second, confidence=0.95)
        covered += int(times) * (interval.low <= difference <= interval.high)
    assert 0.935 <= covered / draws <= 0.97


def test_paired_difference_counts_the_discordant_prompts():
    result = paired_difference(*outcomes(5, 3, 1, 11), confidence=0.95)
    assert (result.only_first, result.only_second, result.num_prompts) == (3, 1, 20)
    assert result.difference == pytest.approx(0.1)
    assert result.discordance == pytest.approx(0.2)
    assert result.low < 0.1 < result.high


def test_paired_difference_uses_the_pairing():
    paired = paired_difference(*outcomes(50, 5, 0, 45), confidence=0.95)
    crossed = paired_difference(*outcomes(20, 35, 30, 15), confidence=0.95)
    assert paired.difference == crossed.difference
    assert paired.low > 0 > crossed.low


@pytest.mark.parametrize(
    ("a", "b"),
    [([True], [True, False]), ([], []), ([0.5, 1.0], [True, False]), ([[True]], [[True]]), ([1, 0], [True, False])],
)
def test_paired_difference_refuses_what_is_not_paired_outcomes(a, b):
    with pytest.raises(ValueError, match=r"Outcomes|outcomes"):
        paired_difference(a, b, confidence=0.95)


# Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3.
@pytest.mark.parametrize(
    ("correct", "n", "expected"),
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (29, 29, (0.8830, 1.0)),
    ],
)
def test_wilson_interval_equals_the_published_table(correct, n, expected):
    assert wilson_interval(correct, n, 0.95) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(("correct", "n", "confidence"), [(1, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_wilson_interval_refuses_impossible_arguments(correct, n, confidence):
    with pytest.raises(ValueError, match="got"):
        wilson_interval(correct, n, confidence)
