"""What studies say: numbers with intervals, nulls called nulls, and no claim beyond what was run."""

from __future__ import annotations

import pytest
from study_runs import cell, mask, pair, report

from subnet_ft.studies.schema import CellResult, StudyReport, Traits
from subnet_ft.studies.wording import answers, gaps


def said(study: str, *cells: CellResult, **fields: object) -> str:
    return " ".join(answers(report(study, *cells, **fields)))  # type: ignore[arg-type]


def test_causes_calls_a_difference_within_two_seeds_none() -> None:
    own, seed = cell("as_written", changed=0.17), cell("seed", changed=0.18)
    text = said("causes", own, seed, cell("kl_on", 0.505, versus=0.5, changed=0.165))
    assert "Kl on: 16.5 % changed against 17.0 %, no difference beyond that between two seeds." in text
    assert "Accuracy +0.5 points [" in text
    assert "no difference shown" in text
    assert "times as many" not in text


def test_causes_sorts_runs_by_what_two_seeds_differ() -> None:
    own, seed = cell("as_written", changed=0.17), cell("seed", changed=0.18)
    others = [cell(name, changed=share) for name, share in (("up", 0.3), ("down", 0.1), ("a", 0.175), ("b", 0.165))]
    # Seeds of one model say nothing of another.
    small = [
        cell("tiny", changed=0.5, model="tiny:x", reference=None),
        cell("float32", changed=0.9, model="tiny:x", reference="tiny"),
    ]
    text = answers(report("causes", own, seed, *others, *small))[2]
    assert text == (
        "By more than the two seeds differ, density rose with: up. It fell with: down. Not shown to move it: a; b."
    )


def test_causes_gives_the_size_of_a_difference_beyond_two_seeds() -> None:
    own, seed = cell("as_written", changed=0.17), cell("seed", changed=0.18)
    text = said("causes", own, seed, cell("rate_triple", 0.8, versus=0.5, changed=0.34))
    assert "Rate triple: 34.0 % changed against 17.0 %, 2.00 times as many" in text
    assert "at 95 %." in text
    assert "no difference shown" not in text


def test_causes_speaks_of_tolerance_where_it_tells_another_story() -> None:
    own, seed = cell("as_written", changed=0.17), cell("seed", changed=0.18)
    same = said("causes", own, seed, cell("a", changed=0.34))
    other = said("causes", own, seed, cell("b", changed={"0": 0.34, "1e-08": 0.3, "1e-05": 0.085}))
    assert "by more than 1e-5 8.5 % against 8.5 %" in other
    assert "by more than 1e-5 1" not in same


def test_causes_without_a_second_seed_claims_no_floor() -> None:
    text = said("causes", cell("as_written", changed=0.17), cell("kl_on", changed=0.165))
    assert "two seeds" not in text
    assert "0.97 times as many" in text


def test_causes_gives_the_likelihood_of_data_and_skips_what_failed() -> None:
    own = cell("as_written", changed=0.17)
    text = said(
        "causes", own, cell("data", changed=0.2, data_loss=1.234), cell("sgd", None, failure="it diverged: NaN")
    )
    assert "the base gives its data 1.23 nats per token" in text
    assert "Sgd" not in text


@pytest.mark.parametrize(
    ("lift", "words"),
    [
        (1.02, "no more than magnitude alone explains (1.02 times)"),
        (1.4, "1.40 times what magnitude alone explains"),
        (0.8, "less than magnitude alone would give (0.80 times)"),
    ],
)
def test_overlap_is_judged_by_the_magnitude_matched_null(lift: float, words: str) -> None:
    # Far above the uniform null in every case: that alone says nothing.
    cells = cell("as_written"), cell("seed", label="another seed")
    text = said("overlap", *cells, overlaps=[pair("seed", lift=2.5, magnitude_lift=lift)])
    assert "With another seed, 60.0 % of the recipe's mask are in the other" in text
    assert words in text


def test_which_mask_says_that_random_masks_recovered_too() -> None:
    cells = [
        cell("as_written", 0.53),
        cell("final", 0.55, versus=0.53, mask=mask()),
        cell("uniform", 0.54, versus=0.53, mask=mask()),
        cell("principal", 0.3, versus=0.53, mask=mask(verdict="not_recovered")),
        cell("fisher", 0.5, versus=0.53, mask=mask(verdict="undecided")),
    ]
    text = said("which_mask", *cells)
    assert "2 of 4 masks recovered the full run's accuracy: final; uniform." in text
    assert "1 of 4 masks stayed below it by more than the margin: principal." in text
    assert "1 of 4 masks are undecided: fisher." in text
    assert "so did the uniform control of its size: on this task accuracy alone does not show" in text
    assert "The highest accuracy, 55.0 %, is that of `final`" in text
    assert "The best of 4 runs is partly luck." in text


def test_which_mask_names_no_best_where_several_are() -> None:
    cells = [cell("as_written", 0.53), *(cell(name, 0.5, versus=0.53, mask=mask()) for name in ("final", "uniform"))]
    assert "highest" not in said("which_mask", *cells)


def test_which_mask_without_accuracy_judges_nothing() -> None:
    text = said("which_mask", cell("as_written", None), cell("final", None, mask=mask()), base=None)
    assert text == "Accuracy was not measured, so that masks cannot be judged by it."


def test_early_mask_gives_recall_beside_that_of_a_random_mask() -> None:
    cells = [
        cell("as_written", 0.53),
        cell("step_1", 0.3, mask=mask(0.02, "not_recovered", step=1, recall=0.1, precision=0.8)),
        cell("step_20", 0.5, mask=mask(0.15, "undecided", step=20, recall=0.91, precision=0.9)),
    ]
    matched = said("early_mask", cells[0], cell("step_1", 0.3, mask=mask(0.02, step=1, magnitude_recall=0.055)))
    assert "would hold 2.0 %, one matched on magnitude 5.5 %)" in matched
    text = said("early_mask", *cells)
    assert (
        "Step 1 of 40: 2.0 % of the weights had changed. They hold 10.0 % of the final mask (a random mask of" in text
    )
    assert "Training them alone: not recovered." in text
    assert "The first mask that holds 90 % of the final one is that of step 20." in text
    assert "No early mask" in said("early_mask", *cells[:2])


def test_sparsity_ranks_no_algorithms() -> None:
    def traits(*, on_policy: bool) -> Traits:
        return Traits(on_policy=on_policy, kl=False, online=on_policy, learns_from="prompts")

    cells = [
        cell("as_written", label="grpo", changed=0.3, traits=traits(on_policy=True)),
        cell("dpo", changed=0.1, traits=traits(on_policy=False)),
        cell("sft", changed=0.9, traits=traits(on_policy=False)),
    ]
    text = said("sparsity", *cells)
    assert "between 10.0 % (sft) and 90.0 % (dpo)" in text
    assert "these figures do not rank algorithms" in text
    assert "with off-policy 10.0 % to 90.0 %: the two overlap, so that it does not decide alone" in text


def test_gaps_name_seeds_failures_and_unpaired_runs() -> None:
    def found(result: StudyReport) -> str:
        return " ".join(gaps(result))

    one = found(report("causes", cell("as_written"), cell("kl_on", 0.5, versus=0.5)))
    assert "every run has seed 0" in one
    assert "no correction is made for the number of runs" in one
    assert "one thing changed at a time" in one
    other = report("overlap", cell("as_written"), cell("data", 0.4, seed=1), cell("x", None, failure="it diverged"))
    text = found(other)
    assert "every setting was run once, with one seed" in text
    assert "Paired differences of data: they were judged on other prompts." in text
    assert "`x`: it diverged." in text
    assert "Accuracy: evaluation is off." in found(report("causes", cell("as_written", None), base=None))


def test_which_mask_puts_recall_beside_both_nulls_and_says_where_density_is_from() -> None:
    source = cell("predicted", 0.5, versus=0.53, group="other source", mask=mask(0.1, magnitude_recall=0.18))
    result = report("which_mask", cell("as_written", 0.53), source)
    text = " ".join(answers(result))
    assert "predicted 20.0 % (a random mask 10.0 %, one matched on magnitude 18.0 %)." in text
    assert any("get the final mask's density, which only the finished full run tells" in gap for gap in gaps(result))
