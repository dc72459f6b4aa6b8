"""The studies of masks: every source and control, a sweep of densities, and the steps of early masks."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from study_runs import plan_of

from subnet_ft.errors import SubnetError
from subnet_ft.recipe.mask_schema import Control
from subnet_ft.studies.masks import DENSITIES


def test_plan_which_mask_has_every_control_every_source_and_the_sweep(tmp_path: Path) -> None:
    plan = plan_of("which_mask", tmp_path, "training.max_steps=30")
    names = [cell.name for cell in plan.cells]
    assert names[:2] == ["as_written", "final"]
    assert set(get_args(Control)) <= set(names)
    assert {"predicted", "early", "forecast", "gradient", "fisher"} <= set(names)
    for density in DENSITIES:
        kinds = ("final", "uniform", "magnitude_matched", "predicted", "forecast", "gradient")
        assert {f"{kind}_{density:g}" for kind in kinds} <= set(names)
    assert len(names) == len(set(names)) == 2 + 7 + 5 + 6 * len(DENSITIES)
    assert 0.001 in DENSITIES
    settings = {cell.name: cell.settings for cell in plan.cells}
    for kind in ("predicted", "forecast", "gradient", "fisher"):
        assert "at the final mask's density" in settings[kind]
    assert "at the final mask's density" not in (*settings["early"], *settings["predicted_0.01"])
    early = next(cell for cell in plan.cells if cell.name == "early")
    assert early.mask is not None
    assert early.mask.source is not None
    # A fifth of the run and at most five steps, which the cell pays for.
    assert early.mask.source.steps == 5
    assert early.num_steps == 35
    short = next(cell for cell in plan_of("which_mask", tmp_path).cells if cell.name == "forecast")
    assert short.num_steps == 8 + 1


def test_plan_which_mask_shares_stages_with_a_run(tmp_path: Path) -> None:
    stages = {cell.name: cell.stage for cell in plan_of("which_mask", tmp_path).cells}
    assert stages["as_written"] == "full"
    assert stages["final"] == "subnet"
    assert stages["magnitude_matched"] == "control-magnitude_matched"
    assert stages["uniform_0.01"] == "studies/masks/uniform_0.01"


def test_plan_early_mask_looks_at_one_step_an_eighth_a_quarter_and_a_half(tmp_path: Path) -> None:
    plan = plan_of("early_mask", tmp_path, "training.max_steps=40")
    assert [cell.name for cell in plan.cells] == [
        "as_written", "step_1", "step_5", "step_10", "step_20", "final", "uniform",
    ]  # fmt: skip
    first = plan.cells[1].mask
    assert first is not None
    assert first.source is not None
    # Compared as the recipe compares its final mask.
    assert (first.source.criterion, first.source.tolerance) == ("absolute", 0.004)


@pytest.mark.parametrize("study", ["which_mask", "early_mask"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.max_steps=-1", "needs a recipe that says how many steps it takes, at least 2: .*got -1"),
        ("subnet.source={kind: uniform, density: 0.1}", "the recipe's `subnet.source.kind` is `uniform`"),
    ],
)
def test_plans_of_masks_refuse_a_recipe_without_what_they_need(
    study: str, change: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SubnetError, match=message):
        plan_of(study, tmp_path, change)


def test_plan_which_mask_says_which_sources_the_optimizer_cannot_tell(tmp_path: Path) -> None:
    plan = plan_of("which_mask", tmp_path, "subnet.optimizer.master=none")
    names = {cell.name for cell in plan.cells}
    assert {"gradient", "fisher", "early"} <= names
    assert not {"forecast", "forecast_0.01", "forecast_0.001"} & names
    assert any("The masks forecast, forecast_0.01, forecast_0.001: `forecast` needs" in note for note in plan.notes)
    asked = plan.only(["predicted", "forecast"])
    assert [cell.name for cell in asked.cells] == ["as_written", "predicted"]
    with pytest.raises(SubnetError, match=r"`forecast` needs .*`subnet\.optimizer\.master` is none"):
        plan.only(["forecast"])
    sgd = plan_of("which_mask", tmp_path, "subnet.optimizer.name=sgd")
    assert not {"forecast", "gradient", "fisher", "gradient_0.01"} & {cell.name for cell in sgd.cells}
