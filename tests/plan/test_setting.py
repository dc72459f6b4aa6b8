from __future__ import annotations

import pytest
from plan.recipes import loaded

from subnet_ft.plan.request import Request
from subnet_ft.plan.setting import setting_of
from subnet_ft.recipe.algorithms import ALGORITHMS

CPU = Request(device="cpu")


def test_setting_of_grpo_samples_what_it_trains_on() -> None:
    setting = setting_of(loaded("tiny/grpo"), Request(prompt_tokens=30), "full")
    assert (setting.sequences, setting.length, setting.scored) == (64, 32, 2)
    generation = setting.generation
    assert generation is not None
    assert (generation.sequences, generation.prompt, generation.new, generation.passes) == (64, 30, 2, 1.0)
    assert not setting.activation_checkpointing
    assert not setting.has_reference
    # TRL's head scores all positions where there is no Triton.
    assert setting_of(loaded("tiny/grpo"), Request(prompt_tokens=30, device="cpu"), "full").scored == 31


def test_setting_of_counts_prompts_that_are_at_hand_and_assumes_others() -> None:
    counted = setting_of(loaded("tiny/grpo"), Request(), "full")
    assert counted.generation is not None
    assert 10 < counted.generation.prompt < 40
    assert not counted.assumptions
    assumed = setting_of(loaded("tiny/grpo", "model.name=owner/model"), Request(), "full")
    assert assumed.generation is not None
    assert assumed.generation.prompt == 512
    assert "--prompt-tokens" in assumed.assumptions[0]


def test_setting_of_stored_data_is_as_long_as_the_recipe_allows_or_as_is_said() -> None:
    recipe = loaded("tiny/reward", "training.max_length=77", "model.name=owner/model")
    assert setting_of(recipe, Request(tokens=9), "full").length == 9
    bounded = setting_of(loaded("tiny/dpo", "training.max_length=7"), Request(), "full")
    assert (bounded.length, bounded.sequences) == (7, 2 * bounded.batch_size)


@pytest.mark.parametrize(
    ("override", "engine"),
    [("training.vllm_mode=server", "server"), ("training.vllm_mode=colocate", "colocate")],
)
def test_setting_of_vllm(override: str, engine: str) -> None:
    recipe = loaded("tiny/grpo", "training.use_vllm=true", override)
    generation = setting_of(recipe, CPU, "full").generation
    assert generation is not None
    assert generation.engine == engine
    assert (generation.engine_share > 0) == (engine == "colocate")


def test_setting_of_rounds_of_sampling_per_step() -> None:
    recipe = loaded("tiny/grpo", "training.gradient_accumulation_steps=8", "training.steps_per_generation=2")
    generation = setting_of(recipe, CPU, "full").generation
    assert generation is not None
    assert (generation.sequences, generation.passes) == (128, 4.0)


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("dpo", (), True),
        ("dpo", ("training.precompute_ref_log_probs=true",), False),
        ("grpo", (), False),
        ("grpo", ("training.beta=0.1",), True),
        ("ppo", ("training.kl_coef=0.0",), False),
        ("prime", (), True),
        ("sft", (), False),
    ],
)
def test_setting_of_knows_who_holds_a_reference(name: str, overrides: tuple[str, ...], expected: bool) -> None:
    assert setting_of(loaded(f"tiny/{name}", *overrides), CPU, "full").has_reference is expected


def test_setting_of_knows_what_else_is_held() -> None:
    found = {name: setting_of(loaded(f"tiny/{name}"), CPU, "full") for name in ALGORITHMS}
    assert {name: s.beside for name, s in found.items() if s.beside} == {"ppo": "value_model", "prime": "reward_model"}
    assert {name for name, s in found.items() if s.has_teacher} == {"distillation"}
    assert {name for name, s in found.items() if s.head == "whole"} == {"orpo", "simpo"}
    assert {name for name, s in found.items() if s.head == "none"} == {"reward"}
