"""Runs the cells of a study one after the other; what is finished is not repeated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import subnet_ft
from subnet_ft.errors import NonFiniteGradientError, StageError
from subnet_ft.evidence.overlap import MaskOverlap, overlap_matrix
from subnet_ft.evidence.plain import as_json
from subnet_ft.evidence.report.answers import accuracy_of, difference_of, solved_prompts, what_was_judged
from subnet_ft.evidence.report.build import title_of
from subnet_ft.evidence.report.run_evidence import RunEvidence
from subnet_ft.evidence.report.schema import Difference
from subnet_ft.evidence.statistics import paired_difference
from subnet_ft.evidence.verdict import verdict
from subnet_ft.masks import SubnetMask
from subnet_ft.pipeline import Pipeline
from subnet_ft.recipe import SourceSpec, recipe_to_dict
from subnet_ft.stages import TrainedStage
from subnet_ft.studies.mask_making import NoSuchMask, beside_final, mask_of
from subnet_ft.studies.measures import changed_mask, data_loss, late_reward, magnitude_recall, weights_under_mask
from subnet_ft.studies.names import QUESTIONS
from subnet_ft.studies.plan import Cell, Plan
from subnet_ft.studies.schema import CellResult, MaskResult, StudyReport
from subnet_ft.studies.sparsity import traits_of
from subnet_ft.studies.timing import Clock
from subnet_ft.studies.wording import answers, gaps

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class _Done:
    """A finished cell; a failure says why it has no run."""

    cell: Cell
    run: TrainedStage | None = None
    records: Records | None = None
    changed: dict[str, float] = field(default_factory=dict)
    mask: dict[str, Any] | None = None
    failure: str | None = None


class Study:
    """Runs a plan and puts its cells beside each other.

    Args:
        plan: The cells.
        overwrite: Replace stages that were made with other settings, instead of refusing.
        progress: Show progress bars on stderr.
    """

    def __init__(self, plan: Plan, *, overwrite: bool = False, progress: bool = False) -> None:
        self.plan = plan
        self.overwrite = overwrite
        self.progress = progress
        self._done: dict[str, _Done] = {}
        self._pipelines: dict[str, Pipeline] = {}
        self._final_mask: SubnetMask | None = None
        self._masks: dict[str, SubnetMask] = {}
        self._base_records: Records | None = None

    def run(self) -> StudyReport:
        """Do every cell that is not done yet, and return what they say together.

        Raises:
            NonFiniteGradientError: The recipe's own full run diverged; another cell that does is a line of the result.
        """
        own = self._pipeline(self.plan.cells[0])
        self._base_records = own.answers("base")
        num_parameters = sum(math.prod(spec.shape) for spec in own.inputs.base.specs.values())
        clock = Clock(self.plan, num_parameters)
        clock.announce()
        for cell in self.plan.cells:
            clock.begin(cell)
            try:
                self._done[cell.name] = self._masked(cell) if cell.mask is not None else self._full(cell)
            except NonFiniteGradientError as error:
                if cell is self.plan.cells[0]:
                    raise NonFiniteGradientError(
                        f"The recipe's own full run diverged, and the study `{self.plan.study}` compares every other "
                        f"run with it. Lower `training.learning_rate`. {error}"
                    ) from error
                # A cause may well be too much for the model; that is a result of this cell, not the end of the others.
                self._done[cell.name] = _Done(cell, failure=f"it diverged: {error}")
            clock.end(cell)
        return self._report(own)

    def _pipeline(self, cell: Cell) -> Pipeline:
        """Return the pipeline of a cell's recipe; cells of one folder share it."""
        folder = cell.recipe.output
        if folder not in self._pipelines:
            pipeline = Pipeline(cell.recipe, overwrite=self.overwrite, progress=self.progress)
            pipeline.start()
            self._pipelines[folder] = pipeline
        return self._pipelines[folder]

    def _measured(self, cell: Cell) -> Path:
        return self.plan.folder / "measured" / cell.name

    def _full(self, cell: Cell) -> _Done:
        pipeline = self._pipeline(cell)
        run = pipeline.full_run() if cell.seed is None else pipeline.repeat(cell.seed)["full"]
        # Overlaps are those of the masks that would be trained; elsewhere any changed bit counts.
        source = self.plan.recipe.subnet.source if self.plan.study == "overlap" else SourceSpec()
        mask, changed = changed_mask(pipeline, run, self._measured(cell) / "changed", source)
        if self.plan.study == "overlap":
            self._masks[cell.name] = mask
        return _Done(cell, run, pipeline.answers(cell.stage, run), changed)

    def _masked(self, cell: Cell) -> _Done:
        full = next(done.run for done in self._done.values() if done.cell.mask is None)
        assert full is not None
        pipeline, final = self._pipeline(cell), self._final(full)
        try:
            mask = mask_of(cell, pipeline, final, self._measured(cell))
        except NoSuchMask as reason:
            return _Done(cell, failure=str(reason))
        figures = beside_final(cell, mask, final)
        figures["magnitude_recall"] = magnitude_recall(pipeline, final, mask, self._measured(cell) / "magnitude")
        if not mask.num_trainable:
            return _Done(cell, mask=figures, failure="its mask is empty: nothing had changed by then")
        run = pipeline.masked_run(cell.stage, mask)
        found = weights_under_mask(pipeline, full, run, self._measured(cell) / "weights")
        if found["off_mask_changed"]:
            raise StageError(
                f"{found['off_mask_changed']:,} weights outside the mask of `{cell.name}` changed: this was no run "
                "under its mask. Please report it."
            )
        figures |= {name: found[name] for name in ("changed_share", "in_mask_identical", "relative_distance")}
        # One bit per weight and cell would add up.
        return _Done(cell, replace(run, mask=None), pipeline.answers(cell.stage, run), mask=figures)

    def _final(self, full: TrainedStage) -> SubnetMask:
        """Return the mask of the recipe's full run, extracted or read once."""
        if self._final_mask is None:
            self._final_mask = self._pipeline(self.plan.cells[0]).mask(full)
        return self._final_mask

    def _report(self, own: Pipeline) -> StudyReport:
        recipe = self.plan.recipe
        confidence = recipe.evaluation.confidence
        cells = [self._result(done) for done in self._done.values()]
        overlaps = self._overlaps(own) if self._masks else []
        base = _solved(self._base_records)
        judged_on = what_was_judged([RunEvidence("base", records=self._base_records)])
        trained = next(done.run for done in self._done.values() if done.run is not None)
        report = StudyReport(
            version=subnet_ft.__version__,
            study=self.plan.study,
            question=QUESTIONS[self.plan.study],
            title=title_of(recipe_to_dict(recipe)),
            answers=[],
            confidence=confidence,
            margin=recipe.evaluation.margin,
            num_prompts=0 if base is None else len(base),
            base=None if base is None else accuracy_of(base, confidence),
            cells=cells,
            environment=as_json(trained.results["environment"]),
            recipe=as_json(recipe_to_dict(recipe)),
            seed=recipe.seed,
            not_measured=[],
            overlaps=overlaps,
            judged_on=judged_on,
        )
        return replace(report, answers=answers(report), not_measured=[*self.plan.notes, *gaps(report)])

    def _result(self, done: _Done) -> CellResult:
        cell, run, recipe = done.cell, done.run, done.cell.recipe
        confidence = self.plan.recipe.evaluation.confidence
        solved = _solved(done.records)
        results = {} if run is None else run.results
        return CellResult(
            name=cell.name,
            label=cell.label,
            group=cell.group,
            settings=list(cell.settings),
            versus=cell.versus,
            algorithm=recipe.algorithm,
            model=recipe.model.name,
            dtype=recipe.model.dtype,
            seed=recipe.seed if cell.seed is None else cell.seed,
            learning_rate=recipe.training.get("learning_rate"),
            num_steps=results.get("num_steps", 0),
            num_trainable=results.get("num_trainable", 0),
            num_parameters=results.get("num_parameters", 0),
            train_seconds=results.get("train_seconds"),
            resumed_from=results.get("resumed_from"),
            failure=done.failure,
            changed=done.changed,
            accuracy=None if solved is None else accuracy_of(solved, confidence),
            difference=self._difference(done),
            reward=None if run is None else late_reward(run.folder),
            data_loss=data_loss(self._pipeline(cell), self._measured(cell) / "data") if cell.measure_data else None,
            traits=traits_of(recipe) if self.plan.study == "sparsity" else None,
            mask=self._mask_result(done),
        )

    def _difference(self, done: _Done) -> Difference | None:
        other = self._done.get(done.cell.versus or "")
        if other is None or done.records is None or other.records is None:
            return None
        ours, theirs = _solved(done.records), _solved(other.records)
        asked = [[record["prompt"] for record in records] for records in (done.records, other.records)]
        if ours is None or theirs is None or asked[0] != asked[1]:
            return None
        paired = paired_difference(ours, theirs, confidence=self.plan.recipe.evaluation.confidence)
        return difference_of(done.cell.name, other.cell.name, paired)

    def _mask_result(self, done: _Done) -> MaskResult | None:
        if done.mask is None:
            return None
        full = next(found for found in self._done.values() if found.cell.mask is None)
        spec = self.plan.recipe.evaluation
        judged = verdict(
            _solved(self._base_records),
            _solved(full.records),
            _solved(done.records),
            margin=spec.margin,
            confidence=spec.confidence,
            subject="run",
        )
        return MaskResult(**done.mask, verdict=judged.name, verdict_reason=judged.reason)

    def _overlaps(self, own: Pipeline) -> list[MaskOverlap]:
        if len(self._masks) < 2:
            return []
        found = overlap_matrix(self._masks, own.inputs.base, progress=self.progress)
        return [replace(pair, by_tensor={}) for pair in found]


def _solved(records: Records | None) -> NDArray[np.bool_] | None:
    return None if records is None else solved_prompts(RunEvidence("", records=records))
