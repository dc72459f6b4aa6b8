"""Evidence from masks and weights: overlaps, structure, spectra, changes against changes, the floor, the course."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.evidence.dynamics import DYNAMICS, Dynamics, read_dynamics
from subnet_ft.evidence.floor import Floor, floor
from subnet_ft.evidence.overlap import MaskOverlap, overlap_matrix
from subnet_ft.evidence.scatter import Scatter, weight_scatter
from subnet_ft.evidence.spectra import Spectra, delta_spectra
from subnet_ft.evidence.structure import Structure, mask_structure
from subnet_ft.evidence.weights import RunWeights
from subnet_ft.evidence_stages.stage import EvidenceFolder
from subnet_ft.inputs import RunInputs
from subnet_ft.masks import SubnetMask, control_mask, extract
from subnet_ft.trained_runs import TrainedRuns
from subnet_ft.verification import compare_dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Overlaps:
    """Every pair of a run's masks."""

    pairs: list[MaskOverlap] = field(default_factory=list)


@dataclass(frozen=True)
class _Scatter:
    """Changes of a run against the full run's; `None` where the full run changed nothing."""

    counts: Scatter | None


class WeightEvidence:
    """Compares the masks and the checkpoints of a run.

    Args:
        inputs: The recipe with its base.
        runs: What was trained.
        folder: Where the evidence lies.
        progress: Show progress bars on stderr.
    """

    def __init__(self, inputs: RunInputs, runs: TrainedRuns, folder: EvidenceFolder, *, progress: bool) -> None:
        self.inputs = inputs
        self.runs = runs
        self.folder = folder
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
        """Compare every two masks of the run; figures of single tensors stay in the stage's file.

        Runs that train under one mask, such as the repeats of one from a file, count once: what a mask shares with
        itself says nothing.
        """
        runs = {"subnet": self.runs.subnet, **self.runs.controls}
        runs |= {
            f"seed-{seed}/subnet": stages["subnet"] for seed, stages in self.runs.repeats.items() if "subnet" in stages
        }
        masks: dict[str, SubnetMask] = {}
        names: dict[str, str] = {}
        for name, run in runs.items():
            assert run.mask is not None
            first = names.setdefault(run.mask.fingerprint, name)
            if first == name:
                masks[name] = run.mask
            else:
                logger.info("overlaps: %s trained under the mask of %s, which is compared once", name, first)
        if len(masks) == 1:
            return []
        inputs = {name: mask.fingerprint for name, mask in masks.items()}
        found = self.folder.once(
            "overlaps",
            _Overlaps,
            {"base": self.inputs.base_sha256, "masks": inputs},
            lambda: _Overlaps(overlap_matrix(masks, self.inputs.base, progress=self.progress)),
            version=1,
        )
        return [replace(pair, by_tensor={}) for pair in found.pairs]

    def structure(self) -> Structure:
        """Say how the mask spreads over rows, columns and heads; figures of single tensors stay in the stage's file."""
        # One that was not trained follows from base, mask and seed: it need not be drawn to see that nothing changed.
        trained = self.runs.controls.get("control-magnitude_matched")
        found = self.folder.once(
            "structure",
            Structure,
            {
                "base": self.inputs.base_sha256,
                "mask": self.mask.fingerprint,
                "control": None if trained is None or trained.mask is None else trained.mask.fingerprint,
                "seed": self.inputs.recipe.seed,
            },
            lambda: mask_structure(
                self.mask, config=self.inputs.base.config, control=self.matched, progress=self.progress
            ),
            version=1,
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
        return self.folder.once(
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
            version=1,
        )

    def scatter(self) -> Scatter | None:
        """Count what subnetwork and controls changed against what the full run changed."""
        recipe, full = self.inputs.recipe, self.runs.full
        runs = {name: run for name, run in self.runs.masked.items() if name != "full"}
        inputs = {name: run.results["sha256"] for name, run in self.runs.masked.items()}

        def work() -> _Scatter:
            return _Scatter(
                weight_scatter(
                    self.inputs.base,
                    open_checkpoint(full.folder),
                    {name: RunWeights(open_checkpoint(run.folder), run.mask) for name, run in runs.items()},
                    dtype=compare_dtype(self.inputs.base, recipe),
                    progress=self.progress,
                )
            )

        inputs = {"base": self.inputs.base_sha256, **inputs}
        return self.folder.once("scatter", _Scatter, inputs, work, version=1).counts

    def dynamics(self) -> dict[str, Dynamics]:
        """Read what the runs noted of their course, where the recipe asks for it.

        It is noted while a run trains: one that was finished before the recipe asked has nothing, or what an earlier
        recipe asked for, and a warning says so.
        """
        every = self.inputs.recipe.evidence.dynamics_steps
        if every is None:
            return {}
        found = {}
        for name, run in self.runs.masked.items():
            noted = None
            if (run.folder / DYNAMICS).is_file():
                found[name] = read_dynamics(run.folder)
                noted = found[name].every
            if noted != every:
                was = "nothing of its steps was noted" if noted is None else f"its steps were noted every {noted}"
                logger.warning(
                    "dynamics: `evidence.dynamics_steps` is %d, but when `%s` was trained, %s. Remove `%s` to train it "
                    "again; `--overwrite` keeps it, as its weights would be the same.",
                    every, name, was, run.folder,
                )  # fmt: skip
        return found

    def floor(self, records: Mapping[str, list[dict[str, Any]] | None]) -> Floor | None:
        """Compare the full run with the first that was repeated with another seed; `None` without one.

        Args:
            records: What every model answered, by name.
        """
        recipe = self.inputs.recipe
        if not self.runs.repeats:
            return None
        seed, stages = next(iter(self.runs.repeats.items()))
        full, second = self.runs.full, stages["full"]
        dtype = compare_dtype(self.inputs.base, recipe)
        names = ("full", f"seed-{seed}/full")

        def work() -> Floor:
            first, other = open_checkpoint(full.folder), open_checkpoint(second.folder)
            masks = {
                name: extract(self.inputs.base, checkpoint, dtype=dtype)
                for name, checkpoint in zip(names, (first, other), strict=True)
            }
            (overlap,) = overlap_matrix(masks, self.inputs.base, progress=self.progress)
            return floor(
                self.inputs.base,
                first,
                other,
                seeds=(recipe.seed, seed),
                overlap=replace(overlap, by_tensor={}),
                records=records.get(names[0]),
                second_records=records.get(names[1]),
                dtype=dtype,
                confidence=recipe.evaluation.confidence,
            )

        inputs = {
            "base": self.inputs.base_sha256,
            "full": full.results["sha256"],
            "second": second.results["sha256"],
            "correct": [[entry["correct"] for entry in records.get(name) or ()] for name in names],
            "confidence": recipe.evaluation.confidence,
        }
        return self.folder.once("floor", Floor, inputs, work, version=1)
