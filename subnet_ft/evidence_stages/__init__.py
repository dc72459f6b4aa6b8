"""The evidence beside accuracy and weights, each piece a stage of the run: made once while its inputs stay the same."""

from __future__ import annotations

from subnet_ft.evidence_stages.outputs import OutputEvidence
from subnet_ft.evidence_stages.over_seeds import over_seeds
from subnet_ft.evidence_stages.weights import WeightEvidence

__all__ = ["OutputEvidence", "WeightEvidence", "over_seeds"]
