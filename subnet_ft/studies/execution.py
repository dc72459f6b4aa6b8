"""Runs the cells of a study one after the other; what is finished is not repeated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import subnet_ft
from subnet_ft.errors import NonFiniteGradientError, StageError
from subnet_ft.evidence.overlap import MaskOverlap, overlap_matrix
from subnet_ft.evidence.report.build import (
    RunEvidence,
    accuracy_of,
    difference_of,
    plain,
    solved_prompts,
    title_of,
    what_was_judged,
)
from subnet_ft.evidence.report.schema import Difference
from subnet_ft.evidence.statistics import paired_difference
from subnet_ft.evidence.verdict import verdict
from subnet_ft.inputs import RunVariant
from subnet_ft.masks import SubnetMask, base_mask, control_mask
from subnet_ft.pipeline import Pipeline
from subnet_ft.recipe import SourceSpec, recipe_to_dict
from subnet_ft.recipe.mask_schema import CHOSEN
from subnet_ft.stages import TrainedStage, run_stage
from subnet_ft.studies.measures import changed_mask, data_loss, late_reward, weights_under_mask
from subnet_ft.studies.names import QUESTIONS
from subnet_ft.studies.plan import Cell, Plan
from subnet_ft.studies.schema import CellResult, MaskResult, StudyReport
from subnet_ft.studies.sparsity import traits_of
from subnet_ft.studies.timing import Clock
from subnet_ft.studies.wording import answers, gaps
from subnet_ft.verification import compare_dtype

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class _Done:
    """A finished cell."""

    cell: Cell
    run: TrainedStage | None
    records: Records | None
    mask: SubnetMask | None
    changed: dict[str, float]
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

    def run(self) -> StudyReport:
        """Do every cell that is not done yet, and return what they say together."""
        own = self._pipeline(self.plan.cells[0])
        self.base_records = own.answers("base")
        num_parameters = sum(math.prod(spec.shape) for spec in own.inputs.base.specs.values())
        clock = Clock(self.plan, num_parameters)
        clock.announce()
        for cell in self.plan.cells:
            clock.begin(cell)
            try:
                self._done[cell.name] = self._masked(cell) if cell.mask is not None else self._full(cell)
            except NonFiniteGradientError as error:
                # A cause may well be too much for the model; that is a result of this cell, not the end of the others.
                self._done[cell.name] = _Done(cell, None, None, None, {}, failure=f"it diverged: {error}")
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
        return _Done(cell, run, pipeline.answers(cell.stage, run), mask, changed)

    def _masked(self, cell: Cell) -> _Done:
        assert cell.mask is not None
        full = next(done.run for done in self._done.values() if done.cell.mask is None)
        assert full is not None
        pipeline = self._pipeline(cell)
        final = pipeline.mask(full)
        plan = cell.mask
        wanted = plan.density or (plan.source.density if plan.source is not None else None)
        if wanted is not None and wanted >= final.density:
            reason = f"the final mask's density is {final.density:.2g}, which is not above {wanted:g}"
            return _Done(cell, None, None, None, {}, failure=reason)
        if plan.control is not None and plan.density is None:
            run = pipeline.control_run(plan.control, final)
        else:
            mask = self._mask(cell, pipeline, final)
            if not mask.num_trainable:
                return _Done(cell, None, None, mask, {}, failure="its mask is empty: nothing had changed by then")
            run = pipeline.masked_run(cell.stage, mask)
        return _Done(cell, run, pipeline.answers(cell.stage, run), run.mask, {})

    def _mask(self, cell: Cell, pipeline: Pipeline, final: SubnetMask) -> SubnetMask:
        plan = cell.mask
        assert plan is not None
        if plan.source is not None:
            source = plan.source
            if source.kind in CHOSEN and source.density is None:
                source = replace(source, density=final.density)
            if source.kind == "early":
                assert source.steps is not None
                probe = pipeline.probe(RunVariant(stop_after=source.steps))
                return changed_mask(pipeline, probe, self._measured(cell) / "early", source)[0]
            return pipeline.masks.of_source(source, f"{cell.stage}-mask", user=cell.stage)
        return final if plan.density is None else self._thinned(cell, pipeline, final)

    def _thinned(self, cell: Cell, pipeline: Pipeline, final: SubnetMask) -> SubnetMask:
        """Return the final mask thinned at random, or a control of that."""
        plan = cell.mask
        assert plan is not None
        assert plan.density is not None
        base, seed, density = pipeline.inputs.base, pipeline.recipe.seed, plan.density
        folder = self._measured(cell) / "mask"
        path = folder / "thinned.subnet.safetensors"

        def work(_: Path) -> dict[str, Any]:
            dtype = compare_dtype(base, pipeline.recipe)
            kept = base_mask(base, "uniform", density=density / final.density, seed=seed, dtype=dtype)
            thinned = final & kept
            if plan.control is not None:
                thinned = control_mask(thinned, plan.control, seed=seed, weights=base.tensors())
            thinned.save(path)
            return {}

        inputs = {"final": final.fingerprint, "density": density, "control": plan.control, "seed": seed}
        run_stage(folder, inputs, work, overwrite=True, cheap=True, products=[path])
        return SubnetMask.load(path)

    def _report(self, own: Pipeline) -> StudyReport:
        recipe = self.plan.recipe
        confidence = recipe.evaluation.confidence
        cells = [self._result(own, done) for done in self._done.values()]
        overlaps = self._overlaps(own) if self.plan.study == "overlap" else []
        base = _solved(self.base_records)
        judged_on = what_was_judged([RunEvidence("base", records=self.base_records)])
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
            environment=plain(trained.results["environment"]),
            recipe=plain(recipe_to_dict(recipe)),
            seed=recipe.seed,
            not_measured=[],
            overlaps=overlaps,
            judged_on=judged_on,
        )
        return replace(report, answers=answers(report), not_measured=[*self.plan.notes, *gaps(report)])

    def _result(self, own: Pipeline, done: _Done) -> CellResult:
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
            mask=self._mask_result(own, done),
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

    def _mask_result(self, own: Pipeline, done: _Done) -> MaskResult | None:
        if done.cell.mask is None or done.mask is None:
            return None
        full = next(found for found in self._done.values() if found.cell.mask is None)
        assert full.run is not None
        final, mask, source = own.mask(full.run), done.mask, done.cell.mask.source
        both = (final & mask).num_trainable
        spec = self.plan.recipe.evaluation
        judged = verdict(
            _solved(self.base_records),
            _solved(full.records),
            _solved(done.records),
            margin=spec.margin,
            confidence=spec.confidence,
            subject="run",
        )
        weights = {"changed_share": None, "in_mask_identical": None, "relative_distance": None}
        if done.run is not None:
            found = weights_under_mask(own, full.run, done.run, self._measured(done.cell) / "weights")
            if found["off_mask_changed"]:
                raise StageError(
                    f"{found['off_mask_changed']:,} weights outside the mask of `{done.cell.name}` changed: this was "
                    "no run under its mask. Please report it."
                )
            weights = {name: found[name] for name in weights}
        return MaskResult(
            density=mask.density,
            num_trainable=mask.num_trainable,
            recall=both / final.num_trainable if final.num_trainable else None,
            precision=both / mask.num_trainable if mask.num_trainable else None,
            step=source.steps if source is not None and source.kind == "early" else None,
            verdict=judged.name,
            verdict_reason=judged.reason,
            **weights,
        )

    def _overlaps(self, own: Pipeline) -> list[MaskOverlap]:
        masks = {name: done.mask for name, done in self._done.items() if done.mask is not None}
        if len(masks) < 2:
            return []
        found = overlap_matrix(masks, own.inputs.base, progress=self.progress)
        return [replace(pair, by_tensor={}) for pair in found]


def _solved(records: Records | None) -> NDArray[np.bool_] | None:
    return None if records is None else solved_prompts(RunEvidence("", records=records))
