"""The study of overlap: what differs between its runs, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from subnet_ft.errors import SubnetError
from subnet_ft.studies.plans import plan_study


def test_plan_overlap_changes_seed_data_and_algorithm_apart_and_together(tmp_path: Path) -> None:
    plan = plan_study("overlap", "tiny/grpo", [f"output={tmp_path}", "seed=7"])
    found = {cell.name: cell for cell in plan.cells}
    own, seed, data, both = (found[name] for name in ("as_written", "seed", "data", "seed_and_data"))
    # The recipe's seed draws the data; the cell's is that of training.
    assert (seed.recipe.seed, seed.seed) == (7, 8)
    assert (data.recipe.seed, data.seed) == (8, 7)
    assert (both.recipe.seed, both.seed) == (8, None)
    assert own.recipe.output == seed.recipe.output != data.recipe.output
    algorithms = [cell.recipe.algorithm for cell in plan.cells[4:]]
    assert algorithms == ["ppo", "dpo", "dpo"]
    assert found["dpo_seed_and_data"].recipe.seed == 8
    assert found["dpo"].recipe.seed == found["ppo"].recipe.seed == 7


def test_plan_overlap_needs_the_mask_of_a_full_run(tmp_path: Path) -> None:
    source = "subnet.source={kind: predicted, density: 0.1}"
    with pytest.raises(SubnetError, match=r"`subnet\.source\.kind` is `predicted`"):
        plan_study("overlap", "tiny/grpo", [f"output={tmp_path}", source])


def test_plan_overlap_of_a_reward_model_keeps_to_one_base(tmp_path: Path) -> None:
    # The new head is drawn with the recipe's seed; masks of two heads are masks of two bases.
    plan = plan_study("overlap", "tiny/reward", [f"output={tmp_path}", "seed=7"])
    assert [cell.name for cell in plan.cells] == ["as_written", "seed"]
    assert {cell.recipe.seed for cell in plan.cells} == {7}
    assert any(note.startswith("Other data: ") and "another base" in note for note in plan.notes)
