"""`StepByStepTrainer`: TRL's SFT with a mean of its own for labels and for rationales."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from trl.trainer.sft_trainer import SFTTrainer

from subnet_ft.errors import TrainerError
from subnet_ft.training.step_by_step.config import StepByStepConfig

Target = Literal["label", "rationale"]
TARGETS: tuple[Target, ...] = ("label", "rationale")
COLUMN = "is_rationale"
"""Column of the data set that says to which loss a row belongs."""


class StepByStepTrainer(SFTTrainer):
    """Trains on labels and rationales as two tasks: L_label + `rationale_weight` L_rationale.

    Each loss is the mean over the target tokens of its own rows in the whole step, whatever the micro-batches; a step
    without rows of one kind leaves that loss out. The two rows of an example are shuffled like any others, so that a
    batch holds both kinds, but not always both rows of an example, as the batches of the paper's code do.

    Logged beside SFT's metrics: `label_loss` and `rationale_loss`, each before its weight.

    Args:
        args: The options.
        kwargs: As in `SFTTrainer`; the data set has prompts, completions and a column `is_rationale` of true and false.

    Raises:
        TrainerError: The data set has no such column, or there is one for evaluation, which models that write need not.

    Source: Hsieh et al. 2023, "Distilling Step-by-Step!" (arXiv 2305.02301), section 3.2.
    """

    _tag_names = ["trl", "distilling-step-by-step"]  # noqa: RUF012 - TRL reads it and never writes
    _name = "Distilling step-by-step"
    _paper = {  # noqa: RUF012 - the same
        "title": "Distilling Step-by-Step! Outperforming Larger Language Models with Less Training Data",
        "id": "2305.02301",
        "citation": textwrap.dedent("""\
            @inproceedings{hsieh2023distilling,
                title        = {{Distilling Step-by-Step!}},
                author       = {Cheng-Yu Hsieh and Chun-Liang Li and others},
                booktitle    = {Findings of ACL},
                year         = 2023,
            }"""),
    }

    args: StepByStepConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        columns = getattr(self.train_dataset, "column_names", None)
        if columns is not None and COLUMN not in columns:
            raise TrainerError(
                f"The data set has no column `{COLUMN}`, which says of every row whether its completion is a "
                f"rationale; it has {', '.join(columns)}."
            )
        self.data_collator = _WithTarget(self.data_collator)
        self._step_tokens: dict[Target, int] = {}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Collect the micro-batches of a step, and count the target tokens of each kind in all of them."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._step_tokens = {target: sum(_count(batch, target) for batch in batches) for target in TARGETS}
        return batches, num_items

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of L_label + `rationale_weight` L_rationale, each computed as SFT does."""
        if return_outputs or not model.training:
            raise TrainerError(
                "A `StepByStepTrainer` trains and does not evaluate: judge the model by its answers after the label's "
                "prefix. Leave out `eval_dataset` and `eval_strategy`."
            )
        # Without a count of the whole step (models that take no `num_items_in_batch`) the trainer averages means.
        is_whole = num_items_in_batch is not None
        loss = torch.zeros((), device=inputs["input_ids"].device)
        for target in TARGETS:
            tokens = self._step_tokens[target] if is_whole else _count(inputs, target)
            if tokens == 0:
                continue
            part = _rows(inputs, target)
            share = loss * 0.0
            if len(part["labels"]) > 0:
                share = super().compute_loss(model, part, num_items_in_batch=tokens)  # type: ignore[no-untyped-call]
            loss = loss + share * (self.args.rationale_weight if target == "rationale" else 1.0)
            # Metrics are averaged over the micro-batches of a step, and the shares of a mean add up.
            parts = self.current_gradient_accumulation_steps if is_whole else 1
            self._metrics["train"][f"{target}_loss"].append(share.detach().item() * parts)
        return loss


class _WithTarget:
    """A collator that also says which rows are rationales.

    Args:
        collate: What makes the rest of a batch.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.collate(examples), COLUMN: torch.tensor([bool(example[COLUMN]) for example in examples])}


def _of(inputs: Mapping[str, Any], target: Target) -> torch.Tensor:
    """Return (B,) bool: which rows of a batch have the target."""
    is_rationale: torch.Tensor = inputs[COLUMN]
    return is_rationale if target == "rationale" else ~is_rationale


def _count(inputs: Mapping[str, Any], target: Target) -> int:
    """Count the tokens of a batch that are learned in rows with the target; the first of a row is never predicted."""
    return int((inputs["labels"][_of(inputs, target)][:, 1:] != -100).sum())


def _rows(inputs: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """Return the rows of a batch with the target, as SFT takes them."""
    rows = _of(inputs, target)
    return {name: value[rows] for name, value in inputs.items() if name != COLUMN}
