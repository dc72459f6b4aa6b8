"""What `study.json` holds, field by field. A share is in [0, 1], a time in seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from subnet_ft.evidence.overlap import MaskOverlap
from subnet_ft.evidence.plain import from_plain
from subnet_ft.evidence.report.schema import Accuracy, Difference


@dataclass(frozen=True)
class Traits:
    """What kind of algorithm a run used."""

    on_policy: bool
    """It learns from samples of the policy as it is at that step."""
    kl: bool
    """Its loss or reward holds a term that keeps it near a reference model."""
    online: bool
    """It samples while it trains."""
    learns_from: str
    """Its data: prompts, preferences, labelled, demonstrations or samples (docs/algorithms.md)."""


@dataclass(frozen=True)
class MaskResult:
    """The mask that a run trained under, beside the final mask: what the full run changed."""

    density: float
    """Trainable share of all weights."""
    num_trainable: int
    """Trainable weights."""
    recall: float | None
    """Share of the final mask that is in this mask; a uniformly random mask of its size would have `density`."""
    precision: float | None
    """Share of this mask that is in the final mask; a uniformly random one would have the final mask's density."""
    step: int | None
    """Step of the full run at which the mask was made, for those that were made early."""
    changed_share: float | None
    """Share of the mask whose bits the run under it changed."""
    in_mask_identical: float | None
    """Share of the weights that the full run changed which equal the full run's, bit for bit."""
    relative_distance: float | None
    """||run - full|| / ||base - full||: 0 is the full run, 1 the base model."""
    verdict: str
    """The verdict on accuracy by the rule of every report: recovered, not_recovered, undecided, ..."""
    verdict_reason: str
    """One sentence with the numbers."""
    magnitude_recall: float | None = None
    """Recall that a random mask with this mask's count in every tensor and bin of |w| would have; rounding to bfloat16
    lets small weights change in every run, so that only a recall above it speaks of more than magnitude."""


@dataclass(frozen=True)
class CellResult:
    """One run of a study."""

    name: str
    """Unique in the study; what `--only` takes."""
    label: str
    """What the page calls it."""
    group: str
    """What is varied in it, as the page calls it; empty for the run that others are compared with."""
    settings: list[str]
    """In what it departs from the recipe, as `key=value` where the recipe has a key for it."""
    versus: str | None
    """Name of the cell that it is compared with."""
    algorithm: str
    """Name of the algorithm."""
    model: str
    """The recipe's name of the base."""
    dtype: str
    """Of the weights."""
    seed: int
    """Of training."""
    learning_rate: float | None
    """As the recipe has it; `None` leaves it to the algorithm's config."""
    num_steps: int
    """Optimizer steps taken; 0 where nothing was trained."""
    num_trainable: int
    """Weights trained."""
    num_parameters: int
    """Weights in all."""
    train_seconds: float | None
    """Wall time of training; `None` where nothing was trained."""
    resumed_from: str | None
    """The trainer checkpoint that an interrupted run went on from: its time is that of the last part."""
    failure: str | None
    """Why the run came to no end: its numbers stopped being finite, or its mask was empty."""
    changed: dict[str, float]
    """Tolerance to the share of all weights that differ from the base by more; at `0`, in any bit."""
    accuracy: Accuracy | None
    """On the held-out prompts or pairs."""
    difference: Difference | None
    """Accuracy minus that of `versus`, paired; `None` where the two were judged on different prompts."""
    reward: float | None
    """Mean of the training reward over the last quarter of the steps; `None` where none was logged."""
    data_loss: float | None
    """Mean negative log-likelihood, per token, of the completions it learns from, under the base; `None`: not asked."""
    traits: Traits | None
    """What kind of algorithm it is; only where algorithms are compared."""
    mask: MaskResult | None
    """Its mask, for a run under one."""


@dataclass(frozen=True)
class StudyReport:
    """The runs of a study beside each other, and what they say; `study.json` is exactly this."""

    version: str
    """Version of subnet-ft that wrote it."""
    study: str
    """Name of the study."""
    question: str
    """What it asks."""
    title: str
    """What was run, in a few words."""
    answers: list[str]
    """What the runs say, one sentence or two each, with their numbers."""
    confidence: float
    """Confidence of every interval."""
    margin: float
    """Largest difference in accuracy that counts as none."""
    num_prompts: int
    """Held-out prompts or pairs of the recipe; 0 when accuracy was not measured."""
    base: Accuracy | None
    """Accuracy of the recipe's base."""
    cells: list[CellResult]
    """The runs, in reading order."""
    environment: dict[str, Any]
    """Hardware and package versions."""
    recipe: dict[str, Any]
    """The resolved recipe that the study starts from."""
    seed: int
    """The recipe's seed."""
    not_measured: list[str]
    """What this study cannot say, one sentence each."""
    overlaps: list[MaskOverlap] = field(default_factory=list)
    """Every pair of the runs' masks over all weights, where masks are compared; no single tensors."""
    judged_on: Literal["prompts", "pairs"] = "prompts"
    """What was right or wrong: greedy answers to held-out prompts, or which of two completions got more reward."""
    schema: Literal["urn:subnet-ft:study:1"] = "urn:subnet-ft:study:1"
    """Identifier of the JSON schema that this follows; the number rises when a reader must change."""

    def cell(self, name: str) -> CellResult | None:
        """Return the cell of this name, if it was run."""
        return next((cell for cell in self.cells if cell.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> StudyReport:
        """Rebuild a study from what `study.json` holds: the reader for scripts."""
        return from_plain(cls, fields)
