"""Masks of a study's cells: thinned, inverted where that can be, refused with a reason where they cannot."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from study_runs import plan_of

from subnet_ft.errors import MaskError
from subnet_ft.masks import SubnetMask
from subnet_ft.pipeline import Pipeline
from subnet_ft.recipe import SourceSpec
from subnet_ft.recipe.mask_schema import Control
from subnet_ft.studies.mask_making import NoSuchMask, beside_final, mask_of
from subnet_ft.studies.plan import Cell, MaskPlan

DENSE = "model.norm.weight"


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    return next(cell for cell in plan_of("which_mask", tmp_path).cells if cell.name == "inverted")


@pytest.fixture
def pipeline(cell: Cell) -> Pipeline:
    return Pipeline(cell.recipe)


@pytest.fixture
def final(pipeline: Pipeline) -> SubnetMask:
    generator = torch.Generator().manual_seed(0)
    shares = {name: 0.8 if name == DENSE else 0.2 for name in pipeline.inputs.base.specs}
    return SubnetMask.from_dense(
        {
            name: torch.rand(tuple(spec.shape), generator=generator) < shares[name]
            for name, spec in pipeline.inputs.base.specs.items()
        }
    )


def control(cell: Cell, kind: Control, density: float | None = None) -> Cell:
    return dataclasses.replace(cell, mask=MaskPlan(control=kind, density=density))


def test_inverted_mask_leaves_out_tensors_that_have_no_inverse(
    cell: Cell, pipeline: Pipeline, final: SubnetMask, tmp_path: Path
) -> None:
    found = mask_of(cell, pipeline, final, tmp_path / "made")
    assert (found & final).num_trainable == 0
    counts = {name: tensor.count for name, tensor in found.tensors.items()}
    assert counts.pop(DENSE) == 0
    assert counts == {name: tensor.count for name, tensor in final.tensors.items() if name != DENSE}
    assert "without tensors that are more than half dense" in cell.settings


def test_control_that_cannot_be_is_refused_with_the_reason(
    cell: Cell, pipeline: Pipeline, final: SubnetMask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subnet_ft.studies.mask_making._invertible", lambda mask: mask)
    with pytest.raises(NoSuchMask, match=f"it has no such control. The mask holds .* of `{DENSE}`"):
        mask_of(cell, pipeline, final, tmp_path / "made")


def test_final_mask_is_thinned_only_to_less(cell: Cell, pipeline: Pipeline, final: SubnetMask, tmp_path: Path) -> None:
    with pytest.raises(NoSuchMask, match=r"the final mask's density is 0\.2, which is not above 0\.3"):
        mask_of(control(cell, "uniform", 0.3), pipeline, final, tmp_path / "made")
    thinned = mask_of(control(cell, "magnitude_matched", 0.01), pipeline, final, tmp_path / "made")
    assert thinned.density == pytest.approx(0.01, rel=0.25)


def test_beside_final_counts_what_two_masks_share(cell: Cell, final: SubnetMask) -> None:
    none, whole = final - final, final | ~final
    assert beside_final(cell, whole, final)["recall"] == 1.0
    assert beside_final(cell, whole, final)["precision"] == pytest.approx(final.density)
    assert beside_final(cell, none, final)["recall"] == 0.0
    assert beside_final(cell, none, final)["precision"] is None


def test_mask_that_its_source_cannot_make_is_refused_with_the_reason(
    cell: Cell, pipeline: Pipeline, final: SubnetMask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object, **__: object) -> SubnetMask:
        raise MaskError("The moments come without float32 masters.")

    monkeypatch.setattr("subnet_ft.mask_stages.MaskStages.of_source", unreadable)
    forecast = dataclasses.replace(cell, mask=MaskPlan(source=SourceSpec(kind="forecast", steps=1)))
    with pytest.raises(NoSuchMask, match=r"its mask cannot be made\. The moments come without float32 masters$"):
        mask_of(forecast, pipeline, final, tmp_path / "made")
