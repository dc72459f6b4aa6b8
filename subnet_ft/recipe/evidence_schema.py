"""What a recipe can ask for beside the verdict: repeats with other seeds, retention, agreement, spectra, dynamics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from subnet_ft.recipe.ranges import Count, CountOrZero
from subnet_ft.recipe.task_schema import TaskSpec


@dataclass(frozen=True, kw_only=True)
class RepeatsSpec:
    """The same data and base with other seeds of training: what differs by chance alone."""

    seeds: list[CountOrZero] = field(default_factory=list)
    """Further seeds of training, beside the recipe's own."""

    runs: Literal["full", "subnet", "all"] = "full"
    """What is repeated: the full run alone, which gives the floor; with its mask and subnetwork run, which gives the
    summary over seeds; or all, the controls too."""


@dataclass(frozen=True, kw_only=True)
class RetentionSpec:
    """What the models keep of the base's other abilities."""

    tasks: list[TaskSpec] = field(default_factory=list)
    """Tasks that were not trained, each with `num_eval` prompts."""

    max_new_tokens: Count = 32
    """Longest answer on these tasks, in tokens."""

    text: str | None = None
    """File of neutral text, paragraphs apart by an empty line, on which the models are compared with the base; `None`:
    the one that comes with subnet-ft."""

    max_tokens: Count = 2048
    """Tokens of that text."""


@dataclass(frozen=True, kw_only=True)
class EvidenceSpec:
    """What is measured beside accuracy and weights."""

    spectra: Literal["none", "sampled", "all"] = "sampled"
    """Singular values of the changes: of no matrix, of some layers' (first, middle and last), or of all."""

    dynamics_steps: Count | None = None
    """Look every so many steps at which weights have changed so far; `None`: never."""
