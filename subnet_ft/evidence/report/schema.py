"""What `report.json` holds, field by field. A share is in [0, 1], a time in seconds, a size in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from subnet_ft.evidence.agreement import Agreement
from subnet_ft.evidence.cost import Cost, Origin
from subnet_ft.evidence.dynamics import Dynamics
from subnet_ft.evidence.floor import Floor
from subnet_ft.evidence.overlap import MaskOverlap
from subnet_ft.evidence.plain import from_plain
from subnet_ft.evidence.retention import Retention, RetentionDifference
from subnet_ft.evidence.scatter import Scatter
from subnet_ft.evidence.seeds import SeedSummary
from subnet_ft.evidence.spectra import Spectra
from subnet_ft.evidence.structure import Structure
from subnet_ft.evidence.verdict import Comparison, Verdict, VerdictName
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
    bootstrap_low: float | None = None
    """Lower end of a bootstrap's interval over prompts, at the same confidence; no verdict rests on it."""
    bootstrap_high: float | None = None
    """Upper end."""
    mcnemar_p: float | None = None
    """Two-sided mid-p value of McNemar's test; no verdict rests on it."""


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
    """Weights that train."""
    num_parameters: int
    """Weights of the model."""
    fingerprint: str
    """Of the mask's bits."""
    criterion: str | None
    """When a weight counts as changed, for masks that compare two checkpoints."""
    tolerance: float | None
    """Of the criterion."""
    compare_dtype: str | None
    """Dtype in which the checkpoints were compared, if not the stored one."""
    source: dict[str, Any]
    """The mask's own record of where it comes from."""
    base: str | None
    """Base checkpoint."""
    tuned: str | None
    """Tuned checkpoint."""
    seconds: float | None
    """Time to make the mask, without the run that it was made from."""
    origin: Origin
    """Which run it was made from: `full`, `probe` (a few steps of the full run's method), `elsewhere` (one that this
    report knows nothing of), or `nothing` but the base."""


@dataclass(frozen=True)
class DeltaSize:
    """The subnetwork run as a delta: the new values of its mask, a patch of the base."""

    bytes: int
    """Of the delta's file."""
    dense_bytes: int
    """Of the checkpoint's weight files, which base and delta give back."""
    density: float
    """Share of the weights that the delta has a value for."""
    sha256: str
    """That the delta's file records of itself."""


@dataclass(frozen=True)
class Answered:
    """One model's answer to one prompt."""

    completion: str
    """Its text."""
    correct: bool
    """Whether it was counted as right."""


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with the answers of several models."""

    prompt: str
    """Its text."""
    reference: str
    """The right answer; empty where the task has none."""
    answers: dict[str, Answered]
    """By model name."""


SCHEMA: Final = "urn:subnet-ft:report:1"


@dataclass(frozen=True, kw_only=True)
class Report:
    """All evidence on one subnetwork; `report.json` is exactly this."""

    schema: Literal["urn:subnet-ft:report:1"] = SCHEMA
    """Identifier of the JSON schema that this follows; the number rises when a reader must change."""
    version: str
    """Version of subnet-ft that wrote it."""
    title: str
    """What was run, in a few words."""
    verdict: VerdictName
    """Whether training the subnetwork alone recovered what the full run gained."""
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
    baselines: list[str] = field(default_factory=list)
    """Names of other methods' runs, such as `lora`."""
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
    """Full minus base, every run minus full, subnetwork minus every control and baseline."""
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
    overlaps: list[MaskOverlap] = field(default_factory=list)
    """Every two masks of the run."""
    structure: Structure | None = None
    """How the subnetwork's mask spreads over rows, columns and heads."""
    spectra: Spectra | None = None
    """Singular values of what the full run added to the base."""
    dynamics: dict[str, Dynamics] = field(default_factory=dict)
    """Run to which weights had changed at which step."""
    agreement: dict[str, Agreement] = field(default_factory=dict)
    """Model to how like the full run's its outputs are."""
    retention: dict[str, Retention] = field(default_factory=dict)
    """Model to what it keeps of the base."""
    retention_differences: list[RetentionDifference] = field(default_factory=list)
    """On tasks that were not trained: every run minus base, subnetwork minus every other run."""
    floor: Floor | None = None
    """The full run beside another one with a different seed."""
    seeds_summary: list[SeedSummary] = field(default_factory=list)
    """Run to its verdict over several seeds of training."""
    scatter: Scatter | None = None
    """What every run under a mask changed against what the full run changed, weight by weight."""
    costs: list[Cost] = field(default_factory=list)
    """The way to every run, the making of its mask included."""
    delta: DeltaSize | None = None
    """What the subnetwork takes in storage beside its base."""

    @property
    def runs(self) -> list[str]:
        """The trained runs in reading order: full, subnetwork, controls, baselines."""
        return [self.full, self.subnet, *self.controls, *self.baselines]

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
        return from_plain(cls, fields)
