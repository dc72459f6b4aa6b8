"""The stages that make a run's masks: from a finished run, from its first steps, or from the base alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from subnet_ft.errors import StageError
from subnet_ft.inputs import RunInputs, RunVariant
from subnet_ft.masks import SubnetMask, base_mask, early_mask, extract
from subnet_ft.masks.forecast import forecast_mask
from subnet_ft.masks.gradients import gradient_mask
from subnet_ft.processes import first_alone
from subnet_ft.recipe import SourceSpec
from subnet_ft.stages import TrainedStage, check_known_inputs, read_json, run_stage
from subnet_ft.training.moments import read_moments
from subnet_ft.training.run import TRAINER
from subnet_ft.verification import compare_dtype

logger = logging.getLogger(__name__)

MASK_SUFFIX = ".subnet.safetensors"
MASK_FILE = f"mask{MASK_SUFFIX}"


class MaskStages:
    """Makes masks as stages of a run.

    Args:
        inputs: The recipe with its base.
        folder: The run's folder.
        probe: Does the first steps of a full run, and returns its stage.
        overwrite: Replace a mask that a subnetwork run has trained under.
        progress: Show progress bars on stderr.
    """

    def __init__(
        self,
        inputs: RunInputs,
        folder: Path,
        probe: Callable[[RunVariant], TrainedStage],
        *,
        overwrite: bool,
        progress: bool,
    ) -> None:
        self.inputs = inputs
        self.folder = folder
        self.probe = probe
        self.overwrite = overwrite
        self.progress = progress

    def extracted(self, full: TrainedStage, name: str = "mask", *, user: str = "subnet") -> SubnetMask:
        """Compare a finished full run with the base, by the recipe's criterion.

        Args:
            full: The run.
            name: Of the stage; the mask's file has the same.
            user: Stage that trains under the mask.

        Raises:
            StageError: The run changed nothing, or the mask's file is another one.
        """
        source = self.inputs.recipe.subnet.source
        inputs = {"full": full.results["sha256"], "source": _said(source)}
        return self._made(name, inputs, lambda: self._compared(full, source), user=user)

    def of_source(
        self,
        source: SourceSpec,
        name: str = "mask",
        *,
        user: str = "subnet",
        seed: int | None = None,
    ) -> SubnetMask:
        """Make a mask of a kind that needs no finished run.

        Args:
            source: Its kind and parameters.
            name: Of the stage; the mask's file has the same.
            user: Stage that trains under the mask.
            seed: Of the training whose first steps are looked at, and of a draw, if not the recipe's. A source that
                looks at nothing but the base or a file gives the same mask for every seed.

        Raises:
            StageError: The mask's stage was made with other settings, which is known before any step is trained.
        """
        if source.kind == "file":
            return self.inputs.mask_from_file()
        recipe, base = self.inputs.recipe, self.inputs.base
        dtype = compare_dtype(base, recipe)
        inputs: dict[str, Any] = {"source": _said(source)}
        if source.steps is None:
            assert source.density is not None  # the recipe was checked
            density = source.density
            # With the other kinds a seed only decides which of equal weights are taken: a repeat has the same mask.
            drawn_with = recipe.seed if seed is None or source.kind != "uniform" else seed
            inputs["seed"] = drawn_with
            return self._made(
                name,
                inputs,
                lambda: base_mask(
                    base, source.kind, density=density, seed=drawn_with, dtype=dtype, progress=self.progress
                ),
                user=user,
            )
        if not self.overwrite:
            self._check_used(name, {"base": self.inputs.base_sha256, **inputs}, user=user)
        stage = self.probe_of(source, seed=seed)
        assert stage is not None  # the source has steps
        inputs["probe"] = stage.results["sha256"]
        return self._made(name, inputs, lambda: self._probed(stage, source), user=user)

    def probe_of(self, source: SourceSpec, *, seed: int | None = None) -> TrainedStage | None:
        """Do the first steps of a full run that a source looks at; `None` where it looks at none."""
        if source.steps is None:
            return None
        # Large gradients at the base are those of a policy that stands still.
        at_base = source.kind in ("gradient", "fisher")
        return self.probe(RunVariant(seed=seed, stop_after=source.steps, at_base=at_base))

    def _probed(self, stage: TrainedStage, source: SourceSpec) -> SubnetMask:
        recipe, base = self.inputs.recipe, self.inputs.base
        dtype = compare_dtype(base, recipe)
        checkpoint = stage.folder / TRAINER / f"checkpoint-{source.steps}"
        if source.kind == "early":
            return early_mask(
                base,
                checkpoint,
                criterion=source.criterion,
                tolerance=source.tolerance,
                dtype=dtype,
                progress=self.progress,
            )
        moments = read_moments(checkpoint)
        if source.kind == "forecast":
            state = read_json(checkpoint / "trainer_state.json")
            assert state is not None  # the trainer has written it
            return forecast_mask(
                base, moments, total_steps=state["max_steps"], density=source.density, dtype=dtype, seed=recipe.seed
            )
        assert source.density is not None  # the recipe was checked
        return gradient_mask(base, moments, source.kind, density=source.density, dtype=dtype)

    def _compared(self, run: TrainedStage, source: SourceSpec) -> SubnetMask:
        logger.info("mask: comparing %s with its base", run.folder.name)
        return extract(
            self.inputs.base,
            run.folder,
            criterion=source.criterion,
            tolerance=source.tolerance,
            dtype=compare_dtype(self.inputs.base, self.inputs.recipe),
            progress=self.progress,
        )

    def _is_used(self, user: str) -> bool:
        """Whether a run is there whose mask belongs to it, and is not replaced without being asked."""
        return (self.folder / user).is_dir()

    def _check_used(self, name: str, known: dict[str, Any], *, user: str) -> None:
        def check() -> None:
            if self._is_used(user):
                check_known_inputs(self.folder / name, known)

        first_alone(f"use of {name}", check)

    def _made(self, name: str, inputs: dict[str, Any], make: Callable[[], SubnetMask], *, user: str) -> SubnetMask:
        path = self.folder / f"{name}{MASK_SUFFIX}"

        def work(folder: Path) -> dict[str, Any]:
            mask = make()
            if not mask.num_trainable:
                source = self.inputs.recipe.subnet.source
                raise StageError(
                    f"The run changed no weight by the criterion `{source.criterion}` with tolerance "
                    f"{source.tolerance:g}, so there is no subnetwork. Train longer or with a larger learning rate "
                    "(`training`), or lower `subnet.source.tolerance`."
                )
            mask.save(path)
            return {"fingerprint": mask.fingerprint, "density": mask.density}

        results = run_stage(
            self.folder / name,
            {"base": self.inputs.base_sha256, **inputs},
            work,
            overwrite=self.overwrite,
            cheap=not self._is_used(user),
            products=[path],
        )
        mask = SubnetMask.load(path)
        if mask.fingerprint != results["fingerprint"]:
            raise StageError(f"`{path}` is not the mask that this run made. Remove it to make it again.")
        return mask


def _said(source: SourceSpec) -> dict[str, Any]:
    """Return a source without the fields that its kind does not have."""
    return {key: value for key, value in asdict(source).items() if value is not None or key == "path"}
