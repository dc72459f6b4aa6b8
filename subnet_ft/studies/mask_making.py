"""Makes the masks of a study's cells, each a stage, and puts them beside the final mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.errors import MaskError, MaskMismatchError, OptimizerStateError
from subnet_ft.inputs import RunVariant
from subnet_ft.masks import SubnetMask, TensorMask, base_mask, control_mask
from subnet_ft.recipe.mask_schema import CHOSEN
from subnet_ft.stages import run_stage
from subnet_ft.studies.measures import changed_mask
from subnet_ft.verification import compare_dtype

if TYPE_CHECKING:
    from subnet_ft.pipeline import Pipeline
    from subnet_ft.studies.plan import Cell


class NoSuchMask(Exception):
    """This final mask has no mask of this kind; the argument says why."""


def mask_of(cell: Cell, pipeline: Pipeline, final: SubnetMask, folder: Path) -> SubnetMask:
    """Return the mask of a cell, which may be empty for one that was made early.

    Args:
        cell: A cell with a mask.
        pipeline: Of its recipe.
        final: What the recipe's full run changed.
        folder: Of the stages that make it.

    Raises:
        NoSuchMask: The final mask is too sparse to be thinned so far, or too dense for this control, or the
            source cannot be read.
    """
    plan = cell.mask
    assert plan is not None
    wanted = plan.density or (plan.source.density if plan.source is not None else None)
    if wanted is not None and wanted >= final.density:
        raise NoSuchMask(f"the final mask's density is {final.density:.2g}, which is not above {wanted:g}")
    if plan.source is None:
        return _of_final(cell, pipeline, final, folder)
    source = plan.source
    if source.kind in CHOSEN and source.density is None:
        source = replace(source, density=final.density)
    if source.kind == "early":
        probe = pipeline.probe(RunVariant(stop_after=source.steps))
        return changed_mask(pipeline, probe, folder / "early", source)[0]
    try:
        return pipeline.masks.of_source(source, f"{cell.stage}-mask", user=cell.stage)
    except MaskMismatchError:
        raise
    except (MaskError, OptimizerStateError) as error:
        raise NoSuchMask(f"its mask cannot be made. {error}".rstrip(".")) from error


def beside_final(cell: Cell, mask: SubnetMask, final: SubnetMask) -> dict[str, Any]:
    """Return the fields of a `MaskResult` that need no run; those that do are `None`."""
    both = (final & mask).num_trainable
    source = cell.mask.source if cell.mask is not None else None
    return {
        "density": mask.density,
        "num_trainable": mask.num_trainable,
        "recall": both / final.num_trainable if final.num_trainable else None,
        "precision": both / mask.num_trainable if mask.num_trainable else None,
        "step": source.steps if source is not None and source.kind == "early" else None,
        "changed_share": None,
        "in_mask_identical": None,
        "relative_distance": None,
    }


def _of_final(cell: Cell, pipeline: Pipeline, final: SubnetMask, folder: Path) -> SubnetMask:
    """Return the final mask, thinned at random if the plan says so, or a control of that."""
    plan = cell.mask
    assert plan is not None
    if plan.density is None and plan.control is None:
        return final
    base, seed = pipeline.inputs.base, pipeline.recipe.seed
    path = folder / "mask" / "mask.subnet.safetensors"

    def work(_: Path) -> dict[str, Any]:
        mask = final
        if plan.density is not None:
            dtype = compare_dtype(base, pipeline.recipe)
            mask = final & base_mask(base, "uniform", density=plan.density / final.density, seed=seed, dtype=dtype)
        if plan.control is not None:
            if plan.control == "inverted":
                mask = _invertible(mask)
            try:
                mask = control_mask(mask, plan.control, seed=seed, weights=base.tensors())
            except MaskMismatchError:
                raise
            except MaskError as error:
                raise NoSuchMask(f"it has no such control. {error}".rstrip(".")) from error
        mask.save(path)
        return {}

    inputs = {"final": final.fingerprint, "density": plan.density, "control": plan.control, "seed": seed}
    run_stage(folder / "mask", inputs, work, overwrite=True, cheap=True, products=[path])
    return SubnetMask.load(path)


def _invertible(mask: SubnetMask) -> SubnetMask:
    """Leave out the tensors that are more than half dense: as many weights do not lie outside.

    That is a norm of a few hundred weights now and then, and no reason to go without the control.
    """
    nothing = torch.empty(0, dtype=torch.uint8)
    tensors = {
        name: tensor if 2 * tensor.count <= tensor.num_elements else TensorMask(nothing, tensor.shape, 0)
        for name, tensor in mask.tensors.items()
    }
    return SubnetMask(tensors, mask.provenance)
