"""The main job: full run, mask, subnetwork run, controls, evaluation, report; each a stage in the run's folder."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import subnet_ft
from subnet_ft.checkpoints import open_checkpoint, resolve_checkpoint
from subnet_ft.checkpoints.models import load_model
from subnet_ft.environment import environment
from subnet_ft.errors import StageError
from subnet_ft.evidence.report import Report, RunEvidence, build_report, write_report
from subnet_ft.evidence.weights import RunWeights, compare_weights
from subnet_ft.masks import SubnetMask, control_mask, extract
from subnet_ft.recipe import Recipe, load_recipe, recipe_to_dict, save_recipe
from subnet_ft.recipe.training import ALGORITHM_DATA
from subnet_ft.stages import read_json, run_stage, write_json
from subnet_ft.tasks import Task, load_task, preference_dataset, prompt_dataset, sample_pairs
from subnet_ft.training import config_fields, train
from subnet_ft.training.run import LOG, remove_checkpoints
from subnet_ft.verification import answer_prompts

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

MASK_FILE = "mask.subnet.safetensors"
RECIPE_FILE = "recipe.resolved.yaml"

# Fields that change what is seen of a run, not what it computes.
_ONLY_SHOWN = ("logging_steps", "logging_strategy", "report_to", "run_name", "disable_tqdm", "save_total_limit")


def load_checked_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe with its `training` section checked against the config of its algorithm."""
    return load_recipe(path, overrides, algorithms=config_fields())


@dataclass(frozen=True)
class TrainedStage:
    """A finished training stage: its folder, its mask (`None` for the full run) and what it measured."""

    folder: Path
    mask: SubnetMask | None
    results: dict[str, Any]


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
        self.folder = Path(recipe.output)
        self.overwrite = overwrite
        self.progress = progress

    def run(self) -> Report:
        """Do every stage that is not done yet, and write the report."""
        self.prepare()
        full = self.full_run()
        mask = self.mask(full)
        subnet = self.masked_run("subnet", mask)
        controls = {f"control-{kind}": self.control_run(kind, mask) for kind in self.recipe.controls}
        return self.report(full, subnet, controls)

    def train(self) -> TrainedStage:
        """Do the one run that the recipe's `method` names."""
        self.prepare()
        if self.recipe.method == "full":
            return self.full_run()
        if self.recipe.subnet.source.kind == "file":
            return self.masked_run("subnet", self._mask_from_file())
        if not (self.folder / MASK_FILE).is_file():
            raise StageError(
                f"`method: subnet` needs a mask, and `{self.folder / MASK_FILE}` does not exist. Use `subnet-ft run`, "
                "train with `method=full` first, or set `subnet.source.kind` to `file`."
            )
        return self.masked_run("subnet", SubnetMask.load(self.folder / MASK_FILE, base=self.base))

    def prepare(self) -> None:
        """Write down what is about to run, and on what."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_recipe(self.recipe, self.folder / RECIPE_FILE)
        write_json(self.folder / "environment.json", environment())

    @cached_property
    def base(self) -> Path:
        """Folder of the base checkpoint."""
        return resolve_checkpoint(self.recipe.model.name, revision=self.recipe.model.revision)

    @cached_property
    def base_sha256(self) -> str:
        """Digest of the base checkpoint's weights."""
        return weights_sha256(self.base)

    @cached_property
    def task(self) -> Task:
        """The training task; its examples are the same in every process."""
        return load_task(self.recipe.task, seed=self.recipe.seed)

    @cached_property
    def evaluation_task(self) -> Task:
        """The task of the held-out prompts."""
        spec = self.recipe.evaluation.task
        return self.task if spec is None else load_task(spec, seed=self.recipe.seed)

    @cached_property
    def dataset(self) -> Dataset:
        """What the algorithm's trainer reads: prompts, or preference pairs."""
        if ALGORITHM_DATA[self.recipe.algorithm] == "prompts":
            return prompt_dataset(self.task)
        if self.recipe.task.pairs is None:
            return preference_dataset(self.recipe.task, seed=self.recipe.seed)
        return self._sampled_pairs()

    def full_run(self) -> TrainedStage:
        """Train every weight."""
        return self._train("full", None)

    def masked_run(self, name: str, mask: SubnetMask) -> TrainedStage:
        """Train the weights of `mask` from the base, with everything else as in the full run."""
        return self._train(name, mask)

    def mask(self, full: TrainedStage) -> SubnetMask:
        """Make the subnetwork's mask, or load the one that the recipe names."""
        source = self.recipe.subnet.source
        if source.kind == "file":
            return self._mask_from_file()

        def work(folder: Path) -> dict[str, Any]:
            mask = extract(
                self.base, full.folder, criterion=source.criterion, tolerance=source.tolerance, progress=self.progress
            )
            if not mask.num_trainable:
                raise StageError(
                    f"The full run changed no weight by the criterion `{source.criterion}` with tolerance "
                    f"{source.tolerance:g}, so there is no subnetwork. Train longer or with a larger learning rate "
                    "(`training`), or lower `subnet.source.tolerance`."
                )
            mask.save(self.folder / MASK_FILE)
            return {"fingerprint": mask.fingerprint, "density": mask.density}

        self._announce("mask", "comparing the full run with its base")
        inputs = {"base": self.base_sha256, "full": full.results["sha256"], "source": asdict(source)}
        results = run_stage(self.folder / "mask", inputs, work, overwrite=self.overwrite, cheap=True)
        mask = SubnetMask.load(self.folder / MASK_FILE)
        if mask.fingerprint != results["fingerprint"]:
            raise StageError(
                f"`{self.folder / MASK_FILE}` is not the mask that this run extracted. Remove the folder "
                f"`{self.folder / 'mask'}` to extract it again."
            )
        return mask

    def control_run(self, kind: str, mask: SubnetMask) -> TrainedStage:
        """Draw a control of the mask's size and train it."""
        weights = open_checkpoint(self.base).tensors() if kind == "magnitude_matched" else None
        control = control_mask(mask, kind, seed=self.recipe.seed, weights=weights)
        control.save(self.folder / f"control-{kind}.subnet.safetensors")
        return self.masked_run(f"control-{kind}", control)

    def answers(self, name: str, folder: Path, sha256: str) -> list[dict[str, Any]] | None:
        """Answer the held-out prompts with the model in `folder`; `None` when evaluation is off."""
        spec = self.recipe.evaluation
        if not spec.enabled:
            return None

        def work(stage: Path) -> dict[str, Any]:
            records = answer_prompts(folder, self.recipe, self.evaluation_task, progress=self.progress)
            write_json(stage / "records.json", records)
            return {"accuracy": sum(record["correct"] for record in records) / len(records)}

        self._announce(f"evaluate {name}", f"greedy answers to {len(self.evaluation_task.evaluation)} held-out prompts")
        inputs = {
            "model": sha256,
            "dtype": self.recipe.model.dtype,
            "task": asdict(spec.task or self.recipe.task),
            "seed": self.recipe.seed,
            "max_new_tokens": spec.max_new_tokens,
            "batch_size": spec.batch_size,
        }
        stage = self.folder / "evaluation" / name
        run_stage(stage, inputs, work, overwrite=self.overwrite, cheap=True)
        records: list[dict[str, Any]] = json.loads((stage / "records.json").read_text())
        return records

    def report(self, full: TrainedStage, subnet: TrainedStage, controls: dict[str, TrainedStage]) -> Report:
        """Evaluate every model, compare their weights, and write the report's three files."""
        base_records = self.answers("base", self.base, self.base_sha256)
        trained = {"full": full, "subnet": subnet, **controls}
        records = {name: self.answers(name, run.folder, run.results["sha256"]) for name, run in trained.items()}
        self._announce("verify", "comparing weights")
        source = self.recipe.subnet.source
        weights = compare_weights(
            open_checkpoint(self.base),
            open_checkpoint(full.folder),
            {
                name: RunWeights(open_checkpoint(run.folder), run.mask)
                for name, run in trained.items()
                if name != "full"
            },
            full_mask=subnet.mask if source.kind == "extract" else None,
        )

        def evidence(name: str) -> RunEvidence:
            run = trained[name]
            seconds = {"train": run.results["train_seconds"], **self._evaluation_seconds(name)}
            return RunEvidence(
                name,
                records=records[name],
                log_history=json.loads((run.folder / LOG).read_text()),
                seconds=seconds,
                memory=run.results["memory"],
                weights=weights.get(name),
            )

        mask_stage = read_json(self.folder / "mask" / "stage.json")
        report = build_report(
            version=subnet_ft.__version__,
            base=RunEvidence("base", records=base_records, seconds=self._evaluation_seconds("base")),
            full=evidence("full"),
            subnet=evidence("subnet"),
            controls=[evidence(name) for name in controls],
            mask=subnet.mask,
            mask_seconds=mask_stage["results"]["seconds"] if mask_stage and source.kind == "extract" else None,
            margin=self.recipe.evaluation.margin,
            confidence=self.recipe.evaluation.confidence,
            recipe=recipe_to_dict(self.recipe),
            environment=read_json(self.folder / "environment.json"),
            seeds=[self.recipe.seed],
        )
        write_report(report, self.folder)
        return report

    def _train(self, name: str, mask: SubnetMask | None) -> TrainedStage:
        def work(folder: Path) -> dict[str, Any]:
            save_recipe(self.recipe, folder / RECIPE_FILE)
            scorer = self.task if ALGORITHM_DATA[self.recipe.algorithm] == "prompts" else None
            run = train(
                self.recipe,
                base=self.base,
                folder=folder,
                mask=mask,
                dataset=self.dataset,
                task=scorer,
                progress=self.progress,
            )
            if not self.recipe.keep_checkpoints:
                remove_checkpoints(folder)
            gc.collect()
            return {
                "sha256": weights_sha256(folder),
                "density": 1.0 if mask is None else mask.density,
                "train_seconds": run.seconds,
                "num_steps": run.num_steps,
                "resumed_from": run.resumed_from,
                "memory": run.memory,
                "environment": environment(),
            }

        what = "every weight" if mask is None else f"{mask.num_trainable:,} of {mask.num_parameters:,} weights"
        self._announce(name, f"{self.recipe.algorithm} on {what}")
        folder = self.folder / name
        results = run_stage(folder, self._training_inputs(mask), work, overwrite=self.overwrite)
        if weights_sha256(folder) != results["sha256"]:
            raise StageError(
                f"The weights in `{folder}` are not those that this stage saved. Remove the folder to train again."
            )
        return TrainedStage(folder, mask, results)

    def _training_inputs(self, mask: SubnetMask | None) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "base": self.base_sha256,
            "model": {"dtype": recipe.model.dtype, "attn_implementation": recipe.model.attn_implementation},
            "task": asdict(recipe.task),
            "algorithm": recipe.algorithm,
            "training": {key: value for key, value in recipe.training.items() if key not in _ONLY_SHOWN},
            "optimizer": asdict(recipe.subnet.optimizer),
            "seed": recipe.seed,
            "mask": None if mask is None else mask.fingerprint,
        }

    def _sampled_pairs(self) -> Dataset:
        from datasets import Dataset

        pairs = self.recipe.task.pairs
        assert pairs is not None

        def work(folder: Path) -> dict[str, Any]:
            spec = self.recipe.model
            model, tokenizer = load_model(self.base, dtype=spec.dtype, attn_implementation=spec.attn_implementation)
            sampled = sample_pairs(model, tokenizer, self.task, pairs, seed=self.recipe.seed, progress=self.progress)
            write_json(folder / "pairs.json", sampled.to_list())
            return {"num_pairs": len(sampled)}

        self._announce(
            "pairs", f"{pairs.num_samples} samples of each of {pairs.num_prompts} prompts from the base model"
        )
        inputs = {"base": self.base_sha256, "task": asdict(self.recipe.task), "seed": self.recipe.seed}
        run_stage(self.folder / "pairs", inputs, work, overwrite=self.overwrite)
        return Dataset.from_list(json.loads((self.folder / "pairs" / "pairs.json").read_text()))

    def _mask_from_file(self) -> SubnetMask:
        path = self.recipe.subnet.source.path
        assert path is not None  # the recipe was checked
        return SubnetMask.load(path, base=self.base)

    def _evaluation_seconds(self, name: str) -> dict[str, float]:
        stage = read_json(self.folder / "evaluation" / name / "stage.json")
        return {"evaluate": stage["results"]["seconds"]} if stage else {}

    def _announce(self, stage: str, what: str) -> None:
        logger.info("%s: %s", stage, what)


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint folder's safetensors files, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
