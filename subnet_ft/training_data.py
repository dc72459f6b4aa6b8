"""What a recipe's trainer reads: prompts, rows of a dataset, or what is made of texts that a model wrote beforehand."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
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
    rationale_dataset,
    sample_completions,
    teacher_prompts,
    write_rationales,
)

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SAMPLES = "samples.json"
RATIONALES = "rationales.json"


def training_dataset(inputs: RunInputs, folder: Path, *, overwrite: bool, progress: bool) -> Dataset:
    """Return the data of a recipe in the format of its algorithm's trainer.

    Args:
        inputs: The recipe with its base and data.
        folder: The run's folder; what is sampled from the base becomes its stage `samples`, what the teacher writes its
            stage `rationales`.
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
    if inputs.learns_from == "rationales":
        return _rationales(inputs, folder / "rationales", overwrite=overwrite, progress=progress)
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

    def sample() -> list[SampledPrompt]:
        folder = inputs.language_model.folder
        loaded = load_model(folder, dtype=model.dtype, attn_implementation=model.attn_implementation)
        return sample_completions(*loaded, task, pairs, seed=inputs.recipe.seed, held_out=held_out, progress=progress)

    num_prompts = len(task.evaluation) if held_out else pairs.num_prompts
    which = "held-out prompts" if held_out else "prompts"
    logger.info("samples: %d of each of %d %s from the base model", pairs.num_samples, num_prompts, which)
    results = {"num_prompts": num_prompts, "num_completions": num_prompts * pairs.num_samples}
    samples: list[SampledPrompt] = _written_once(
        SAMPLES, inputs.of_samples(held_out=held_out), sample, results, folder, overwrite=overwrite
    )
    return samples


def _rationales(inputs: RunInputs, folder: Path, *, overwrite: bool, progress: bool) -> Dataset:
    """Let the teacher write; recipes for which it would write the same share its texts through the cache."""
    task, spec, teacher = inputs.data.task, inputs.recipe.task, inputs.recipe.teacher
    assert task is not None
    assert spec.rationales is not None
    rationales, prompts = spec.rationales, teacher_prompts(task, spec)

    def write() -> list[dict[str, Any]]:
        assert teacher is not None
        assert inputs.teacher is not None  # the recipe was checked
        folder = inputs.teacher.folder
        loaded = load_model(folder, dtype=teacher.dtype, attn_implementation=teacher.attn_implementation)
        texts = write_rationales(*loaded, prompts, rationales, seed=inputs.recipe.seed, progress=progress)
        return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]

    logger.info("rationales: %d texts of the teacher", len(prompts))
    texts = _written_once(
        RATIONALES, inputs.of_rationales(prompts), write, {"num_texts": len(prompts)}, folder, overwrite=overwrite
    )
    return rationale_dataset(task, spec, [row["text"] for row in texts])


def _written_once(
    file: str,
    stage_inputs: dict[str, Any],
    write: Callable[[], list[Any]],
    results: dict[str, Any],
    folder: Path | None,
    *,
    overwrite: bool,
) -> Any:
    """Return what a model writes: made at most once for the same inputs, kept in the cache and copied into a stage.

    Args:
        file: Name of the JSON file, `samples.json`; the cache's folder is named after it.
        stage_inputs: Everything that it depends on but the machine.
        write: Loads the model and lets it write.
        results: What the stage says of it.
        folder: The stage that holds the run's copy; `None` reads the cache itself.
        overwrite: Replace a copy that was made from other inputs, instead of refusing.
    """
    kind = file.partition(".")[0]
    name = f"{kind}/{_cache_key(stage_inputs)}"

    def cached() -> Path:
        if (cache_folder() / name).is_dir():
            logger.info("%s: another run has made them, `%s`", kind, cache_folder() / name)
        return build_once(name, lambda into: write_json(into / file, write())) / file

    def work(stage: Path) -> dict[str, Any]:
        shutil.copyfile(cached(), stage / file)
        return results

    if folder is None:
        return json.loads(cached().read_text())
    run_stage(folder, stage_inputs, work, overwrite=overwrite, products=[folder / file])
    return json.loads((folder / file).read_text())


def _cache_key(stage_inputs: dict[str, Any]) -> str:
    """Name samples by what they depend on, the machine's arithmetic included."""
    here = environment()
    packages = {name: here["packages"][name] for name in ("torch", "transformers", "reasoning-gym")}
    return json_sha256([stage_inputs, packages, here["subnet_ft"], here["gpu"]])[:32]
