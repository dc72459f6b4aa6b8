"""Verdicts: whether a run recovered the full run's accuracy, by one rule for subnetworks and controls alike.

The rule never reads "no difference was found" as "there is none": a run recovers only when two one-sided tests
(Schuirmann 1987) place it within the margin of the full run, or when it is above the full run. Being close proves
nothing while the base model may be as close: the base model itself never recovers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from subnet_ft.evidence.statistics import Outcomes, PairedDifference, paired_difference, tango_interval

VerdictName: TypeAlias = Literal["recovered", "not_recovered", "undecided", "nothing_to_recover", "not_assessed"]
Answer: TypeAlias = Literal["yes", "no", "undecided"]

# Beyond this many prompts the answer is "none would decide it": no evaluation set is so large.
_MOST_PROMPTS = 10_000_000


@dataclass(frozen=True)
class Verdict:
    """One verdict with the numbers it rests on."""

    name: VerdictName
    """recovered, not_recovered, undecided, nothing_to_recover or not_assessed."""
    reason: str
    """One sentence with the numbers."""


@dataclass(frozen=True)
class Comparison:
    """Whether the subnetwork is above a control."""

    answer: Answer
    """yes, no or undecided."""
    reason: str
    """One sentence with the numbers."""


def verdict(
    base: Outcomes | None,
    full: Outcomes | None,
    subnet: Outcomes | None,
    *,
    margin: float,
    confidence: float,
    subject: str = "subnetwork",
    judged_on: str = "prompts",
) -> Verdict:
    """Judge whether `subnet` recovered what `full` gained over `base`.

    `nothing_to_recover` unless the paired interval of full - base at `confidence` lies above 0. Then, with [L, U] the
    interval of subnet - full at 2 * confidence - 1 (two one-sided tests at 1 - confidence each): `recovered` if L > 0
    (better), or if -margin < L and U < margin (equivalent) and the interval of full - base lies above the margin, so
    that the base model is not equivalent too; `not_recovered` if U < -margin; else `undecided`.

    Args:
        base: (n,) bool outcomes of the base model; `None` when it was not evaluated.
        full: (n,) bool outcomes of the full run.
        subnet: (n,) bool outcomes of the run judged.
        margin: Largest difference in accuracy that counts as none, in (0, 1).
        confidence: Confidence of each claim, in (0.5, 1).
        subject: What the sentence calls the run judged.
        judged_on: What it calls that of which the outcomes are.

    Raises:
        ValueError: `margin` or `confidence` is out of range, or the outcomes are not over the same prompts.
    """
    _check(margin, confidence)
    if base is None or full is None or subnet is None:
        pairs = [("base model", base), ("full run", full), (subject, subnet)]
        missing = [name for name, outcomes in pairs if outcomes is None]
        return Verdict("not_assessed", f"No accuracy was measured for the {_join(missing)}.")

    gain = paired_difference(full, base, confidence=confidence)
    if gain.low <= 0:
        return Verdict(
            "nothing_to_recover",
            f"The full run is not shown to be above the base model: {_difference_text(gain, 'full run minus base')}.",
        )

    gap = paired_difference(subnet, full, confidence=two_one_sided(confidence))
    numbers = _difference_text(gap, f"{subject} minus full run")
    within = f"{margin * 100:.1f} points"
    name = decide(gap.low, gap.high, gain.low, margin)
    if name == "recovered":
        if _equivalent(gap.low, gap.high, margin) and gain.low > margin:
            return Verdict(name, f"The {subject} is equivalent to the full run within {within}: {numbers}.")
        return Verdict(name, f"The {subject} is above the full run: {numbers}.")
    if name == "not_recovered":
        return Verdict(name, f"The {subject} is below the full run by more than {within}: {numbers}.")
    needed = prompts_to_decide(gap, gain, margin=margin)
    outlook = (
        f"no number of {judged_on} would decide it at this difference"
        if needed is None
        else f"about {needed:,} {judged_on} would decide it if difference and discordance stayed as observed"
    )
    if gain.low <= margin:
        smaller, lies = ("smaller", "lies") if gain.difference <= margin else ("shown to be smaller", "may lie")
        return Verdict(
            name,
            f"A margin of {within} is not {smaller} than the gain, so the base model itself {lies} within it: "
            f"{_difference_text(gain, 'full run minus base')}, {numbers}; {outlook}. "
            f"Choose a smaller margin, evaluate more {judged_on} or train the full run for longer.",
        )
    return Verdict(name, f"The interval does not settle a margin of {within}: {numbers}; {outlook}.")


def above_control(subnet: Outcomes, control: Outcomes, *, margin: float, confidence: float) -> Comparison:
    """Say whether the subnetwork is above a control of equal size.

    `yes` if the paired interval of subnet - control at `confidence` lies above 0; `no` if it lies below 0 or if the
    two are equivalent within the margin (the interval at 2 * confidence - 1 lies inside +-margin); else `undecided`.

    Args:
        subnet: (n,) bool outcomes of the subnetwork run.
        control: (n,) bool outcomes of the control on the same prompts.
        margin: Largest difference in accuracy that counts as none, in (0, 1).
        confidence: Confidence of each claim, in (0.5, 1).
    """
    _check(margin, confidence)
    lead = paired_difference(subnet, control, confidence=confidence)
    narrow = paired_difference(subnet, control, confidence=two_one_sided(confidence))
    label = "subnetwork minus control"
    if lead.low > 0:
        little = ", though by less than the margin" if _equivalent(narrow.low, narrow.high, margin) else ""
        return Comparison("yes", f"The subnetwork is above it{little}: {_difference_text(lead, label)}.")
    if lead.high < 0:
        return Comparison("no", f"The subnetwork is below it: {_difference_text(lead, label)}.")
    if _equivalent(narrow.low, narrow.high, margin):
        return Comparison(
            "no", f"The two are equivalent within {margin * 100:.1f} points: {_difference_text(narrow, label)}."
        )
    return Comparison("undecided", f"Whether the subnetwork is above it is undecided: {_difference_text(lead, label)}.")


def two_one_sided(confidence: float) -> float:
    """Return the confidence of the interval that equals two one-sided tests at 1 - confidence: 0.90 for 0.95."""
    return 2 * confidence - 1


def prompts_to_decide(gap: PairedDifference, gain: PairedDifference, *, margin: float) -> int | None:
    """Return how many prompts would decide a verdict if differences and discordances stayed as observed.

    The observed shares are scaled to larger n until the rule of `verdict` settles. The answer is rounded up to two
    digits; `None` means that even ten million would not do, as when the difference lies at the margin. A new sample
    varies around the observed shares, so with exactly this many prompts the chance of a decision is about one half.

    Args:
        gap: The run judged minus the full run, at the confidence of the two one-sided tests.
        gain: The full run minus the base model, at the confidence of the verdict.
        margin: Largest difference in accuracy that counts as none.
    """

    def interval(difference: PairedDifference, count: int) -> tuple[float, float]:
        scale = count / difference.num_prompts
        only_first, only_second = difference.only_first * scale, difference.only_second * scale
        return tango_interval(only_first, only_second, count, confidence=difference.confidence)

    def decides(count: int) -> bool:
        low, high = interval(gap, count)
        return decide(low, high, interval(gain, count)[0], margin) != "undecided"

    upper = gap.num_prompts
    while not decides(upper):
        upper *= 2
        if upper > _MOST_PROMPTS:
            return None
    lower = upper // 2
    while upper - lower > 1:
        middle = (lower + upper) // 2
        lower, upper = (lower, middle) if decides(middle) else (middle, upper)
    unit = int(10 ** max(0, math.floor(math.log10(upper)) - 1))
    return math.ceil(upper / unit) * unit


def decide(
    low: float, high: float, gain_low: float, margin: float
) -> Literal["recovered", "not_recovered", "undecided"]:
    """Apply the rule to the interval of a run minus the full run and the lower end of the full run's gain."""
    if low > 0 or (_equivalent(low, high, margin) and gain_low > margin):
        return "recovered"
    return "not_recovered" if high < -margin else "undecided"


def _equivalent(low: float, high: float, margin: float) -> bool:
    return low > -margin and high < margin


def _difference_text(difference: PairedDifference, label: str) -> str:
    low, value, high = (f"{x * 100:+.1f}" for x in (difference.low, difference.difference, difference.high))
    interval = f"{difference.confidence * 100:g} % interval {low} to {high}"
    return f"{label} is {value} points ({interval}, n = {difference.num_prompts:,})"


def _check(margin: float, confidence: float) -> None:
    if not 0 < margin < 1:
        raise ValueError(f"margin must lie in (0, 1), got {margin}.")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence must lie in (0.5, 1), got {confidence}.")


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and the " + words[-1]
