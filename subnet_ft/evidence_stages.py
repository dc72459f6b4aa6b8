"""The evidence beside accuracy and weights, each piece a stage of the run: made once while its inputs stay the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.evidence.overlap import MaskOverlap, overlap_matrix
from subnet_ft.evidence.plain import from_plain
from subnet_ft.evidence.spectra import Spectra, delta_spectra
from subnet_ft.evidence.structure import Structure, mask_structure
from subnet_ft.inputs import RunInputs
from subnet_ft.masks import SubnetMask, control_mask
from subnet_ft.stages import read_json, run_stage, write_json
from subnet_ft.trained_runs import TrainedRuns
from subnet_ft.verification import compare_dtype

logger = logging.getLogger(__name__)

FOLDER = "evidence"
FOUND = "found.json"

T = TypeVar("T")


@dataclass(frozen=True)
class _Overlaps:
    """Every pair of a run's masks."""

    pairs: list[MaskOverlap] = field(default_factory=list)


class EvidenceStages:
    """Gathers what a report shows beside accuracy and weights.

    Args:
        inputs: The recipe with its base.
        folder: The run's folder.
        runs: What was trained.
        overwrite: Passed on to the stages, all of which are cheap.
        progress: Show progress bars on stderr.
    """

    def __init__(self, inputs: RunInputs, folder: Path, runs: TrainedRuns, *, overwrite: bool, progress: bool) -> None:
        self.inputs = inputs
        self.folder = folder
        self.runs = runs
        self.overwrite = overwrite
        self.progress = progress

    @cached_property
    def mask(self) -> SubnetMask:
        """The subnetwork's mask."""
        mask = self.runs.subnet.mask
        assert mask is not None
        return mask

    @cached_property
    def matched(self) -> SubnetMask:
        """The magnitude-matched control's mask, drawn where it was not trained."""
        trained = self.runs.controls.get("control-magnitude_matched")
        if trained is not None and trained.mask is not None:
            return trained.mask
        recipe = self.inputs.recipe
        return control_mask(self.mask, "magnitude_matched", seed=recipe.seed, weights=self.inputs.base.tensors())

    def overlaps(self) -> list[MaskOverlap]:
        """Compare every two masks of the run; figures of single tensors stay in the stage's file."""
        masks = {"subnet": self.mask}
        masks |= {name: run.mask for name, run in self.runs.controls.items() if run.mask is not None}
        for seed, stages in self.runs.repeats.items():
            if "subnet" in stages and stages["subnet"].mask is not None:
                masks[f"seed-{seed}/subnet"] = stages["subnet"].mask
        if len(masks) == 1:
            return []
        inputs = {name: mask.fingerprint for name, mask in masks.items()}
        found = self._once(
            "overlaps",
            _Overlaps,
            {"base": self.inputs.base_sha256, "masks": inputs},
            lambda: _Overlaps(overlap_matrix(masks, self.inputs.base, progress=self.progress)),
        )
        return [replace(pair, by_tensor={}) for pair in found.pairs]

    def structure(self) -> Structure:
        """Say how the mask spreads over rows, columns and heads; figures of single tensors stay in the stage's file."""
        found = self._once(
            "structure",
            Structure,
            {"mask": self.mask.fingerprint, "seed": self.inputs.recipe.seed},
            lambda: mask_structure(
                self.mask, config=self.inputs.base.config, control=self.matched, progress=self.progress
            ),
        )
        control = None if found.control is None else replace(found.control, tensors={})
        return replace(found, tensors={}, control=control)

    def spectra(self) -> Spectra | None:
        """Decompose what the full run added to its base; `None` where the recipe asks for none."""
        recipe, which = self.inputs.recipe, self.inputs.recipe.evidence.spectra
        if which == "none":
            return None
        full = self.runs.full
        dtype = compare_dtype(self.inputs.base, recipe)
        return self._once(
            "spectra",
            Spectra,
            {"base": self.inputs.base_sha256, "full": full.results["sha256"], "which": which, "seed": recipe.seed},
            lambda: delta_spectra(
                self.inputs.base,
                open_checkpoint(full.folder),
                which=which,
                dtype=dtype,
                seed=recipe.seed,
                progress=self.progress,
            ),
        )

    def _once(self, name: str, kind: type[T], inputs: dict[str, Any], work: Callable[[], T]) -> T:
        stage = self.folder / FOLDER / name

        def do(folder: Path) -> dict[str, Any]:
            logger.info("evidence: %s", name)
            write_json(folder / FOUND, asdict(work()))  # type: ignore[call-overload]  # every kind is a dataclass
            return {}

        run_stage(stage, inputs, do, overwrite=self.overwrite, cheap=True, products=[stage / FOUND])
        return from_plain(kind, read_json(stage / FOUND))
