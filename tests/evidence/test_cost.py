"""What runs cost with what they need: sums of times, the largest of peaks, and nothing that was not measured."""

from __future__ import annotations

from typing import Any

import pytest

from subnet_ft.evidence.cost import Cost, mask_origin, run_costs

SECONDS = {
    "full": {"train": 100.0, "evaluate": 7.0},
    "subnet": {"train": 60.0, "evaluate": 5.0},
    "probe": {"train": 4.0},
    "lora": {"train": 70.0},
}
MEMORY = {
    "full": {"weights": 20, "moments": 80, "peak_rss": 500},
    "subnet": {"weights": 20, "moments": 8, "peak_rss": 300},
    "probe": {"weights": 20, "moments": 80, "peak_rss": 450},
    "lora": {"weights": 22, "peak_rss": 350},
}


def costs(needs: str | None, **changes: Any) -> dict[str, Cost]:
    arguments: dict[str, Any] = {
        "runs": {"full": None, "subnet": needs, "lora": None},
        "seconds": SECONDS,
        "memory": MEMORY,
        "mask_seconds": {"subnet": 2.0},
        "num_parameters": 10,
        **changes,
    }
    found = run_costs(arguments.pop("runs"), arguments.pop("seconds"), arguments.pop("memory"), **arguments)
    return {cost.run: cost for cost in found}


@pytest.mark.parametrize(
    ("needs", "seconds", "peak", "persistent"),
    [("full", 162.0, 500, 100), ("probe", 66.0, 450, 100), (None, 62.0, 300, 28)],
)
def test_run_costs_counts_the_run_that_a_mask_was_made_from(
    needs: str | None, seconds: float, peak: int, persistent: int
) -> None:
    cost = costs(needs)["subnet"]
    assert cost == Cost("subnet", needs, 60.0, 2.0, seconds, 300, "process", peak, 28, persistent, 2.8)


def test_run_costs_of_runs_without_a_mask_are_their_own() -> None:
    found = costs("full")
    assert found["full"] == Cost("full", None, 100.0, None, 100.0, 500, "process", 500, 100, 100, 10.0)
    assert found["lora"].first_seconds == 70.0
    assert found["lora"].first_peak_bytes == 350


def test_run_costs_does_not_guess_what_was_not_measured() -> None:
    without = costs("probe", seconds={**SECONDS, "probe": {}}, memory={"subnet": MEMORY["subnet"]})["subnet"]
    assert without.first_seconds is without.first_peak_bytes is without.first_persistent_bytes is None
    assert (without.train_seconds, without.peak_bytes) == (60.0, 300)
    assert costs("full", mask_seconds={"subnet": None})["subnet"].first_seconds is None
    assert costs("full", num_parameters=None)["subnet"].bytes_per_weight is None
    assert costs("full", seconds={}, memory={}) == {}


def test_run_costs_reads_the_peak_of_the_device_where_there_is_one() -> None:
    on_device = {name: {"weights": 20, "peak_device": size} for name, size in (("full", 900), ("subnet", 700))}
    found = costs("full", memory=on_device)
    assert (found["subnet"].peak_bytes, found["subnet"].first_peak_bytes) == (700, 900)
    assert found["subnet"].peak_of == found["full"].peak_of == "device"
    both = costs("full", memory={**on_device, "subnet": {"peak_device": 700, "peak_rss": 9000}})["subnet"]
    assert (both.peak_bytes, both.peak_of) == (700, "device")


def test_run_costs_never_takes_the_larger_of_device_and_process() -> None:
    found = costs("full", memory={**MEMORY, "subnet": {"peak_device": 700}})["subnet"]
    assert (found.peak_bytes, found.peak_of, found.first_peak_bytes) == (700, "device", None)


def test_run_costs_has_no_time_of_a_way_whose_part_was_resumed() -> None:
    of_probe = costs("probe", resumed=["probe"])
    assert of_probe["subnet"].first_seconds is None
    assert of_probe["subnet"].train_seconds == 60.0
    own = costs(None, resumed=["subnet"])["subnet"]
    assert own.train_seconds is own.first_seconds is None
    assert costs(None, resumed=["subnet"], memory={})["subnet"].peak_bytes is None


@pytest.mark.parametrize(
    ("source", "recipe_kind", "has_tuned", "origin"),
    [
        ({"kind": "extract"}, "extract", True, "full"),
        ({}, None, True, "full"),
        ({"kind": "early", "step": 3}, "early", True, "probe"),
        ({"kind": "forecast"}, "forecast", False, "probe"),
        ({"kind": "fisher"}, None, False, "probe"),
        ({"kind": "low_magnitude"}, "low_magnitude", False, "nothing"),
        ({"kind": "uniform", "seed": 0}, "uniform", False, "nothing"),
        ({"kind": "uniform", "seed": 0, "of": "5f"}, None, False, "elsewhere"),
        ({"kind": "union"}, None, False, "elsewhere"),
        ({"kind": "extract"}, "file", True, "elsewhere"),
    ],
)
def test_mask_origin_names_the_run_that_a_mask_needs(
    source: dict[str, Any], recipe_kind: str | None, has_tuned: bool, origin: str
) -> None:
    assert mask_origin(source, recipe_kind=recipe_kind, has_tuned=has_tuned) == origin
