"""The summary over several seeds of training: one interval that covers the choice of seeds and that of prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from subnet_ft.evidence.statistics import two_sided_quantile
from subnet_ft.evidence.verdict import VerdictName, decide, two_one_sided


@dataclass(frozen=True)
class MixedDifference:
    """A difference of accuracies over several seeds, all on the same prompts."""

    by_seed: dict[str, float]
    """Seed to the difference with that seed, in [-1, 1]."""
    mean: float
    """Mean over seeds."""
    sd_between_seeds: float
    """Standard deviation of the seeds' true differences, prompts' noise taken off; 0 where none is left."""
    low: float
    """Lower end of the interval of the mean."""
    high: float
    """Upper end."""
    confidence: float
    """Two-sided confidence of the interval."""
    degrees_of_freedom: float
    """Of its t quantile: 1 with two seeds; else near the number of seeds minus one where seeds vary much, and large
    where they do not."""


@dataclass(frozen=True)
class SeedSummary:
    """One run over several seeds, against the full run of the same seed and with the verdict's rule."""

    run: str
    """`subnet`, or a control."""
    seeds: list[int]
    """Seeds of training."""
    minus_full: MixedDifference
    """The run minus the full run, at the confidence of two one-sided tests."""
    full_minus_base: MixedDifference
    """The full run minus the base."""
    verdict: VerdictName
    """By the rule of a single seed, on these intervals, but `undecided` where the interval of the gain holds zero and
    reaches the margin; `nothing_to_recover` only where all of it lies below the margin."""
    num_prompts: int
    """Held-out prompts."""
    reason: str
    """One sentence with the gain and what settled the verdict, or kept it from being settled."""


def mixed_difference(
    first: Mapping[int, NDArray[np.bool_]], second: Mapping[int, NDArray[np.bool_]], *, confidence: float
) -> MixedDifference:
    """Average a paired difference over seeds, with seeds and prompts both as random draws.

    With d[s, i] the difference for seed s and prompt i, the mean's variance is A/S + B/n - C/(S n), where A and B are
    the variances of the seeds' and the prompts' means and C that of what neither explains, each with its degrees of
    freedom; the interval's t quantile has those of their sum by Satterthwaite.

    With two seeds it has one. How much seeds vary is then estimated from a single difference, which is small by chance
    as often as not, and Satterthwaite would trust it: in simulations his 95 % interval held the truth in 89 % of cases
    where two seeds vary by 2 to 5 points, against 94 % or more from three seeds on. So two seeds decide little.

    Args:
        first: Seed to (n,) outcomes of the first model.
        second: Seed to those of the second.
        confidence: Two-sided confidence, in (0, 1).

    Raises:
        ValueError: There are fewer than two seeds, or the two models have others.

    Source: two-way random effects without replication (Searle, Casella and McCulloch 1992, chapter 4); Satterthwaite
    1946 (Biometrics Bulletin 2, 110-114).
    """
    if set(first) != set(second) or len(first) < 2:
        raise ValueError(
            f"A summary needs the same two seeds or more of both models, got {sorted(first)}, {sorted(second)}."
        )
    seeds = sorted(first)
    values = np.array([first[seed].astype(np.int8) - second[seed].astype(np.int8) for seed in seeds], dtype=np.float64)
    num_seeds, n = values.shape
    by_seed, by_prompt, mean = values.mean(axis=1), values.mean(axis=0), float(values.mean())
    left = values - by_seed[:, None] - by_prompt[None, :] + mean
    free = (num_seeds - 1) * max(n - 1, 1)
    within = float((left**2).sum()) / free
    terms = (
        (float(by_seed.var(ddof=1)) / num_seeds, num_seeds - 1),
        (float(by_prompt.var(ddof=1)) / n if n > 1 else 0.0, max(n - 1, 1)),
        (-within / (num_seeds * n), free),
    )
    variance = sum(part for part, _ in terms)
    # Estimates of components can cancel; the prompts' part alone is there with any seeds.
    variance = max(variance, terms[1][0])
    spread = sum(part**2 / degrees for part, degrees in terms)
    degrees = max(variance**2 / spread, 1.0) if spread > 0 and num_seeds > 2 else float(num_seeds - 1)
    half = float(student.ppf((1 + confidence) / 2, degrees)) * math.sqrt(variance)
    # Models that differ on no prompt have no variance, and are not known to be the same: Tango's ends there.
    squared = two_sided_quantile(confidence) ** 2
    half = max(half, squared / (n + squared))
    between = max(0.0, float(by_seed.var(ddof=1)) - within / n)
    return MixedDifference(
        by_seed={str(seed): float(value) for seed, value in zip(seeds, by_seed, strict=True)},
        mean=mean,
        sd_between_seeds=math.sqrt(between),
        low=max(-1.0, mean - half),
        high=min(1.0, mean + half),
        confidence=confidence,
        degrees_of_freedom=degrees,
    )


def summarize_seeds(
    run: str,
    base: NDArray[np.bool_],
    full: Mapping[int, NDArray[np.bool_]],
    other: Mapping[int, NDArray[np.bool_]],
    *,
    margin: float,
    confidence: float,
) -> SeedSummary:
    """Judge a run over several seeds by the rule of `evidence.verdict.verdict`, but for what a wide interval says.

    A gain that is not shown to be above zero need not be small: of two seeds the interval is so wide that a gain of 20
    points in both may not exclude zero. So the verdict is `nothing_to_recover` only if the whole interval of the gain
    lies below the margin, which is the largest difference that counts as none, and `undecided` if it holds zero and
    reaches the margin.

    Args:
        run: Name of the run.
        base: (n,) outcomes of the base.
        full: Seed to (n,) outcomes of the full run.
        other: Seed to (n,) outcomes of the run.
        margin: Largest difference in accuracy that counts as none, in (0, 1).
        confidence: Confidence of each claim, in (0.5, 1).
    """
    gain = mixed_difference(full, dict.fromkeys(full, base), confidence=confidence)
    gap = mixed_difference(other, full, confidence=two_one_sided(confidence))
    name: VerdictName
    if gain.low > 0:
        name = decide(gap.low, gap.high, gain.low, margin)
    else:
        name = "nothing_to_recover" if gain.high < margin else "undecided"
    return SeedSummary(run, sorted(full), gap, gain, name, len(base), _reason(name, gap, gain, margin))


def _reason(name: VerdictName, gap: MixedDifference, gain: MixedDifference, margin: float) -> str:
    within = f"the margin of {margin * 100:.1f} points"
    if name == "nothing_to_recover":
        settled = f"all of it below {within}"
    elif gain.low <= 0:
        settled = "which does not settle whether the full run is above the base model"
    elif name == "recovered":
        settled = "and the run lies above the full run" if gap.low > 0 else f"and the run lies within {within}"
    elif name == "not_recovered":
        settled = f"and the run lies below the full run by more than {within}"
    elif gain.low <= margin:
        settled = f"which may be no more than {within}, so the base model itself may lie within it"
    else:
        settled = f"but the difference to the full run does not settle {within}"
    few = "; two seeds give one degree of freedom, so intervals are wide" if len(gain.by_seed) == 2 else ""
    low, mean, high = (f"{value * 100:+.1f}" for value in (gain.low, gain.mean, gain.high))
    return f"The gain over seeds is {mean} points [{gain.confidence * 100:g} %: {low} to {high}], {settled}{few}."
