"""What a recipe may ask for as a mask and as evidence, and what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_texts import GRPO, REWARD, load_text, problems_of

SOURCE = "subnet.source="


@pytest.mark.parametrize(
    "source",
    [
        "{kind: early, steps: 5}",
        "{kind: early, steps: 5, criterion: absolute, tolerance: 1e-5}",
        "{kind: forecast, steps: 3, density: 0.2}",
        "{kind: forecast, steps: 3}",
        "{kind: fisher, steps: 3, density: 0.2}",
        "{kind: low_magnitude, density: 0.2}",
        "{kind: uniform, density: 0.001}",
    ],
)
def test_load_recipe_allows_every_kind_of_source(tmp_path: Path, source: str) -> None:
    assert load_text(tmp_path, GRPO, SOURCE + source).subnet.source.kind in source


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (
            "{kind: early}",
            "subnet.source.steps: missing; `kind: early` needs how many steps of the full run to look at",
        ),
        (
            "{kind: extract, steps: 3}",
            "subnet.source.steps: not used by `kind: extract`, only by `early`, `forecast`, `gradient`, `fisher`; "
            "remove it",
        ),
        (
            "{kind: predicted}",
            "subnet.source.density: missing; `kind: predicted` needs the share of the weights to train",
        ),
        (
            "{kind: early, steps: 3, density: 0.1}",
            "subnet.source.density: not used by `kind: early`, only by `forecast`, `gradient`, `fisher`, "
            "`low_magnitude`, `predicted`, `principal`, `non_principal`, `uniform`; remove it",
        ),
        ("{kind: uniform, density: 1.0}", "subnet.source.density: must be > 0 and < 1, got 1.0"),
        (
            "{kind: uniform, density: 0.1, criterion: absolute}",
            "subnet.source.criterion: `kind: uniform` compares nothing; remove `criterion` and `tolerance`",
        ),
        (
            "{kind: uniform, density: 0.1, path: x}",
            'subnet.source.path: only for `kind: file`, got "x" with `kind: uniform`',
        ),
    ],
)
def test_load_recipe_refuses_fields_that_its_source_does_not_use(tmp_path: Path, source: str, problem: str) -> None:
    assert problems_of(tmp_path, GRPO, SOURCE + source) == [problem]


def test_load_recipe_refuses_a_probe_as_long_as_the_run(tmp_path: Path) -> None:
    assert problems_of(tmp_path, GRPO, "training.max_steps=5", SOURCE + "{kind: early, steps: 5}") == [
        "subnet.source.steps: must be < training.max_steps (5), got 5; the whole run's mask is `kind: extract`"
    ]
    assert load_text(tmp_path, GRPO, "training.max_steps=6", SOURCE + "{kind: early, steps: 5}")


@pytest.mark.parametrize(
    ("kind", "optimizer", "reason"),
    [
        *[
            (kind, f"name: {name}", f"reads AdamW's fp32 moments after the first steps, and `subnet.optimizer.name` is "
             f"{name}, which keeps none; use `adamw`, or `kind: early`")
            for kind in ("forecast", "gradient", "fisher")
            for name in ("sgd", "adamw_8bit")
        ],
        ("forecast", "master: none", "needs to know how far weights have drifted since they were rounded, and "
         "`subnet.optimizer.master` is none; use `fp32` or `remainder`, or `kind: early`"),
    ],
)  # fmt: skip
def test_load_recipe_refuses_a_source_whose_moments_its_optimizer_does_not_keep(
    tmp_path: Path, kind: str, optimizer: str, reason: str
) -> None:
    source = f"{SOURCE}{{kind: {kind}, steps: 3, density: 0.2}}"
    problems = problems_of(tmp_path, GRPO, source, f"subnet.optimizer={{{optimizer}}}")
    assert problems == [f"subnet.source.kind: `{kind}` {reason}"]


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("forecast", "master: remainder"),
        ("gradient", "master: none"),
        ("fisher", "master: remainder"),
        ("early", "name: sgd"),
        ("early", "master: none"),
    ],
)
def test_load_recipe_allows_an_optimizer_that_keeps_what_its_source_reads(
    tmp_path: Path, kind: str, optimizer: str
) -> None:
    density = "" if kind == "early" else ", density: 0.2"
    source = f"{SOURCE}{{kind: {kind}, steps: 3{density}}}"
    assert load_text(tmp_path, GRPO, source, f"subnet.optimizer={{{optimizer}}}").subnet.source.kind == kind


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("baselines=[full]", "baselines: `full` is part of every run; remove it"),
        ("baselines=[lorra]", "baselines: `lorra` is not a method; did you mean `lora`?"),
        ("baselines=[lora, lora]", "baselines: `lora` is listed 2 times; once is enough"),
        ("repeats.seeds=[0]", "repeats.seeds: 0 is the recipe's own `seed`; choose another one"),
        ("repeats.seeds=[3, 3]", "repeats.seeds: 3 is listed 2 times; once is enough"),
        ("repeats={runs: half}", 'repeats.runs: must be one of full, subnet, all, got "half"'),
        (
            "evaluation.retention={tasks: [{name: reasoning_gym/chain_sum}]}",
            "evaluation.retention.tasks[0].num_eval: missing, must be >= 1",
        ),
        (
            "evaluation.retention={tasks: [{name: reasoning_gym/chain_sum, num_eval: 3, answer_pattern: '('}]}",
            "evaluation.retention.tasks[0].answer_pattern: not a regular expression "
            '(missing ), unterminated subpattern at position 0), got "("',
        ),
        (
            "evaluation={enabled: false, retention: {}}",
            "evaluation.retention: not measured with `evaluation.enabled: false`; remove one of them",
        ),
        ("evidence.spectra=some", 'evidence.spectra: must be one of none, sampled, all, got "some"'),
        ("evidence.dynamics_steps=0", "evidence.dynamics_steps: must be >= 1, got 0"),
    ],
)
def test_load_recipe_refuses_evidence_that_cannot_be(tmp_path: Path, override: str, problem: str) -> None:
    assert problems_of(tmp_path, GRPO, override) == [problem]


def test_load_recipe_measures_no_retention_of_a_reward_model(tmp_path: Path) -> None:
    assert problems_of(tmp_path, REWARD, "evaluation.retention={}") == [
        "evaluation.retention: not used by `reward`, whose model does not write; remove it"
    ]
