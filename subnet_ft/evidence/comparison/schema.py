"""What `comparison.json` holds, field by field. A share is in [0, 1], a time in seconds, a size in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from subnet_ft.evidence.conditions import differing_conditions
from subnet_ft.evidence.report.schema import Accuracy, Difference


@dataclass(frozen=True)
class MethodResult:
    """One method's run."""

    method: str
    """Name of the method, such as `lora`."""
    trains: str
    """`mask`: a part of the model's own weights; `adapter`: weights added to a frozen model."""
    num_trainable: int
    """Weights that were trained."""
    num_parameters: int
    """Weights of the model in training, added ones included."""
    num_steps: int
    """Optimizer steps."""
    step_seconds: float | None
    """Median wall time of a step; `None` where it was not measured."""
    train_seconds: float
    """Wall time of training."""
    resumed_from: str | None
    """The trainer checkpoint that an interrupted run went on from: its times are those of the last part."""
    memory: dict[str, int]
    """Component to size; keys that start with `peak` are totals of the process, not components."""
    checkpoint_bytes: int
    """Weight files of the result on disk."""
    patch_bytes: int | None
    """What would have to be stored beside the base: values and bits of the mask, counted; the adapter's files."""
    training: dict[str, Any]
    """Hyper-parameters that the method's optimizer ran with."""
    config: dict[str, Any]
    """The method's own settings."""
    accuracy: Accuracy | None
    """On the held-out prompts."""
    environment: dict[str, Any]
    """Hardware and package versions that its run had."""

    @property
    def persistent_bytes(self) -> int:
        """What lives from one step to the next."""
        return sum(size for key, size in self.memory.items() if not key.startswith("peak"))


@dataclass(frozen=True)
class QuantizedCopy:
    """A method's result with its frozen or dense weights quantized after training."""

    method: str
    quantization: str
    """`int8` or `nf4`."""
    checkpoint_bytes: int
    """Weights of the quantized model, with the adapter where there is one."""
    accuracy: Accuracy | None
    """On the held-out prompts."""
    difference: Difference | None
    """The copy minus the result that it is a copy of."""


@dataclass(frozen=True)
class MethodComparison:
    """Methods beside each other, with equal data, seed and steps; `comparison.json` is exactly this."""

    version: str
    """Version of subnet-ft that wrote it."""
    title: str
    """What was run, in a few words."""
    confidence: float
    """Confidence of every interval."""
    num_prompts: int
    """Held-out prompts or pairs; 0 when accuracy was not measured."""
    base: Accuracy | None
    """Accuracy of the base model."""
    methods: list[MethodResult]
    """In the order that was asked for."""
    differences: list[Difference]
    """Every method minus the base, and minus the full run where that is among them."""
    quantized: list[QuantizedCopy]
    """Quantized copies of the results."""
    environment: dict[str, Any]
    """Hardware and package versions that every run had: what the runs have in common."""
    recipe: dict[str, Any]
    """The resolved recipe."""
    seed: int
    """Of data, sampling, training and added weights."""
    not_measured: list[str]
    """What this comparison cannot say, one sentence each."""
    judged_on: Literal["prompts", "pairs"] = "prompts"
    """What was right or wrong: greedy answers to held-out prompts, or which of two completions got more reward."""
    schema: Literal["urn:subnet-ft:comparison:1"] = "urn:subnet-ft:comparison:1"
    """Identifier of the JSON schema that this follows; the number rises when a reader must change."""

    def difference(self, first: str, second: str) -> Difference | None:
        """Return the paired difference of two models, if it was measured."""
        return next((entry for entry in self.differences if (entry.first, entry.second) == (first, second)), None)

    @property
    def differing_conditions(self) -> dict[str, dict[str, Any]]:
        """Dotted key of device, threads or a version to the value of every method, where the runs differ in it.

        Their times and peaks of memory do not compare then.
        """
        return differing_conditions({result.method: result.environment for result in self.methods})

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MethodComparison:
        """Rebuild a comparison from what `comparison.json` holds: the reader for scripts."""
        values = dict(fields)
        values["base"] = _accuracy(values["base"])
        values["methods"] = [
            MethodResult(**{**entry, "accuracy": _accuracy(entry["accuracy"])}) for entry in values["methods"]
        ]
        values["differences"] = [Difference(**entry) for entry in values["differences"]]
        values["quantized"] = [
            QuantizedCopy(
                **{
                    **entry,
                    "accuracy": _accuracy(entry["accuracy"]),
                    "difference": Difference(**entry["difference"]) if entry["difference"] else None,
                }
            )
            for entry in values["quantized"]
        ]
        return cls(**values)


def _accuracy(entry: Mapping[str, Any] | None) -> Accuracy | None:
    return None if entry is None else Accuracy(**entry)
