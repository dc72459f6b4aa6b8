"""What the stages of a recipe start from: base, data and settings, and the digests that tell when one changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.digests import checkpoint_sha256, json_sha256, rewards_sha256
from subnet_ft.masks import SubnetMask
from subnet_ft.processes import num_processes
from subnet_ft.recipe import MethodSpec, Recipe
from subnet_ft.recipe.algorithms import ALGORITHMS, LearnsFrom, trains_reward_model
from subnet_ft.recipe.methods import training_of
from subnet_ft.tasks import RecipeData, Task, load_recipe_data, load_task, reward_functions
from subnet_ft.tasks.task import Prompt

BASE = "base"
"""Folder, in that of the run, of the base of an algorithm that puts a new head on the recipe's model."""

# Fields that change what is seen or kept of a run, not what it computes.
_NOT_COMPUTED = (
    "dataloader_num_workers", "disable_tqdm", "logging_first_step", "logging_steps", "logging_strategy", "report_to",
    "run_name", "save_steps", "save_strategy", "save_total_limit",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunVariant:
    """How one training run departs from its recipe; the default does not.

    Args:
        seed: Another seed of training, on the recipe's own data.
        stop_after: Stop after so many steps of the recipe's schedule, and keep the trainer's checkpoint there.
        at_base: Learning rate 0, so that every gradient is one at the base.
    """

    seed: int | None = None
    stop_after: int | None = None
    at_base: bool = False

    def of(self, recipe: Recipe) -> Recipe:
        """Return the recipe that this run trains by."""
        if self.at_base:
            recipe = replace(recipe, training={**recipe.training, "learning_rate": 0.0})
        return recipe if self.seed is None else replace(recipe, seed=self.seed)


AS_WRITTEN = RunVariant()


class RunInputs:
    """A recipe's base and data, read when first needed and once.

    Args:
        recipe: The recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def check(self) -> None:
        """Read everything that a later stage needs, so that what is missing is known before hours of training."""
        assert self.language_model.specs
        assert self.teacher is None or self.teacher.specs
        if self.data.task is not None:
            reward_functions(self.data.task, self.recipe.task)
        _ = self.retention_tasks
        if self.recipe.subnet.source.kind == "file":
            self.mask_from_file()

    @cached_property
    def language_model(self) -> Checkpoint:
        """The checkpoint that the recipe's `model` names."""
        found = open_checkpoint(self.recipe.model.name, revision=self.recipe.model.revision)
        found.check_whole()  # TRL loads it once more, as a reference, and knows whole files only
        return found

    @cached_property
    def base(self) -> Checkpoint:
        """The checkpoint that every run starts from: the recipe's model, or that model with its new head, once made."""
        return open_checkpoint(Path(self.recipe.output) / BASE) if self.has_new_head else self.language_model

    @cached_property
    def teacher(self) -> Checkpoint | None:
        """The teacher's checkpoint, where the algorithm has one."""
        spec = self.recipe.teacher
        return None if spec is None else open_checkpoint(spec.name, revision=spec.revision)

    @property
    def has_new_head(self) -> bool:
        """Whether the base is a reward model, of which the recipe's model is all but the head."""
        return trains_reward_model(self.recipe.algorithm)

    @cached_property
    def language_model_sha256(self) -> str:
        """Digest of the checkpoint that the recipe's `model` names."""
        return checkpoint_sha256(self.language_model.folder)

    @cached_property
    def base_sha256(self) -> str:
        """Digest of the base checkpoint."""
        return checkpoint_sha256(self.base.folder)

    @cached_property
    def data(self) -> RecipeData:
        """What the recipe trains on and is judged on."""
        return load_recipe_data(self.recipe)

    @cached_property
    def retention_tasks(self) -> dict[str, Task]:
        """Name to task that no run is trained on, for `evaluation.retention`; empty where it asks for none."""
        spec = self.recipe.evaluation.retention
        tasks: dict[str, Task] = {}
        for task in [] if spec is None else spec.tasks:
            name = task.name if task.name not in tasks else f"{task.name} ({len(tasks) + 1})"
            tasks[name] = load_task(task, seed=self.recipe.seed)
        return tasks

    @cached_property
    def data_sha256(self) -> str:
        """Digest of the training prompts with their answers, or of the rows that are trained on as they are."""
        if self.data.task is None:
            assert self.data.rows is not None
            return json_sha256(self.data.rows)
        return json_sha256([example.prompt, example.answer] for example in self.data.task.train)

    @property
    def learns_from(self) -> LearnsFrom:
        """What the algorithm learns from."""
        return ALGORITHMS[self.recipe.algorithm].learns_from

    @property
    def needs_rewards(self) -> bool:
        """Whether the algorithm's trainer has completions judged by the task's rewards."""
        return ALGORITHMS[self.recipe.algorithm].judge == "rewards"

    def mask_from_file(self) -> SubnetMask:
        """Load the mask that the recipe names, checked against the base."""
        path = self.recipe.subnet.source.path
        assert path is not None  # the recipe was checked
        return SubnetMask.load(path, base=self.base)

    def of_loading(self) -> dict[str, Any]:
        """What decides how a checkpoint is loaded."""
        model = self.recipe.model
        return {"dtype": model.dtype, "attn_implementation": model.attn_implementation}

    def of_samples(self, *, held_out: bool = False) -> dict[str, Any]:
        """What the completions sampled from the model depend on, and their scores; not what is made of them.

        Args:
            held_out: Those of the held-out prompts, of which pairs to judge by are made.
        """
        task, pairs = self.data.task, self.recipe.task.pairs
        assert task is not None
        assert pairs is not None
        unused = ("max_right", "num_prompts") if held_out else ("max_right",)
        sampling = {key: value for key, value in asdict(pairs).items() if key not in unused}
        verifier = {"name": task.name, "params": self.recipe.task.params}
        examples = task.evaluation if held_out else task.train[: pairs.num_prompts]
        return {
            "base": self.language_model_sha256,
            "load": self.of_loading(),
            "data": json_sha256([example.prompt, example.answer] for example in examples),
            "verifier": {**verifier, "answer_pattern": self.recipe.task.answer_pattern},
            "sampling": sampling,
            "seed": self.recipe.seed,
        }

    def of_rationales(self, prompts: Iterable[Prompt]) -> dict[str, Any]:
        """What the texts of the teacher depend on; not what is found in them, and which are kept.

        Args:
            prompts: What the teacher is given.
        """
        rationales = self.recipe.task.rationales
        assert rationales is not None
        writing = ("max_new_tokens", "temperature", "batch_size")
        return {
            **self._of_teacher(),
            "prompts": json_sha256(prompts),
            "writing": {name: getattr(rationales, name) for name in writing},
            "seed": self.recipe.seed,
        }

    def of_training(self, mask: SubnetMask | None, method: str, variant: RunVariant = AS_WRITTEN) -> dict[str, Any]:
        """What a training run depends on.

        Args:
            mask: `None` where a method trains all weights, or added ones.
            method: Whose settings apply.
            variant: How the run departs from the recipe.
        """
        recipe = variant.of(self.recipe)
        training = training_of(recipe, method)
        settings = recipe.methods.get(method, MethodSpec())
        own: dict[str, Any] = {} if method in ("full", "subnet") else {"method": method, "config": settings.config}
        if variant.stop_after is not None:
            own["stop_after"] = variant.stop_after
        return {
            "base": self.base_sha256,
            "model": self.of_loading(),
            **self._of_teacher(),
            "task": asdict(recipe.task),
            "data": self.data_sha256,
            "rewards": rewards_sha256(recipe.task.rewards) if self.needs_rewards else {},
            "algorithm": recipe.algorithm,
            "training": _in_one_process({key: value for key, value in training.items() if key not in _NOT_COMPUTED}),
            "optimizer": asdict(recipe.subnet.optimizer),
            "reference": {"quantization": recipe.reference.quantization},  # its source changes no bit
            "seed": recipe.seed,
            "mask": None if mask is None else mask.fingerprint,
            **own,
        }

    def _of_teacher(self) -> dict[str, Any]:
        spec = self.recipe.teacher
        if spec is None or self.teacher is None:
            return {}
        loading = {"dtype": spec.dtype, "attn_implementation": spec.attn_implementation}
        return {"teacher": {"checkpoint": checkpoint_sha256(self.teacher.folder), **loading}}

    def of_answers(self, checkpoint: str) -> dict[str, Any]:
        """What the answers of a checkpoint, given by its digest, depend on."""
        spec, task = self.recipe.evaluation, self.data.evaluation
        assert task is not None
        return {
            "model": checkpoint,
            "load": self.of_loading(),
            "task": asdict(spec.task or self.recipe.task),
            "prompts": json_sha256([example.prompt, example.answer] for example in task.evaluation),
            "max_new_tokens": spec.max_new_tokens,
            "batch_size": spec.batch_size,
        }

    def of_choices(self, checkpoint: str, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """What the scores of held-out pairs by a checkpoint, given by its digest, depend on."""
        batch_size = self.recipe.evaluation.batch_size
        return {"model": checkpoint, "load": self.of_loading(), "pairs": json_sha256(rows), "batch_size": batch_size}

    def of_base(self) -> dict[str, Any]:
        """What a base with a new head depends on."""
        return {"model": self.language_model_sha256, "dtype": self.recipe.model.dtype, "seed": self.recipe.seed}


def _in_one_process(training: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with which one process takes the same steps on the same batches as all of this launch do.

    One that accumulates the micro-batches of all processes reads the same data for every step. The bits differ: sums
    are taken in another order, and every process samples completions with its own seed.
    """
    count = num_processes()
    if count == 1:
        return training
    accumulated = {"gradient_accumulation_steps": count * training.get("gradient_accumulation_steps", 1)}
    if training.get("steps_per_generation") is not None:
        accumulated["steps_per_generation"] = count * training["steps_per_generation"]
    return {**training, **accumulated}
