"""What one model of a report left behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from subnet_ft.evidence.weights import WeightComparison


@dataclass(frozen=True)
class RunEvidence:
    """What one model left behind; everything but the name may be missing."""

    name: str
    """Unique among the models of a report, such as `full` or `control-uniform`."""
    records: Sequence[Mapping[str, Any]] | None = None
    """One per held-out prompt or pair: prompt, completion, answer, score, correct; see `evidence.accuracy` and
    `evidence.pairs`."""
    log_history: Sequence[Mapping[str, Any]] = ()
    """The trainer's log."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage to time, such as train and evaluate."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Component to bytes, such as weights, gradients, moments; keys that start with `peak` are process totals."""
    weights: WeightComparison | None = None
    """Against the base model and the full run."""
    resumed_from: str | None = None
    """The trainer checkpoint that training continued from after an interruption: its time is that of the last part."""
