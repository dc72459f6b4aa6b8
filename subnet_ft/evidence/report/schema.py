"""What `report.json` holds, field by field. A share is in [0, 1], a time in seconds, a size in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from subnet_ft.evidence.verdict import Comparison, Verdict
from subnet_ft.evidence.weights import WeightComparison


@dataclass(frozen=True)
class Accuracy:
    """One model's accuracy on the held-out prompts."""

    accuracy: float
    """Share of prompts answered correctly."""
    num_prompts: int
    """Held-out prompts."""
    correct: int
    """Prompts answered correctly."""
    ci_low: float
    """Lower end of the Wilson interval at the report's confidence."""
    ci_high: float
    """Upper end."""


@dataclass(frozen=True)
class Difference:
    """Accuracy of `first` minus accuracy of `second` on the same prompts."""

    first: str
    """Name of the model that is better when the difference is positive."""
    second: str
    """Name of the other model."""
    difference: float
    """In [-1, 1]."""
    low: float
    """Lower end of Tango's interval."""
    high: float
    """Upper end."""
    confidence: float
    """Of the interval."""
    only_first: int
    """Prompts that only the first solved."""
    only_second: int
    """Prompts that only the second solved."""


@dataclass(frozen=True)
class Density:
    """Trainable share of the mask."""

    overall: float
    """K / N."""
    by_layer: dict[str, float]
    """By decoder layer; `other` is what lies outside the layers."""
    by_kind: dict[str, float]
    """By matrix kind over all layers."""
    by_layer_and_kind: dict[str, dict[str, float]]
    """Layer to kind to density of that tensor."""
    by_tolerance: dict[str, float]
    """Density that the same pair of checkpoints has at other tolerances."""


@dataclass(frozen=True)
class MaskInfo:
    """The mask and where it came from."""

    num_trainable: int
    num_parameters: int
    fingerprint: str
    criterion: str | None
    tolerance: float | None
    compare_dtype: str | None
    source: dict[str, Any]
    base: str | None
    tuned: str | None
    seconds: float | None
    """Time to make the mask, without the run that it was extracted from."""

    @property
    def needs_full_run(self) -> bool:
        """Whether the mask was extracted from a finished run, whose cost then belongs to the subnetwork."""
        return self.source.get("kind") == "extract" or self.tuned is not None


@dataclass(frozen=True)
class Answered:
    """One model's answer to one prompt."""

    completion: str
    correct: bool


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with the answers of several models."""

    prompt: str
    reference: str
    answers: dict[str, Answered]
    """By model name."""


@dataclass(frozen=True)
class Report:
    """All evidence on one subnetwork; `report.json` is exactly this."""

    version: str
    """Version of subnet-ft that wrote it."""
    title: str
    """What was run, in a few words."""
    verdict: str
    """recovered, not_recovered, undecided, nothing_to_recover or not_assessed."""
    verdict_reason: str
    """One sentence with the numbers."""
    base: str
    """Name of the base model's entry in the mappings below."""
    full: str
    """Name of the full run's entry."""
    subnet: str
    """Name of the subnetwork run's entry."""
    controls: list[str]
    """Names of the controls, the one that speaks most against the subnetwork first."""
    control_verdicts: dict[str, Verdict]
    """Control to its verdict by the subnetwork's rule."""
    above_control: dict[str, Comparison]
    """Control to whether the subnetwork is above it."""
    margin: float
    """Largest difference in accuracy that counts as none."""
    confidence: float
    """Confidence of every claim."""
    num_prompts: int
    """Held-out prompts, or pairs; 0 when accuracy was not measured."""
    accuracy: dict[str, Accuracy]
    """By model name."""
    differences: list[Difference]
    """Full minus base, every run minus full, subnetwork minus every control."""
    weights: dict[str, WeightComparison]
    """Run to its weights against the base model's and the full run's."""
    density: Density | None
    """Of the subnetwork's mask."""
    mask: MaskInfo | None
    """The subnetwork's mask."""
    curves: dict[str, list[dict[str, float]]]
    """Run to the trainer's log, one entry per logged step."""
    seconds: dict[str, dict[str, float]]
    """Run to stage to time."""
    memory: dict[str, dict[str, int]]
    """Run to component to size; keys that start with `peak` are totals of the process, not components."""
    environment: dict[str, Any]
    """Hardware and package versions."""
    recipe: dict[str, Any]
    """The resolved recipe."""
    seeds: list[int]
    """Seeds of training."""
    samples: list[Sample]
    """A few held-out prompts, evenly spaced, with the answers."""
    not_measured: list[str]
    """What this report cannot say, one sentence each."""
    judged_on: Literal["prompts", "pairs"] = "prompts"
    """What was right or wrong: greedy answers to held-out prompts, or which of two completions got more reward."""

    @property
    def runs(self) -> list[str]:
        """The trained runs in reading order: full, subnetwork, controls."""
        return [self.full, self.subnet, *self.controls]

    @property
    def models(self) -> list[str]:
        """The base model and the runs."""
        return [self.base, *self.runs]

    def difference(self, first: str, second: str, *, confidence: float | None = None) -> Difference | None:
        """Return the difference of two models at the given or the report's confidence, if it was measured."""
        wanted = self.confidence if confidence is None else confidence
        for entry in self.differences:
            if (entry.first, entry.second) == (first, second) and abs(entry.confidence - wanted) < 1e-9:
                return entry
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Report:
        """Rebuild a report from `to_dict`, or from what `report.json` holds.

        Nothing here calls it: it is the reader of `report.json` for scripts that compare or redraw reports.
        """
        values = dict(fields)
        values["control_verdicts"] = {name: Verdict(**entry) for name, entry in values["control_verdicts"].items()}
        values["above_control"] = {name: Comparison(**entry) for name, entry in values["above_control"].items()}
        values["accuracy"] = {name: Accuracy(**entry) for name, entry in values["accuracy"].items()}
        values["differences"] = [Difference(**entry) for entry in values["differences"]]
        values["weights"] = {name: WeightComparison(**entry) for name, entry in values["weights"].items()}
        values["density"] = Density(**values["density"]) if values["density"] else None
        values["mask"] = MaskInfo(**values["mask"]) if values["mask"] else None
        values["samples"] = [
            Sample(
                entry["prompt"],
                entry["reference"],
                {name: Answered(**answer) for name, answer in entry["answers"].items()},
            )
            for entry in values["samples"]
        ]
        return cls(**values)
