"""What a study measures of a finished run, each measurement a stage that is not repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.models import load_model
from subnet_ft.digests import json_sha256
from subnet_ft.evidence.overlap import mask_overlap
from subnet_ft.evidence.weights import RunWeights, compare_weights
from subnet_ft.masks import SubnetMask, extract
from subnet_ft.recipe import SourceSpec
from subnet_ft.stages import TrainedStage, run_stage
from subnet_ft.training.run import LOG
from subnet_ft.verification import compare_dtype

if TYPE_CHECKING:
    from subnet_ft.pipeline import Pipeline

_DATA_ROWS = 200
_REWARDS = ("reward", "rewards/accuracies")
_BATCH = 32


def changed_mask(
    pipeline: Pipeline, run: TrainedStage, folder: Path, source: SourceSpec
) -> tuple[SubnetMask, dict[str, float]]:
    """Return what a run changed by a source's criterion, which may be nothing, and the shares by tolerance.

    Args:
        pipeline: Of the run.
        run: The run.
        folder: Of the stage.
        source: Its `criterion` and `tolerance` count.
    """
    path = folder / "changed.subnet.safetensors"

    def work(_: Path) -> dict[str, Any]:
        mask = extract(
            pipeline.inputs.base,
            run.folder,
            criterion=source.criterion,
            tolerance=source.tolerance,
            dtype=compare_dtype(pipeline.inputs.base, pipeline.recipe),
            progress=pipeline.progress,
        )
        mask.save(path)
        return {"changed": dict(mask.provenance.density_by_tolerance)}

    inputs = {
        "base": pipeline.inputs.base_sha256,
        "run": run.results["sha256"],
        "criterion": source.criterion,
        "tolerance": source.tolerance,
    }
    results = run_stage(folder, inputs, work, overwrite=True, cheap=True, products=[path])
    changed: dict[str, float] = results["changed"]
    return SubnetMask.load(path), changed


def weights_under_mask(pipeline: Pipeline, full: TrainedStage, run: TrainedStage, folder: Path) -> dict[str, Any]:
    """Return what the run under a mask did to the weights, beside the base and the full run.

    Returns:
        `changed_share`, `in_mask_identical`, `relative_distance` and `off_mask_changed`, as in `WeightComparison`.
    """
    assert run.mask is not None

    def work(_: Path) -> dict[str, Any]:
        weights = RunWeights(open_checkpoint(run.folder), run.mask)
        found = compare_weights(
            pipeline.inputs.base,
            open_checkpoint(full.folder),
            {"run": weights},
            dtype=compare_dtype(pipeline.inputs.base, pipeline.recipe),
        )["run"]
        return {
            "changed_share": found.mask_changed_share,
            "in_mask_identical": found.in_mask_identical["0"] if found.in_mask_identical else None,
            "relative_distance": found.relative_distance,
            "off_mask_changed": found.off_mask_changed,
        }

    inputs = {
        "base": pipeline.inputs.base_sha256,
        "full": full.results["sha256"],
        "run": run.results["sha256"],
        "mask": run.mask.fingerprint,
    }
    return run_stage(folder, inputs, work, overwrite=True, cheap=True)


def magnitude_recall(pipeline: Pipeline, final: SubnetMask, mask: SubnetMask, folder: Path) -> float | None:
    """Return the share of the final mask that a mask matched on magnitude with another one would hold.

    Args:
        pipeline: Knows the base of both.
        final: What the full run changed.
        mask: Says how many weights of every tensor and bin of |w| are held.
        folder: Of the stage.
    """

    def work(_: Path) -> dict[str, Any]:
        found = mask_overlap(final, mask, base=pipeline.inputs.base, progress=pipeline.progress)
        return {"recall": found.overall.magnitude_o1}

    inputs = {"base": pipeline.inputs.base_sha256, "final": final.fingerprint, "mask": mask.fingerprint}
    recall: float | None = run_stage(folder, inputs, work, overwrite=True, cheap=True)["recall"]
    return recall


def data_loss(pipeline: Pipeline, folder: Path) -> float:
    """Return the mean negative log-likelihood, per token, of what a run copies, under the base.

    Args:
        pipeline: Of a recipe whose data are prompts with completions; the first few hundred rows are read.
        folder: Of the stage.
    """
    rows = [dict(row) for row in pipeline.dataset.select(range(min(_DATA_ROWS, len(pipeline.dataset))))]

    def work(_: Path) -> dict[str, Any]:
        spec = pipeline.recipe.model
        model, tokenizer = load_model(
            pipeline.inputs.base.folder, dtype=spec.dtype, attn_implementation=spec.attn_implementation
        )
        return {"loss": completion_loss(model, tokenizer, rows)}

    inputs = {"base": pipeline.inputs.base_sha256, "load": pipeline.inputs.of_loading(), "rows": json_sha256(rows)}
    results = run_stage(folder, inputs, work, overwrite=True, cheap=True)
    loss: float = results["loss"]
    return loss


@torch.no_grad()
def completion_loss(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean negative log-likelihood of the completions' tokens, in nats.

    Args:
        model: A causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        rows: `prompt` and `completion`, as text or as chat messages.
    """
    total, count = 0.0, 0
    for start in range(0, len(rows), _BATCH):
        pairs = [_tokens(tokenizer, row) for row in rows[start : start + _BATCH]]
        longest = max(len(tokens) for tokens, _ in pairs)
        ids = torch.zeros(len(pairs), longest, dtype=torch.long)
        learned = torch.zeros(len(pairs), longest, dtype=torch.bool)
        seen = torch.zeros(len(pairs), longest, dtype=torch.long)
        for index, (tokens, begin) in enumerate(pairs):
            ids[index, : len(tokens)] = torch.tensor(tokens)
            seen[index, : len(tokens)] = 1
            learned[index, max(begin, 1) : len(tokens)] = True  # nothing predicts the first token of a text
        logits = model(input_ids=ids.to(model.device), attention_mask=seen.to(model.device)).logits.cpu().float()
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        total += float(losses.double()[learned[:, 1:]].sum())
        count += int(learned[:, 1:].sum())
    return total / max(count, 1)


def _tokens(tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], int]:
    """Return the tokens of a row, and where its completion begins."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        before = list(tokenizer(prompt)["input_ids"])
        return before + list(tokenizer(completion, add_special_tokens=False)["input_ids"]), len(before)
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    before = list(tokenizer(start, add_special_tokens=False)["input_ids"])
    return list(tokenizer(whole, add_special_tokens=False)["input_ids"]), len(before)


def late_reward(folder: Path) -> float | None:
    """Return the mean of the logged reward over the last quarter of a run's steps; `None` where none was logged.

    Args:
        folder: Of the run.
    """
    log = json.loads((folder / LOG).read_text())
    for name in _REWARDS:
        values = [entry[name] for entry in log if name in entry]
        if values:
            last = values[-max(1, len(values) // 4) :]
            return float(sum(last) / len(last))
    return None
