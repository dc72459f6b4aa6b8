"""What a recipe can say about masks: where the subnetwork's comes from, and the controls beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from subnet_ft.recipe.ranges import Count, Range

Criterion = Literal["exact", "absolute", "relative"]
Control = Literal[
    "uniform", "magnitude_matched", "inverted", "layer_permuted", "low_magnitude", "principal", "non_principal"
]
SourceKind = Literal[
    "extract", "file", "early", "forecast", "gradient", "fisher", "low_magnitude", "predicted", "principal",
    "non_principal", "uniform",
]  # fmt: skip

SOURCE_KINDS: tuple[SourceKind, ...] = get_args(SourceKind)
COMPARED = ("extract", "early")
"""Kinds of source that compare checkpoints, by a criterion."""
PROBED = ("early", "forecast", "gradient", "fisher")
"""Kinds that need the first steps of a full run."""
READ_MOMENTS = ("forecast", "gradient", "fisher")
"""Kinds that need what AdamW knew of every weight after these steps."""
CHOSEN = tuple(kind for kind in SOURCE_KINDS if kind not in ("extract", "file", "early"))
"""Kinds that rank the weights, so that the recipe says how many are trained."""


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """Where the subnetwork's mask comes from."""

    kind: SourceKind = "extract"
    """`extract`: the weights that the full run changed. `file`: a saved mask. From the first `steps` of a full run:
    `early` (what they changed), `forecast` (what they say the whole run will change), `gradient` and `fisher` (large
    gradients at the base). From the base alone: `low_magnitude`, `predicted` (by the spacing of bfloat16), `principal`,
    `non_principal`, `uniform`. docs/masks.md says what each is."""

    criterion: Criterion = "exact"
    """When a weight counts as changed: its bits differ, |delta| > tolerance, or |delta| > tolerance * |base|."""

    tolerance: Annotated[float, Range(least=0.0)] = 0.0
    """Tolerance of `absolute` and `relative`; 0 for `exact`."""

    path: str | None = None
    """The mask file of `kind: file`."""

    steps: Count | None = None
    """Optimizer steps of the full run that `early`, `forecast`, `gradient` and `fisher` look at."""

    density: Annotated[float, Range(above=0.0, below=1.0)] | None = None
    """Share of the weights to train, for the kinds that rank weights; `None` lets `forecast` estimate how many the
    whole run will change."""
