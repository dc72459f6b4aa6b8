"""Dynamics of a run: which weights had changed at which step, and what rounding kept from changing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from subnet_ft.errors import StageError
from subnet_ft.evidence.plain import from_plain

DYNAMICS = "dynamics.json"
"""File in a run's folder, which `subnet_ft.training.TrainingDynamics` writes."""

FORMAT = 1
"""Version of the file."""

_BY_STEP = (
    "density", "ever", "recall", "coverage", "jaccard", "num_updates", "changed_in_step",
    "lost_with_masters", "lost_without_masters",
)  # fmt: skip
_SHARES = ("never", "cancelled", "final", *(name for name in _BY_STEP if name != "num_updates"))


@dataclass(frozen=True)
class Dynamics:
    """What a run's snapshots saw. A weight has changed when its bits are not those of the base.

    Everything in a list has one entry per snapshot; shares lie in [0, 1] and are of all weights of the model unless
    said otherwise. The weights that differ from the base at the last snapshot are the run's final mask.
    """

    every: int
    """Optimizer steps from one snapshot to the next. With 1 nothing is missed; otherwise a weight that changed and came
    back between two snapshots counts as never changed."""
    steps: list[int]
    """Step of each snapshot, rising; the last one is the end of the run."""
    num_parameters: int
    """Weights of the model."""
    num_trainable: int
    """Weights of the run's mask at its end; all of them in a full run."""

    never: float
    """Share that differed from the base in no snapshot."""
    cancelled: float
    """Share that differed in a snapshot and is the base's again at the end."""
    final: float
    """Share that differs at the end: the density of the final mask. With the two above it adds up to 1."""

    density: list[float]
    """Share that differs from the base at this step."""
    ever: list[float]
    """Share that differed in this snapshot or an earlier one."""
    recall: list[float | None]
    """Share of the final mask that differs at this step already; `None` where the final mask is empty."""
    coverage: list[float | None]
    """Share of what differs at this step that the final mask has, too (its precision); `None` where nothing differs."""
    jaccard: list[float | None]
    """What differs at this step and at the snapshot before, over what differs at either; `None` for the first one and
    where nothing differs at either."""

    num_updates: list[int | None]
    """Weights whose float32 value the step that ends here moved: the attempted updates. `None`: see `missing`."""
    changed_in_step: list[float | None]
    """Share whose stored bits that step changed."""
    lost_with_masters: list[float | None]
    """Share of the attempted updates that left the stored bits as they were. A master keeps them for later steps.
    `None` also where the run kept no masters."""
    lost_without_masters: list[float | None]
    """Share of the attempted updates that would leave the stored bits as they were if the same change were added to the
    stored weight and the sum rounded: what training without masters loses in this step for good."""
    missing: str
    """Why the four lists above have no values; empty where they have."""

    seconds: float
    """Wall time of all snapshots."""
    peak_bytes: int
    """Most memory that a snapshot held beside the run, counted: never a copy of the model."""
    disk_bytes: int
    """Bytes of all bitmaps on the disk while the run lasted: one bit per weight and snapshot."""


def read_dynamics(path: str | Path) -> Dynamics:
    """Read and check the file that a run left.

    Args:
        path: The file, or the folder of the run that has it.

    Raises:
        StageError: There is none, or it is not what `TrainingDynamics` writes.
    """
    path = Path(path)
    file = path / DYNAMICS if path.is_dir() else path
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(
            f"`{file}` is missing: the run took no snapshots. Train again with `evidence.dynamics_steps` in the "
            "recipe, or with a `TrainingDynamics` callback."
        ) from None
    except (OSError, ValueError) as error:
        raise StageError(f"`{file}` cannot be read as JSON ({error}). Train again.") from error
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise StageError(f"`{file}` is not a `{DYNAMICS}` of format {FORMAT}, which this release reads. Train again.")
    try:
        absent = [field.name for field in fields(Dynamics) if field.name not in found]
        if absent:
            raise TypeError(f"`{absent[0]}` is missing.")
        dynamics = from_plain(Dynamics, found)
        _check(dynamics)
    except (TypeError, ValueError) as error:
        raise StageError(f"`{file}` breaks its format: {error} Train again.") from error
    return dynamics


def _check(dynamics: Dynamics) -> None:
    """Raise TypeError or ValueError for figures that cannot be those of a run."""
    steps = dynamics.steps
    if not steps or any(b <= a for a, b in zip([0, *steps], steps, strict=False)):
        raise ValueError(f"`steps` must rise from 1 on, got {steps}.")
    for name in _BY_STEP:
        if len(getattr(dynamics, name)) != len(steps):
            raise ValueError(f"`{name}` has {len(getattr(dynamics, name))} entries for {len(steps)} snapshots.")
    for name in _SHARES:
        value = getattr(dynamics, name)
        for share in value if isinstance(value, list) else [value]:
            if share is not None and not 0.0 <= share <= 1.0:
                raise ValueError(f"`{name}` must lie in [0, 1], got {share}.")
    total = dynamics.never + dynamics.cancelled + dynamics.final
    if not math.isclose(total, 1.0, abs_tol=1e-9) or dynamics.density[-1] != dynamics.final:
        raise ValueError(
            f"`never`, `cancelled` and `final` must add up to 1, and the last `density` be `final`; got "
            f"{dynamics.never}, {dynamics.cancelled}, {dynamics.final} and {dynamics.density[-1]}."
        )
