import numpy as np
import pytest

from subnet_ft.evidence.statistics import paired_difference
from subnet_ft.evidence.verdict import above_control, prompts_to_decide, verdict

N = 1000
RULE = {"margin": 0.04, "confidence": 0.95}


def solves(accuracy: float, *, swapped: int = 0) -> np.ndarray:
    """The first prompts solved; `swapped` solved ones traded for unsolved ones, so that accuracy stays."""
    outcomes = np.arange(N) < round(accuracy * N)
    count = int(outcomes.sum())
    outcomes[count - swapped : count] = False
    outcomes[count : count + swapped] = True
    return outcomes


BASE, FULL = solves(0.40), solves(0.55)


def test_verdict_recovered_when_equivalent():
    result = verdict(BASE, FULL, solves(0.55, swapped=20), **RULE)
    assert result.name == "recovered"
    assert "equivalent" in result.reason
    assert "+0.0 points (90 % interval" in result.reason
    assert "n = 1,000" in result.reason


def test_verdict_recovered_when_better_beyond_doubt():
    result = verdict(BASE, FULL, solves(0.65), **RULE)
    assert result.name == "recovered"
    assert "above the full run" in result.reason


def test_verdict_not_recovered_when_wholly_below_the_margin():
    result = verdict(BASE, FULL, solves(0.45), **RULE)
    assert result.name == "not_recovered"
    assert "-10.0 points" in result.reason


def test_verdict_undecided_says_how_many_prompts_would_do():
    result = verdict(BASE, FULL, solves(0.53, swapped=150), **RULE)
    assert result.name == "undecided"
    assert "prompts would decide it if" in result.reason


def test_verdict_undecided_when_worse_than_the_margin_but_not_beyond_doubt():
    result = verdict(BASE, FULL, solves(0.50, swapped=150), **RULE)
    assert result.name == "undecided"
    assert "-5.0 points" in result.reason
    assert "prompts would decide it if" in result.reason


def test_verdict_undecided_at_the_margin_says_that_none_would_do():
    result = verdict(BASE, FULL, solves(0.51), **RULE)
    assert result.name == "undecided"
    assert "no number of prompts would decide it" in result.reason


def test_verdict_undecided_when_not_worse_but_neither_equivalent_nor_better():
    subnet = solves(0.57, swapped=150)
    gap = paired_difference(subnet, FULL, confidence=0.90)
    assert -0.04 < gap.low < 0
    assert gap.high > 0.04
    assert verdict(BASE, FULL, subnet, **RULE).name == "undecided"


def test_verdict_absence_of_a_difference_is_not_equivalence():
    few = slice(0, None, 50)
    subnet, full = solves(0.55, swapped=100)[few], FULL[few]
    assert paired_difference(subnet, full, confidence=0.95).low < 0
    assert verdict(np.zeros(20, dtype=bool), full, subnet, **RULE).name == "undecided"


@pytest.mark.parametrize("full", [BASE, solves(0.30), solves(0.41, swapped=200)])
def test_verdict_nothing_to_recover_when_the_full_run_is_not_above_the_base(full):
    result = verdict(BASE, full, full, **RULE)
    assert result.name == "nothing_to_recover"
    assert "95 % interval" in result.reason


def test_verdict_uses_the_two_one_sided_interval():
    subnet = solves(0.55, swapped=108)
    wide, narrow = (paired_difference(subnet, FULL, confidence=level) for level in (0.95, 0.90))
    margin = (wide.high + narrow.high) / 2
    assert verdict(BASE, FULL, subnet, margin=margin, confidence=0.95).name == "recovered"
    assert verdict(BASE, FULL, subnet, margin=narrow.high * 0.999, confidence=0.95).name == "undecided"


@pytest.mark.parametrize(
    ("missing", "words"),
    [(0, "the base model"), (1, "the full run"), (2, "the subnetwork"), (None, "base model, full run and the")],
)
def test_verdict_not_assessed_names_what_is_missing(missing, words):
    models = [None if missing in (index, None) else model for index, model in enumerate([BASE, FULL, FULL])]
    result = verdict(*models, **RULE)
    assert result.name == "not_assessed"
    assert words in result.reason


@pytest.mark.parametrize(("margin", "confidence"), [(0.0, 0.95), (1.0, 0.95), (0.04, 0.5), (0.04, 1.0)])
def test_verdict_refuses_a_rule_without_meaning(margin, confidence):
    with pytest.raises(ValueError, match="must lie in"):
        verdict(BASE, FULL, FULL, margin=margin, confidence=confidence)


def test_verdict_names_the_run_that_it_judges():
    assert verdict(BASE, FULL, solves(0.45), **RULE, subject="control").reason.startswith("The control is below")


@pytest.mark.parametrize("gain", [0.005, 0.02, 0.039, 0.04, 0.05, 0.06, 0.10, 0.30])
@pytest.mark.parametrize("swapped", [0, 30, 200])
@pytest.mark.parametrize("margin", [0.005, 0.04, 0.2])
def test_verdict_never_awards_recovered_to_the_base_itself(gain, swapped, margin):
    full = solves(0.50 + gain, swapped=swapped)
    base = solves(0.50)
    assert verdict(base, full, base, margin=margin, confidence=0.95).name != "recovered"


def test_verdict_undecided_when_the_margin_is_not_smaller_than_the_gain():
    base, full = solves(0.50), solves(0.52)
    for judged in (base, full):
        result = verdict(base, full, judged, **RULE)
        assert result.name == "undecided"
        assert (
            "margin of 4.0 points is not smaller than the gain, so the base model itself lies within" in result.reason
        )
        assert "full run minus base is +2.0 points (95 % interval" in result.reason
        assert "no number of prompts would decide it" in result.reason
        assert "Choose a smaller margin, evaluate more prompts or train the full run for longer" in result.reason


def test_verdict_undecided_when_the_gain_may_be_smaller_than_the_margin():
    base, full = solves(0.50), solves(0.545)
    result = verdict(base, full, full, **RULE)
    assert result.name == "undecided"
    assert "not shown to be smaller than the gain, so the base model itself may lie within" in result.reason
    assert "prompts would decide it if" in result.reason
    assert verdict(base, full, full, margin=0.03, confidence=0.95).name == "recovered"


def test_verdict_recovered_above_the_full_run_whatever_its_gain():
    result = verdict(solves(0.50), solves(0.52), solves(0.53), **RULE)
    assert result.name == "recovered"
    assert "above the full run" in result.reason


def test_verdict_not_recovered_below_the_margin_whatever_the_gain():
    assert verdict(solves(0.50), solves(0.52), solves(0.40), **RULE).name == "not_recovered"


@pytest.mark.parametrize(
    ("control", "answer", "words"),
    [
        (solves(0.45), "yes", "above it"),
        (solves(0.55, swapped=10), "no", "equivalent"),
        (solves(0.60), "no", "below it"),
        (solves(0.54, swapped=200), "undecided", "is undecided"),
        (solves(0.54), "yes", "above it, though by less than the margin"),
    ],
)
def test_above_control_answers(control, answer, words):
    result = above_control(FULL, control, **RULE)
    assert result.answer == answer
    assert words in result.reason


def test_prompts_to_decide_is_enough_at_the_same_shares():
    gap = paired_difference(solves(0.53, swapped=150), FULL, confidence=0.90)
    needed = prompts_to_decide(gap, paired_difference(FULL, BASE, confidence=0.95), margin=0.04)
    times = needed / N
    b, c = round(gap.only_first * times), round(gap.only_second * times)
    both = needed - b - c
    first = np.repeat([True, True, False], [both, b, c])
    second = np.repeat([True, False, True], [both, b, c])
    larger = paired_difference(first, second, confidence=0.90)
    assert larger.low > -0.04
    assert larger.high < 0.04
    assert 1000 < needed < 5000


def test_prompts_to_decide_works_without_discordant_prompts():
    gap = paired_difference(FULL[:20], FULL[:20], confidence=0.90)
    gain = paired_difference(FULL, BASE, confidence=0.95)
    assert prompts_to_decide(gap, gain, margin=0.04) == 65


def test_prompts_to_decide_waits_until_the_gain_is_larger_than_the_margin():
    same = paired_difference(FULL, FULL, confidence=0.90)
    small = paired_difference(solves(0.545), solves(0.50), confidence=0.95)
    needed = prompts_to_decide(same, small, margin=0.04)
    shares = [round(needed * share) for share in (0.545, 0.50)]
    first, second = (np.arange(needed) < count for count in shares)
    assert paired_difference(first, second, confidence=0.95).low > 0.04
    assert needed > 5000
    assert prompts_to_decide(same, small, margin=0.045) is None
