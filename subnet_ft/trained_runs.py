"""What a run trained, by role: full run, subnetwork, controls, baselines, repeats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from subnet_ft.stages import TrainedStage


@dataclass(frozen=True)
class TrainedRuns:
    """The trained stages of a run.

    Args:
        full: The full run.
        subnet: The subnetwork run.
        controls: Name to control, such as `control-uniform`.
        baselines: Method to its run.
        repeats: Seed to what was repeated with it, under the names of the first seed's stages.
        probe: The few steps that the mask was made from, if it was.
    """

    full: TrainedStage
    subnet: TrainedStage
    controls: Mapping[str, TrainedStage] = field(default_factory=dict)
    baselines: Mapping[str, TrainedStage] = field(default_factory=dict)
    repeats: Mapping[int, Mapping[str, TrainedStage]] = field(default_factory=dict)
    probe: TrainedStage | None = None

    @property
    def masked(self) -> dict[str, TrainedStage]:
        """Full run, subnetwork run and controls, by name."""
        return {"full": self.full, "subnet": self.subnet, **self.controls}

    @property
    def all(self) -> dict[str, TrainedStage]:
        """Every run by its name, the probe included; a repeated one has the seed's folder before it, as in
        `seed-1/full`."""
        repeated = {f"seed-{seed}/{name}": run for seed, stages in self.repeats.items() for name, run in stages.items()}
        probe = {} if self.probe is None else {"probe": self.probe}
        return {**self.masked, **self.baselines, **repeated, **probe}
