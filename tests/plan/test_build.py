from __future__ import annotations

from pathlib import Path

import pytest
from helpers import random_mask
from plan.recipes import loaded, loader

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.plan.build import CLASSICAL, RESERVED_BYTES, budget_of, make_plan, plan_row
from subnet_ft.plan.request import Request


def test_make_plan_has_a_row_for_every_method_and_launch_and_torchs_adamw_beside_the_full_run() -> None:
    plan = make_plan(loader("tiny/dpo"), Request(gpus=2))
    assert [(row.method, row.sharding) for row in plan.rows] == [
        (method, sharding)
        for methods in (("full", CLASSICAL), ("subnet",), ("lora",))
        for sharding in ("ddp", "fsdp2")
        for method in methods
    ]


def test_make_plan_says_where_the_density_is_from(tmp_path: Path) -> None:
    mask = random_mask(tiny_model("llama"), 0.3)
    path = mask.save(tmp_path / "a.subnet.safetensors")
    cases = {
        "assumed": ((), Request(), 0.2),
        "--density": ((), Request(density=0.4), 0.4),
        str(path): ((), Request(mask=path), mask.density),
        "subnet.source.density": (("subnet.source={kind: uniform, density: 0.1}",), Request(), 0.1),
    }
    for source, (overrides, request, density) in cases.items():
        plan = make_plan(loader("tiny/dpo"), request, overrides)
        assert (plan.density, plan.density_from) == (density, source)
        assert any("Density" in text for text in plan.assumptions) == (source == "assumed")
    named = make_plan(loader("tiny/dpo"), Request(), (f"subnet.source={{kind: file, path: {path}}}",))
    assert named.density == mask.density
    subnet = next(row for row in named.rows if row.method == "subnet")
    assert subnet.num_trainable == mask.num_trainable


@pytest.mark.parametrize(
    ("name", "method", "sharding", "gpus", "reason"),
    [
        ("ppo", "full", "ddp", 2, "one process only"),
        ("prime", "subnet", "fsdp2", 2, "one process only"),
        ("dpo", "lora", "fsdp2", 2, "choose ddp"),
    ],
)
def test_plan_row_refuses_what_training_refuses(name: str, method: str, sharding: str, gpus: int, reason: str) -> None:
    row = plan_row(loaded(f"tiny/{name}"), Request(gpus=gpus), method, sharding)
    assert row.memory is row.fits is None
    assert row.refused is not None
    assert reason in row.refused


def test_plan_row_of_torchs_adamw_holds_eight_bytes_per_weight() -> None:
    row = plan_row(loaded("tiny/grpo"), Request(), CLASSICAL, "none")
    assert row.memory is not None
    assert row.memory.persistent_bytes == 8 * row.num_parameters


def test_plan_row_of_torchs_adamw_reduces_dense_gradients() -> None:
    row = plan_row(loaded("tiny/dpo"), Request(gpus=4), CLASSICAL, "ddp")
    assert row.traffic is not None
    assert row.traffic.total == int(2 * 3 / 4 * 2 * row.num_parameters)


def test_fits_leaves_a_reserve() -> None:
    request = Request(memory=24 * 10**9)
    assert budget_of(request) == int(0.95 * 24e9) - RESERVED_BYTES
    assert plan_row(loaded("tiny/grpo"), request, "full", "none").fits is True
    assert plan_row(loaded("tiny/grpo"), Request(memory=10**9), "full", "none").fits is True
    assert plan_row(loaded("tiny/grpo"), Request(memory=8 * 10**8), "full", "none").fits is False
    assert plan_row(loaded("tiny/grpo"), Request(), "full", "none").fits is None
