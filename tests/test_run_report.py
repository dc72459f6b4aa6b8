"""What a run's report says of times and memory that do not compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from subnet_ft.evidence.report import DeltaSize
from subnet_ft.run_report import cost_gaps, delta_gaps, delta_size
from subnet_ft.stages import TrainedStage
from subnet_ft.trained_runs import TrainedRuns


def stage(*, threads: int = 2, resumed_from: str | None = None) -> TrainedStage:
    results: dict[str, Any] = {"environment": {"torch_threads": threads}, "resumed_from": resumed_from}
    return TrainedStage(Path("nowhere"), None, results)


def test_cost_gaps_of_runs_under_the_same_conditions_are_none() -> None:
    assert cost_gaps(TrainedRuns(stage(), stage(), probe=stage())) == []


def test_cost_gaps_name_the_probe_that_was_resumed_or_measured_elsewhere() -> None:
    resumed, other = stage(resumed_from="checkpoint-3"), stage(threads=64)
    (sentence,) = cost_gaps(TrainedRuns(stage(), stage(), probe=resumed))
    assert sentence.startswith("The whole training time of `probe`: it was interrupted and resumed from checkpoint-3")
    (sentence,) = cost_gaps(TrainedRuns(stage(), stage(), probe=other))
    assert sentence.endswith("`torch_threads` is 2 for full and subnet, 64 for probe.")


def test_delta_size_and_gaps_of_runs_with_a_delta_without_one_and_from_before_there_were_any() -> None:
    figures = {"bytes": 3, "dense_bytes": 8, "density": 0.2, "sha256": "ab"}
    with_one = TrainedStage(Path("nowhere"), None, {"delta": figures})
    without = TrainedStage(Path("nowhere"), None, {"delta": {"missing": "`a` is float32 in the base."}})
    assert (delta_size(with_one), delta_gaps(with_one)) == (DeltaSize(**figures), [])
    assert (delta_size(stage()), delta_gaps(stage())) == (None, [])
    assert delta_size(without) is None
    assert delta_gaps(without) == [
        "The size of the subnetwork as a delta, as there is none: `a` is float32 in the base."
    ]
