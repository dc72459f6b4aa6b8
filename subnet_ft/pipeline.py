"""The main job: full run, mask, subnetwork run, controls, evaluation, report; each a stage in the run's folder."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subnet_ft.base_stage import make_base
from subnet_ft.delta_stage import delta_path, with_delta
from subnet_ft.digests import checkpoint_sha256, json_sha256
from subnet_ft.environment import environment
from subnet_ft.errors import StageError
from subnet_ft.evidence.plain import from_plain
from subnet_ft.evidence.report import Report, write_report
from subnet_ft.evidence.retention import read_paragraphs
from subnet_ft.held_out import HeldOut, HeldOutPairs, held_out, judge
from subnet_ft.inputs import AS_WRITTEN, RunInputs, RunVariant
from subnet_ft.mask_stages import MASK_SUFFIX, MaskStages
from subnet_ft.masks import SubnetMask, control_mask
from subnet_ft.methods.check import check_method
from subnet_ft.methods.config_check import method_problems
from subnet_ft.methods.masks import method_mask
from subnet_ft.processes import everywhere, first_alone, is_first
from subnet_ft.recipe import MethodSpec, Recipe, load_recipe, save_recipe
from subnet_ft.recipe.methods import METHODS
from subnet_ft.run_report import run_report
from subnet_ft.stages import TrainedStage, finished_results, read_json, run_stage, write_json
from subnet_ft.trained_runs import TrainedRuns
from subnet_ft.training import config_fields, train
from subnet_ft.training.config_check import config_problems
from subnet_ft.training.platform_check import platform_problems
from subnet_ft.training.resume import remove_checkpoints
from subnet_ft.training.run import LOG, TRAINER
from subnet_ft.training_data import training_dataset
from subnet_ft.verification import compare_dtype

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.resolved.yaml"

_WITHOUT_MASK = {"mask": "every weight", "adapter": "added weights"}


def load_checked_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, methods: Sequence[str] = (), quantizations: Sequence[str] = ()
) -> Recipe:
    """Load a recipe with its `training` section checked against the config of its algorithm.

    Args:
        path: As in `load_recipe`.
        overrides: As in `load_recipe`.
        methods: What will be trained, so that what the machine lacks for it is known; the recipe's `method` if empty.
        quantizations: Of copies that will be judged; likewise.
    """
    return load_recipe(
        path,
        overrides,
        algorithms=config_fields(),
        check_config=config_problems,
        check_methods=partial(method_problems, compared=methods),
        check_machine=partial(platform_problems, methods=methods, quantizations=quantizations),
    )


class Pipeline:
    """The stages of one recipe in its output folder.

    Every stage is done at most once for the same inputs; an interrupted one continues.

    Args:
        recipe: The recipe.
        overwrite: Replace stages that were made with other settings, instead of refusing.
        progress: Show progress bars on stderr.
    """

    def __init__(self, recipe: Recipe, *, overwrite: bool = False, progress: bool = False) -> None:
        self.recipe = recipe
        self.inputs = RunInputs(recipe)
        self.folder = Path(recipe.output)
        self.overwrite = overwrite
        self.progress = progress

    def run(self) -> Report:
        """Do every stage that is not done yet, and write the report."""
        self.start()
        for name in self.recipe.baselines:
            check_method(name, self.recipe, self.inputs.base)
        _ = self.held_out  # too few pairs to judge by are better known before hours of training
        full = self.full_run()
        mask = self.mask(full)
        if "inverted" in self.recipe.controls:
            control_mask(mask, "inverted", seed=self.recipe.seed)  # a mask that has none is better known now
        subnet = self.masked_run("subnet", mask)
        controls = {f"control-{kind}": self.control_run(kind, mask) for kind in self.recipe.controls}
        baselines = {name: self.method_run(name) for name in self.recipe.baselines}
        repeats = {seed: self.repeat(seed) for seed in self.recipe.repeats.seeds}
        probe = self.masks.probe_of(self.recipe.subnet.source)
        return self.report(TrainedRuns(full, subnet, controls, baselines, repeats, probe))

    def train(self) -> TrainedStage:
        """Do the one run that the recipe's `method` names."""
        self.start()
        check_method(self.recipe.method, self.recipe, self.inputs.base)
        return self.method_run(self.recipe.method)

    def start(self) -> None:
        """Read and check what the stages need."""
        first_alone("folder of the run", lambda: self.folder.mkdir(parents=True, exist_ok=True))
        make_base(self.inputs, self.folder, overwrite=self.overwrite)

        def check() -> None:
            self.inputs.check()
            if self.recipe.evaluation.retention is not None:
                read_paragraphs(self.recipe.evaluation.retention.text)

        # On every machine one process downloads and builds, before the others read.
        everywhere("inputs", check, in_turn=True)

    @cached_property
    def dataset(self) -> Dataset:
        """What the algorithm's trainer reads."""
        return training_dataset(self.inputs, self.folder, overwrite=self.overwrite, progress=self.progress)

    @cached_property
    def held_out(self) -> HeldOut | None:
        """What every model is judged on; `None` when evaluation is off."""
        return held_out(self.inputs, self.folder, overwrite=self.overwrite, progress=self.progress)

    def full_run(self) -> TrainedStage:
        """Train every weight."""
        return self._train("full", None, "full")

    def masked_run(self, name: str, mask: SubnetMask, variant: RunVariant = AS_WRITTEN) -> TrainedStage:
        """Train the weights of `mask` from the base, with everything else as in the full run."""
        stage = self._train(name, mask, "subnet", variant)
        return with_delta(stage, self.inputs.base, progress=self.progress) if name == "subnet" else stage

    def method_run(self, method: str) -> TrainedStage:
        """Train what a method trains, with its settings, in a stage of its name."""
        if method == "full":
            return self.full_run()
        if method == "subnet":
            return self.masked_run("subnet", self._mask_of_finished())
        if METHODS[method].trains == "adapter":
            return self._train(method, None, method)
        dtype = compare_dtype(self.inputs.base, self.recipe)
        settings = self.recipe.methods.get(method, MethodSpec())
        return self._train(method, method_mask(method, self.inputs.base, settings.config, dtype=dtype), method)

    def _mask_of_finished(self) -> SubnetMask:
        if self.recipe.subnet.source.kind != "extract":
            return self.masks.of_source(self.recipe.subnet.source)
        results = finished_results(self.folder / "full", self._training_inputs(None, "full"))
        if results is None:
            raise StageError(
                f"`method: subnet` extracts its mask from the full run, and `{self.folder / 'full'}` holds no finished "
                "one of this recipe. Train with `method=full` first, or choose another `subnet.source.kind`."
            )
        return self.mask(self._checked("full", None, results))

    def mask(self, full: TrainedStage) -> SubnetMask:
        """Make the subnetwork's mask, or load the one that the recipe names."""
        source = self.recipe.subnet.source
        return self.masks.extracted(full) if source.kind == "extract" else self.masks.of_source(source)

    @cached_property
    def masks(self) -> MaskStages:
        """Makes this run's masks."""
        return MaskStages(self.inputs, self.folder, self.probe, overwrite=self.overwrite, progress=self.progress)

    def repeat(self, seed: int) -> dict[str, TrainedStage]:
        """Do with another seed of training what the recipe repeats; stages have the names of the first seed's."""
        variant, within, what = RunVariant(seed=seed), f"seed-{seed}/", self.recipe.repeats.runs
        stages = {"full": self._train(f"{within}full", None, "full", variant)}
        if what == "full":
            return stages
        source, named = self.recipe.subnet.source, {"name": f"{within}mask", "user": f"{within}subnet"}
        if source.kind == "extract":
            mask = self.masks.extracted(stages["full"], **named)
        else:
            mask = self.masks.of_source(source, seed=seed, **named)
        stages["subnet"] = self.masked_run(f"{within}subnet", mask, variant)
        if what == "all":
            for kind in self.recipe.controls:
                stages[f"control-{kind}"] = self.control_run(kind, mask, within=within, variant=variant)
        return stages

    def probe(self, variant: RunVariant) -> TrainedStage:
        """Do the first steps of a full run, and keep its trainer checkpoint with the optimizer's state."""
        seed = "" if variant.seed is None else f"seed-{variant.seed}/"
        what = "probe-at-base" if variant.at_base else "probe"
        return self._train(f"{seed}{what}-{variant.stop_after}", None, "full", variant)

    def control_run(
        self, kind: str, mask: SubnetMask, *, within: str = "", variant: RunVariant = AS_WRITTEN
    ) -> TrainedStage:
        """Draw a control of the mask's size and train it.

        Args:
            kind: Of the control.
            mask: What it is a control of.
            within: Prefix of the stage's name.
            variant: How the run departs from the recipe; its seed is that of the draw, too.
        """
        control = control_mask(mask, kind, seed=variant.of(self.recipe).seed, weights=self.inputs.base.tensors())
        name = f"{within}control-{kind}"
        stage = self.masked_run(name, control, variant)
        first_alone(f"mask of {name}", lambda: str(control.save(self.folder / f"{name}{MASK_SUFFIX}")))
        return stage

    def answers(
        self, name: str, run: TrainedStage | None = None, *, quantization: str | None = None
    ) -> list[dict[str, Any]] | None:
        """Judge a model on the held-out prompts or pairs; `None` when evaluation is off.

        Args:
            name: Of its stage; `base` for the base model.
            run: The stage that trained it; `None` for the base.
            quantization: Judge a copy whose weights are quantized like this, those of an adapter excepted.
        """
        judged_on = self.held_out
        if judged_on is None:
            return None
        folder, sha256 = self.inputs.base.folder, self.inputs.base_sha256
        if run is not None:
            folder, sha256 = run.folder, run.results["sha256"]

        def work(stage: Path) -> dict[str, Any]:
            records = judge(folder, self.inputs, judged_on, quantization=quantization, progress=self.progress)
            write_json(stage / "records.json", records)
            return {"accuracy": sum(record["correct"] for record in records) / len(records)}

        if isinstance(judged_on, HeldOutPairs):
            logger.info("evaluate %s: %d held-out pairs", name, len(judged_on.rows))
            inputs = self.inputs.of_choices(sha256, judged_on.rows)
        else:
            logger.info("evaluate %s: greedy answers to %d held-out prompts", name, len(judged_on.evaluation))
            inputs = self.inputs.of_answers(sha256)
        if quantization is not None:
            name, inputs = f"{name}-{quantization}", {**inputs, "quantization": quantization}
        stage = self.folder / "evaluation" / name
        path = stage / "records.json"
        run_stage(stage, inputs, work, overwrite=self.overwrite, cheap=True, products=[path])
        records: list[dict[str, Any]] = json.loads(path.read_text())
        return records

    def report(self, runs: TrainedRuns) -> Report:
        """Evaluate every model, gather the evidence, and write the report's three files."""
        records = {"base": self.answers("base"), **{name: self.answers(name, run) for name, run in runs.all.items()}}
        notes = self.held_out.not_measured if isinstance(self.held_out, HeldOutPairs) else ()

        def write() -> None:
            logger.info("verify: comparing weights")
            report = run_report(
                self.inputs,
                self.folder,
                runs,
                records,
                not_measured=notes,
                overwrite=self.overwrite,
                progress=self.progress,
            )
            self._describe(runs.full)
            write_report(report, self.folder)

        first_alone("report", write)
        return from_plain(Report, read_json(self.folder / "report.json"))

    def _train(self, name: str, mask: SubnetMask | None, method: str, variant: RunVariant = AS_WRITTEN) -> TrainedStage:
        folder = self.folder / name

        def work(folder: Path) -> dict[str, Any]:
            if is_first():
                save_recipe(variant.of(self.recipe), folder / RECIPE_FILE)
            if is_first() and name == "subnet":  # an older run's delta does not stand beside this one's checkpoint
                delta_path(folder).unlink(missing_ok=True)
            run = train(
                variant.of(self.recipe),
                base=self.inputs.base.folder,
                folder=folder,
                mask=mask,
                method=method,
                dataset=self.dataset,
                task=self.inputs.data.task if self.inputs.needs_rewards else None,
                teacher=None if self.inputs.teacher is None else self.inputs.teacher.folder,
                stop_after=variant.stop_after,
                progress=self.progress and is_first(),
            )
            gc.collect()
            return {
                "sha256": first_alone(f"digest of {name}", lambda: checkpoint_sha256(folder)),
                "density": run.num_trainable / run.num_parameters,
                "num_trainable": run.num_trainable,
                "num_parameters": run.num_parameters,
                "train_seconds": run.seconds,
                "step_seconds": run.step_seconds,
                "num_steps": run.num_steps,
                "resumed_from": run.resumed_from,
                "memory": run.memory,
                "environment": environment(),
            }

        what = _WITHOUT_MASK[METHODS[method].trains]
        if mask is not None:
            what = f"{mask.num_trainable:,} of {mask.num_parameters:,} weights"
        logger.info("%s: %s on %s", name, self.recipe.algorithm, what)
        inputs = self._training_inputs(mask, method, variant)
        products = [folder / LOG]
        if variant.stop_after is not None:
            products.append(folder / TRAINER / f"checkpoint-{variant.stop_after}")
        results = run_stage(folder, inputs, work, overwrite=self.overwrite, products=products, together=True)
        stage = self._checked(name, mask, results)
        first_alone(f"tidying of {name}", lambda: self._tidy(stage, variant))
        return stage

    def _tidy(self, stage: TrainedStage, variant: RunVariant) -> None:
        if not self.recipe.keep_checkpoints and variant.stop_after is None:
            # Only now: while `stage.json` was not there, the run might have had to resume.
            remove_checkpoints(stage.folder / TRAINER)
        if not (self.folder / RECIPE_FILE).exists():
            self._describe(stage)

    def _checked(self, name: str, mask: SubnetMask | None, results: dict[str, Any]) -> TrainedStage:
        """Return a finished stage after its checkpoint was compared with what the stage saved."""
        folder = self.folder / name
        if first_alone(f"check of {name}", lambda: checkpoint_sha256(folder)) != results["sha256"]:
            raise StageError(
                f"The checkpoint in `{folder}` is not the one that this stage saved. Remove the folder to train again."
            )
        return TrainedStage(folder, mask, results)

    def _training_inputs(
        self, mask: SubnetMask | None, method: str, variant: RunVariant = AS_WRITTEN
    ) -> dict[str, Any]:
        known = self.inputs.learns_from == "prompts" or self.inputs.data.rows is not None
        made = {} if known else {"rows": json_sha256(self.dataset)}
        return {**self.inputs.of_training(mask, method, variant), **made}

    def _describe(self, stage: TrainedStage) -> None:
        """Write down what this folder holds: at its first stage, and when all stages have accepted the recipe."""
        save_recipe(self.recipe, self.folder / RECIPE_FILE)
        write_json(self.folder / "environment.json", stage.results["environment"])
