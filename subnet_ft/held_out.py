"""What the models of a recipe are judged on: held-out prompts to answer, or held-out pairs to tell apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from subnet_ft.evidence.accuracy import evaluate_model
from subnet_ft.evidence.pairs import evaluate_pairs
from subnet_ft.inputs import RunInputs
from subnet_ft.methods.saved import is_adapter, load_trained
from subnet_ft.tasks import Task, preference_pairs
from subnet_ft.training_data import sampled_completions

SAMPLES = "samples-held-out"
"""Folder, in that of the run, of the completions from which held-out pairs are made."""


@dataclass(frozen=True)
class HeldOutPairs:
    """Pairs for a reward model to tell apart.

    Args:
        rows: In TRL's preference format; no prompt of theirs is a training prompt.
        num_prompts: Held-out prompts for which the pairs were sampled, of which some gave none; `None` where the pairs
            are rows of a dataset.
    """

    rows: list[dict[str, Any]]
    num_prompts: int | None = None

    @property
    def not_measured(self) -> list[str]:
        """What a report by these pairs must say that it does not show, one sentence each."""
        if self.num_prompts is None or self.num_prompts == len(self.rows):
            return []
        return [
            f"{self.num_prompts - len(self.rows):,} of the {self.num_prompts:,} held-out prompts: the language model's "
            "samples were all right or all wrong, which gives no pair."
        ]


HeldOut: TypeAlias = Task | HeldOutPairs
"""A task with held-out examples, for models that write; pairs, for reward models."""


def held_out(
    inputs: RunInputs, folder: Path | None = None, *, overwrite: bool = False, progress: bool = False
) -> HeldOut | None:
    """Return what a recipe's models are judged on, or `None` when evaluation is off.

    Args:
        inputs: The recipe with its model and data.
        folder: The run's folder, where sampled completions become a stage; without one they are only in the cache.
        overwrite: Replace samples that were made with other settings, instead of refusing.
        progress: Show a bar on stderr while sampling.

    Raises:
        TaskError: Too few of the held-out prompts give a pair.
    """
    data = inputs.data
    if not inputs.recipe.evaluation.enabled or not inputs.has_new_head:
        return data.evaluation
    if data.held_out_rows is not None:
        return HeldOutPairs([dict(row) for row in data.held_out_rows])
    stage = None if folder is None else folder / SAMPLES
    samples = sampled_completions(inputs, stage, held_out=True, overwrite=overwrite, progress=progress)
    return HeldOutPairs([dict(row) for row in preference_pairs(samples)], len(samples))


def judge(
    folder: Path, inputs: RunInputs, held_out: HeldOut, *, quantization: str | None = None, progress: bool = False
) -> list[dict[str, Any]]:
    """Load the model in `folder` and return one record per held-out prompt, answered greedily, or per pair.

    Args:
        folder: A checkpoint, or an adapter on the recipe's base.
        inputs: The recipe with its base.
        held_out: Prompts or pairs.
        quantization: `int8` or `nf4`: quantize the checkpoint, or the base under an adapter.
        progress: Show a bar on stderr.
    """
    recipe = inputs.recipe
    spec, batch_size = recipe.model, recipe.evaluation.batch_size
    loading: dict[str, Any] = {"dtype": spec.dtype, "attn_implementation": spec.attn_implementation}
    if quantization is not None:
        loading["quantization"] = quantization
    base = inputs.base.folder if is_adapter(folder) else folder
    if isinstance(held_out, HeldOutPairs):
        model, tokenizer = load_trained(folder, base, **loading, kind="reward_model")
        return evaluate_pairs(model, tokenizer, held_out.rows, batch_size=batch_size, progress=progress)
    model, tokenizer = load_trained(folder, base, **loading)
    limits = {"max_new_tokens": recipe.evaluation.max_new_tokens, "batch_size": batch_size}
    return evaluate_model(model, tokenizer, held_out, **limits, progress=progress)
