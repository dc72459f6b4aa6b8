"""What a recipe's trainer reads: prompts, rows of a dataset, or what is made of completions sampled from the base."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subnet_ft.checkpoints.cache import build_once, cache_folder
from subnet_ft.checkpoints.models import load_model
from subnet_ft.digests import json_sha256
from subnet_ft.environment import environment
from subnet_ft.inputs import RunInputs
from subnet_ft.stages import run_stage, write_json
from subnet_ft.tasks import (
    SampledPrompt,
    dataset_of_samples,
    demonstration_dataset,
    prompt_dataset,
    sample_completions,
)

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SAMPLES = "samples.json"


def training_dataset(inputs: RunInputs, folder: Path, *, overwrite: bool, progress: bool) -> Dataset:
    """Return the data of a recipe in the format of its algorithm's trainer.

    Args:
        inputs: The recipe with its base and data.
        folder: The run's folder; what is sampled from the base becomes its stage `samples`.
        overwrite: Replace samples that were made with other settings, instead of refusing.
        progress: Show a bar on stderr while sampling.

    Raises:
        TaskError: Too little data, or samples of which too few are of use.
    """
    recipe, data = inputs.recipe, inputs.data
    if data.rows is not None:
        return data.rows
    assert data.task is not None
    if inputs.learns_from == "prompts":
        return prompt_dataset(data.task)
    if inputs.learns_from == "demonstrations":
        return demonstration_dataset(data.task, recipe.task)
    assert recipe.task.pairs is not None  # the recipe was checked
    samples = sampled_completions(inputs, folder / "samples", overwrite=overwrite, progress=progress)
    return dataset_of_samples(samples, inputs.learns_from, recipe.task.pairs, seed=recipe.seed)


def sampled_completions(
    inputs: RunInputs, folder: Path | None, *, held_out: bool = False, overwrite: bool, progress: bool
) -> list[SampledPrompt]:
    """Sample from the recipe's model; recipes that would sample the same share it through the cache.

    Args:
        inputs: The recipe with its model and data; its task has `pairs`.
        folder: The stage that holds the run's copy; `None` reads the cache itself.
        held_out: Complete the held-out prompts instead of the first training prompts.
        overwrite: Replace samples that were made with other settings, instead of refusing.
        progress: Show a bar on stderr.
    """
    task, pairs, model = inputs.data.task, inputs.recipe.task.pairs, inputs.recipe.model
    assert task is not None
    assert pairs is not None
    stage_inputs = inputs.of_samples(held_out=held_out)
    num_prompts = len(task.evaluation) if held_out else pairs.num_prompts
    name = f"samples/{_cache_key(stage_inputs)}"

    def sample(into: Path) -> None:
        folder = inputs.language_model.folder
        loaded = load_model(folder, dtype=model.dtype, attn_implementation=model.attn_implementation)
        sampled = sample_completions(
            *loaded, task, pairs, seed=inputs.recipe.seed, held_out=held_out, progress=progress
        )
        write_json(into / SAMPLES, sampled)

    def work(stage: Path) -> dict[str, Any]:
        if (cache_folder() / name).is_dir():
            logger.info("samples: another run has sampled them, `%s`", cache_folder() / name)
        shutil.copyfile(build_once(name, sample) / SAMPLES, stage / SAMPLES)
        return {"num_prompts": num_prompts, "num_completions": num_prompts * pairs.num_samples}

    which = "held-out prompts" if held_out else "prompts"
    logger.info("samples: %d of each of %d %s from the base model", pairs.num_samples, num_prompts, which)
    if folder is None:
        path = build_once(name, sample) / SAMPLES
    else:
        path = folder / SAMPLES
        run_stage(folder, stage_inputs, work, overwrite=overwrite, products=[path])
    samples: list[SampledPrompt] = json.loads(path.read_text())
    return samples


def _cache_key(stage_inputs: dict[str, Any]) -> str:
    """Name samples by what they depend on, the machine's arithmetic included."""
    here = environment()
    packages = {name: here["packages"][name] for name in ("torch", "transformers", "reasoning-gym")}
    return json_sha256([stage_inputs, packages, here["subnet_ft"], here["gpu"]])[:32]
