"""The evidence beside accuracy and weights, each piece a stage of the run: made once while its inputs stay the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.digests import json_sha256
from subnet_ft.evidence.agreement import Agreement, agreement
from subnet_ft.evidence.dynamics import Dynamics, read_dynamics
from subnet_ft.evidence.floor import Floor, floor
from subnet_ft.evidence.overlap import MaskOverlap, overlap_matrix
from subnet_ft.evidence.plain import from_plain
from subnet_ft.evidence.retention import Retention, read_paragraphs, retention
from subnet_ft.evidence.seeds import SeedSummary, summarize_seeds
from subnet_ft.evidence.spectra import Spectra, delta_spectra
from subnet_ft.evidence.structure import Structure, mask_structure
from subnet_ft.inputs import RunInputs
from subnet_ft.masks import SubnetMask, control_mask, extract
from subnet_ft.methods.saved import load_trained
from subnet_ft.stages import TrainedStage, read_json, run_stage, write_json
from subnet_ft.tasks import Task, load_task
from subnet_ft.trained_runs import TrainedRuns
from subnet_ft.verification import compare_dtype

logger = logging.getLogger(__name__)

FOLDER = "evidence"
FOUND = "found.json"

T = TypeVar("T")
Records: TypeAlias = Mapping[str, list[dict[str, Any]] | None]


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
        records: What every model answered to the held-out prompts, by name; `None` where evaluation is off.
        overwrite: Passed on to the stages, all of which are cheap.
        progress: Show progress bars on stderr.
    """

    def __init__(
        self,
        inputs: RunInputs,
        folder: Path,
        runs: TrainedRuns,
        records: Records,
        *,
        overwrite: bool,
        progress: bool,
    ) -> None:
        self.inputs = inputs
        self.folder = folder
        self.runs = runs
        self.records = records
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

    def dynamics(self) -> dict[str, Dynamics]:
        """Read what the runs noted of their course, where the recipe asked for it."""
        found = {name: read_dynamics(run.folder) for name, run in self.runs.masked.items()}
        return {name: entry for name, entry in found.items() if entry is not None}

    def agreement(self) -> dict[str, Agreement]:
        """Compare the outputs of base, subnetwork, controls and baselines with the full run's."""
        recipe, full = self.inputs.recipe, self.records.get("full")
        count = recipe.evaluation.agreement_prompts
        if not full or not count or self.inputs.has_new_head:
            return {}
        found = {}
        for name, run in self._others.items():
            own = self.records.get(name)
            if own:
                found[name] = self._agreement(name, run, full[:count], own[:count])
        return found

    def _agreement(
        self, name: str, run: TrainedStage | None, full: list[dict[str, Any]], own: list[dict[str, Any]]
    ) -> Agreement:
        recipe = self.inputs.recipe

        def work() -> Agreement:
            reference, tokenizer = self._loaded(self.runs.full)
            return agreement(
                reference,
                self._loaded(run)[0],
                tokenizer,
                [record["prompt"] for record in full],
                [record["completion"] for record in full],
                [record["completion"] for record in own],
                confidence=recipe.evaluation.confidence,
                seed=recipe.seed,
                progress=self.progress,
            )

        inputs = {
            "full": self.runs.full.results["sha256"],
            "model": self._sha256(run),
            "load": self.inputs.of_loading(),
            "completions": json_sha256([[record["prompt"], record["completion"]] for record in [*full, *own]]),
            "confidence": recipe.evaluation.confidence,
            "seed": recipe.seed,
        }
        return self._once(f"agreement/{name}", Agreement, inputs, work)

    def retention(self) -> dict[str, Retention]:
        """Judge base, full run, subnetwork, controls and baselines on what was not trained; empty if not asked for."""
        recipe, spec = self.inputs.recipe, self.inputs.recipe.evaluation.retention
        if spec is None:
            return {}
        tasks: dict[str, Task] = {}
        for task in spec.tasks:
            name = task.name if task.name not in tasks else f"{task.name} ({len(tasks) + 1})"
            tasks[name] = load_task(task, seed=recipe.seed)
        paragraphs = read_paragraphs(spec.text)

        def judged(run: TrainedStage | None) -> Retention:
            base, tokenizer = self._loaded(None)
            return retention(
                base,
                None if run is None else self._loaded(run)[0],
                tokenizer,
                tasks,
                paragraphs,
                max_new_tokens=spec.max_new_tokens,
                max_tokens=spec.max_tokens,
                batch_size=recipe.evaluation.batch_size,
                confidence=recipe.evaluation.confidence,
                seed=recipe.seed,
                progress=self.progress,
            )

        inputs = {
            "base": self.inputs.base_sha256,
            "load": self.inputs.of_loading(),
            "spec": asdict(spec),
            "text": json_sha256(paragraphs),
            "batch_size": recipe.evaluation.batch_size,
            "confidence": recipe.evaluation.confidence,
            "seed": recipe.seed,
        }
        runs = {"full": self.runs.full, **self._others}
        return {
            name: self._once(
                f"retention/{name}", Retention, {**inputs, "model": self._sha256(run)}, partial(judged, run)
            )
            for name, run in runs.items()
        }

    def floor(self) -> Floor | None:
        """Compare the full run with the first that was repeated with another seed; `None` without one."""
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
                records=self.records.get(names[0]),
                second_records=self.records.get(names[1]),
                dtype=dtype,
                confidence=recipe.evaluation.confidence,
            )

        inputs = {
            "base": self.inputs.base_sha256,
            "full": full.results["sha256"],
            "second": second.results["sha256"],
            "correct": [[entry["correct"] for entry in self.records.get(name) or ()] for name in names],
            "confidence": recipe.evaluation.confidence,
        }
        return self._once("floor", Floor, inputs, work)

    def seeds(self) -> list[SeedSummary]:
        """Sum up the subnetwork and every control that was repeated, over all seeds."""
        recipe = self.inputs.recipe
        solved: dict[str, NDArray[np.bool_]] = {}
        for name, records in self.records.items():
            if records:
                solved[name] = np.array([bool(record["correct"]) for record in records], dtype=np.bool_)
        summaries = []
        for run in ("subnet", *self.runs.controls):
            names = {recipe.seed: run, **{seed: f"seed-{seed}/{run}" for seed in self.runs.repeats}}
            full = {seed: name[: len(name) - len(run)] + "full" for seed, name in names.items()}
            if len(names) < 2 or not {"base", *names.values(), *full.values()} <= solved.keys():
                continue
            summaries.append(
                summarize_seeds(
                    run,
                    solved["base"],
                    {seed: solved[name] for seed, name in full.items()},
                    {seed: solved[name] for seed, name in names.items()},
                    margin=recipe.evaluation.margin,
                    confidence=recipe.evaluation.confidence,
                )
            )
        return summaries

    @property
    def _others(self) -> dict[str, TrainedStage | None]:
        """The models that are put beside the full run, by name; the base is `None`."""
        return {"base": None, "subnet": self.runs.subnet, **self.runs.controls, **self.runs.baselines}

    def _sha256(self, run: TrainedStage | None) -> str:
        return self.inputs.base_sha256 if run is None else str(run.results["sha256"])

    def _loaded(self, run: TrainedStage | None) -> tuple[Any, Any]:
        base = self.inputs.base.folder
        return load_trained(base if run is None else run.folder, base, **self.inputs.of_loading())

    def _once(self, name: str, kind: type[T], inputs: dict[str, Any], work: Callable[[], T]) -> T:
        stage = self.folder / FOLDER / name

        def do(folder: Path) -> dict[str, Any]:
            logger.info("evidence: %s", name)
            write_json(folder / FOUND, asdict(work()))  # type: ignore[call-overload]  # every kind is a dataclass
            return {}

        run_stage(stage, inputs, do, overwrite=self.overwrite, cheap=True, products=[stage / FOUND])
        return from_plain(kind, read_json(stage / FOUND))
