from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from plan.recipes import loaded

from subnet_ft.plan.build import plan_row, shapes_for, trained_by
from subnet_ft.plan.rank import RankMemory
from subnet_ft.plan.request import Request


def memory_of(name: str, *overrides: str, method: str = "subnet", sharding: str = "none", **options: Any) -> RankMemory:
    row = plan_row(loaded(name, *overrides), Request(density=0.2, **options), method, sharding)
    assert row.memory is not None
    return row.memory


def parts(memory: RankMemory, phase: str | None = None) -> dict[str, int]:
    chosen = memory.persistent if phase is None else next(found.parts for found in memory.phases if found.name == phase)
    return {part.name: part.nbytes for part in chosen}


def test_total_is_what_persists_and_the_largest_phase() -> None:
    memory = memory_of("tiny/grpo")
    assert {phase.name for phase in memory.phases} == {"head", "backward", "sampling"}
    assert memory.total == sum(parts(memory).values()) + max(phase.nbytes for phase in memory.phases)
    assert all(part.is_exact for part in memory.persistent)
    assert not any(part.is_exact for phase in memory.phases for part in phase.parts)


def test_fsdp2_holds_a_part_of_everything_and_gathers_layers() -> None:
    whole, part = (memory_of("tiny/dpo", sharding=sharding, gpus=4) for sharding in ("ddp", "fsdp2"))
    for name in ("weights", "gradients", "moments", "masters", "reference model"):
        assert parts(part)[name] == pytest.approx(parts(whole)[name] / 4, rel=0.05)
    assert parts(part, "backward")["gathered weights"] > 0
    assert "gathered weights" not in parts(whole, "backward")


def test_fsdp2_with_several_micro_batches_holds_whole_dense_gradients() -> None:
    one, two = (
        memory_of("tiny/dpo", f"training.gradient_accumulation_steps={n}", sharding="fsdp2", gpus=2) for n in (1, 2)
    )
    more = parts(two, "backward")["gradients to reduce"] - parts(one, "backward")["gradients to reduce"]
    recipe = loaded("tiny/dpo")
    shapes = shapes_for(recipe)
    assert more == 2 * trained_by(recipe, shapes, Request(), "full").num_parameters


def test_offload_moves_what_persists_to_the_cpu() -> None:
    on_gpu, off = (memory_of("tiny/dpo", sharding=name, gpus=2) for name in ("fsdp2", "fsdp2_offload"))
    assert off.persistent == ()
    assert off.host == on_gpu.persistent
    assert off.total < on_gpu.total


def test_master_remainder_halves_the_masters_of_masks_and_leaves_adapters_alone() -> None:
    remainder = "subnet.optimizer.master=remainder"
    assert 2 * parts(memory_of("tiny/grpo", remainder))["masters"] == parts(memory_of("tiny/grpo"))["masters"]
    lora = [memory_of("tiny/grpo", *options, method="lora") for options in ((), (remainder,))]
    assert lora[0].persistent == lora[1].persistent


def test_reference_from_the_policy_costs_the_masks_values() -> None:
    second, free = (memory_of("tiny/dpo", f"reference.source={source}") for source in ("model", "policy"))
    assert parts(free)["reference model"] < 0.4 * parts(second)["reference model"]
    assert "reference model" not in parts(memory_of("tiny/dpo", method="lora"))


def test_ppo_and_prime_hold_the_model_that_they_train_beside_the_policy() -> None:
    ppo, prime = memory_of("tiny/ppo"), memory_of("tiny/prime")
    assert {"value model", "value optimizer"} <= parts(ppo).keys()
    assert {"reward model", "reward optimizer", "reference model"} <= parts(prime).keys()
    assert "reward model" in {phase.name for phase in prime.phases}
    like_policy = memory_of("tiny/ppo", "training.value_trains=subnet")
    assert parts(like_policy)["value optimizer"] < 0.3 * parts(ppo)["value optimizer"]


def test_distillation_holds_the_teacher() -> None:
    memory = memory_of("tiny/distillation", "teacher.name=tiny:llama")
    assert parts(memory)["teacher model"] == parts(memory)["weights"]


def test_vllm_takes_the_place_of_sampling() -> None:
    server = memory_of("tiny/grpo", "training.use_vllm=true", "training.vllm_mode=server")
    assert "sampling" not in {phase.name for phase in server.phases}
    beside = memory_of(
        "tiny/grpo",
        "training.use_vllm=true",
        "training.vllm_mode=colocate",
        "training.vllm_gpu_memory_utilization=0.3",
        memory=10**9,
    )
    assert parts(beside)["vLLM beside the trainer"] == 3 * 10**8


def test_sampling_grows_with_completions_and_their_tokens() -> None:
    few = memory_of("tiny/grpo", prompt_tokens=20)
    many = memory_of("tiny/grpo", "training.max_completion_length=24", prompt_tokens=20)
    assert parts(many, "sampling")["keys and values"] == 2 * parts(few, "sampling")["keys and values"]
    assert dataclasses.is_dataclass(many)
