from __future__ import annotations

import shlex
from collections.abc import Sequence

import pytest
from plan.recipes import loader

from subnet_ft.plan.advice import Advice, advise
from subnet_ft.plan.build import CLASSICAL, Row, plan_row
from subnet_ft.plan.request import Request

# The reserve and 4 MB: less than a step of the tiny model takes.
MEMORY = int((0.8e9 + 4e6) / 0.95)


def advice_for(
    name: str,
    method: str,
    *,
    overrides: Sequence[str] = (),
    memory: int = MEMORY,
    sharding: str = "none",
    gpus: int = 1,
) -> tuple[Row, tuple[Advice, ...]]:
    load, request = loader(name), Request(memory=memory, gpus=gpus, prompt_tokens=30)
    row = plan_row(load(overrides), request, method, sharding)
    assert row.fits is False
    return row, advise(load, overrides, request, row)


def test_advise_gives_only_what_helps_and_says_by_how_much() -> None:
    row, advice = advice_for("tiny/grpo", "full")
    assert row.memory is not None
    assert advice
    for one in advice:
        assert one.total < row.memory.total
        assert one.saved == row.memory.total - one.total
        assert row.budget is not None
        assert one.fits == (one.total <= row.budget)


def test_advise_names_changes_that_can_be_pasted_and_come_to_what_they_say() -> None:
    overrides: Sequence[str] = ("subnet.optimizer.master=fp32",)
    _, advice = advice_for("tiny/grpo", "full", overrides=overrides)
    load = loader("tiny/grpo")
    of_recipe = [one for one in advice if one.change.startswith(("training.", "subnet."))]
    assert {one.change.split("=")[0] for one in of_recipe} >= {
        "subnet.optimizer.master",
        "training.activation_checkpointing",
        "training.per_device_train_batch_size",
    }
    for one in of_recipe:
        recipe = load([*overrides, *shlex.split(one.change)])
        again = plan_row(recipe, Request(memory=MEMORY, prompt_tokens=30), "full", "none")
        assert again.memory is not None
        assert again.memory.total == one.total


def test_advise_keeps_the_batch_when_it_makes_it_smaller() -> None:
    _, advice = advice_for("tiny/grpo", "full")
    (smaller,) = [one for one in advice if one.change.startswith("training.per_device_train_batch_size")]
    assert smaller.change == "training.per_device_train_batch_size=1 training.gradient_accumulation_steps=64"


def test_advise_leaves_out_what_the_recipe_has_already() -> None:
    overrides = ("subnet.optimizer.master=remainder", "training.activation_checkpointing=true")
    _, advice = advice_for("tiny/grpo", "subnet", overrides=overrides)
    assert not [one for one in advice if one.change in overrides]


def test_advise_offers_other_references_where_there_is_one() -> None:
    _, advice = advice_for("tiny/dpo", "subnet", memory=int(0.8e9 / 0.95))
    changes = {one.change for one in advice}
    assert {"training.precompute_ref_log_probs=true", "reference.source=policy"} <= changes
    _, of_grpo = advice_for("tiny/grpo", "subnet", memory=int(0.8e9 / 0.95))
    assert not [one for one in of_grpo if one.change.startswith("reference.")]


def test_advise_joins_changes_where_no_single_one_is_enough() -> None:
    row, advice = advice_for("tiny/grpo", "full", memory=int(0.8e9 / 0.95) + 1_000_000)
    (joined,) = [one for one in advice if one.reason == "All of these together."]
    assert row.memory is not None
    assert joined.total == min(one.total for one in advice if "training." in one.change)


@pytest.mark.parametrize("gpus", [1, 2])
def test_advise_finds_the_fewest_ranks_that_fit(gpus: int) -> None:
    # Enough for activations and little more: what persists has to be cut.
    load, overrides = loader("tiny/sft"), ("training.per_device_train_batch_size=1", "model.name=tiny:qwen2")
    request = Request(gpus=gpus, tokens=4, device="cuda")
    sharding = "none" if gpus == 1 else "ddp"
    row = plan_row(load(overrides), request, "full", sharding)
    assert row.memory is not None
    memory = int((row.memory.total - row.memory.persistent_bytes // 4 + 0.8e9) / 0.95)
    asked = Request(gpus=gpus, tokens=4, memory=memory)
    row = plan_row(load(overrides), asked, "full", sharding)
    advice = advise(load, overrides, asked, row)
    ranks = [one for one in advice if one.change.startswith("--gpus")]
    assert [(one.change, one.fits) for one in ranks] == [("--gpus 2 --sharding fsdp2", True)]


def test_advise_finds_the_largest_density_that_fits() -> None:
    load, overrides = loader("tiny/grpo"), ("training.per_device_train_batch_size=16",)
    row = plan_row(load(overrides), Request(density=0.9, prompt_tokens=30), "subnet", "none")
    assert row.memory is not None
    memory = int((row.memory.total - 100_000 + 0.8e9) / 0.95)
    request = Request(density=0.9, prompt_tokens=30, memory=memory)
    row = plan_row(load(overrides), request, "subnet", "none")
    (found,) = [one for one in advise(load, overrides, request, row) if one.change.startswith("--density")]
    density = float(found.change.split()[1])
    assert found.fits
    for value, fits in ((density, True), (density + 0.001, False)):
        tried = Request(density=value, prompt_tokens=30, memory=memory)
        assert plan_row(load(overrides), tried, "subnet", "none").fits is fits


def test_advise_says_nothing_about_torchs_adamw() -> None:
    assert advice_for("tiny/grpo", CLASSICAL)[1] == ()
