"""Adapters start as their base, from their seed, in one dtype; what cannot be is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits

from subnet_ft.checkpoints.models import load_model, save_with_reward_head
from subnet_ft.checkpoints.tiny import save_tiny, tiny_model, tiny_tokenizer
from subnet_ft.errors import MethodError
from subnet_ft.methods.adapters import adapter_config, adapter_mask, adapter_parameters, attach
from subnet_ft.recipe.methods import METHODS

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {},
    "eva": {"r": 4},
    "ia3": {},
    "shira": {"r": 4},
    "prompt_tuning": {},
    "prefix_tuning": {},
    "adapters": {},
    "adaption_prompt": {},
}
"""A config for a tiny model of every method whose base is dense."""

TEXTS = [f"{a} + {b} = " for a in range(40) for b in range(5)]
IDS = torch.arange(2, 34).view(2, 16)


def attached(name: str, *, seed: int = 0, **options: Any) -> Any:
    return attach(tiny_model("llama", **options), tiny_tokenizer(), name, CONFIGS[name], seed=seed, texts=TEXTS)


@pytest.mark.parametrize("name", CONFIGS)
def test_attach_gives_the_same_bits_for_the_same_seed(name: str) -> None:
    state = torch.get_rng_state()
    first = adapter_parameters(attached(name))
    assert torch.equal(torch.get_rng_state(), state)
    again, other = adapter_parameters(attached(name)), adapter_parameters(attached(name, seed=1))
    assert first.keys() == again.keys()
    assert all(same_bits(first[key].data, again[key].data) for key in first)
    # IA3 starts at one everywhere, SHiRA at zero; EVA's start follows from the prompts.
    if name not in ("ia3", "shira", "eva"):
        assert any(not same_bits(first[key].data, other[key].data) for key in first)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("prompt_tuning", "prefix_tuning")])
def test_attach_starts_as_the_base(name: str) -> None:
    model = tiny_model("llama")
    base = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(IDS).logits
        adapted = attach(model, tiny_tokenizer(), name, CONFIGS[name], seed=0, texts=TEXTS)
        found = adapted(IDS).logits
    if name == "dora":  # a length divided by itself, row by row, in bfloat16
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03)
    else:
        assert same_bits(found, expected)
    held = [p.detach() for p in adapted.parameters() if not p.requires_grad]
    assert len(held) == len(list(tiny_model("llama").parameters()))
    assert all(any(same_bits(value, weight) for value in base.values()) for weight in held)


def test_attach_gives_dora_the_base_in_float32() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        expected = model(IDS).logits
        torch.testing.assert_close(attach(model, tiny_tokenizer(), "dora", seed=0)(IDS).logits, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_attach_trains_in_float32(name: str) -> None:
    dtypes = {parameter.dtype for parameter in adapter_parameters(attached(name)).values()}
    assert dtypes == {torch.bfloat16 if name == "adaption_prompt" else torch.float32}


def test_adapter_mask_is_full_on_the_adapter_and_empty_on_the_base() -> None:
    model = attached("lora")
    mask = adapter_mask(model)
    mask.check(model)
    for name, parameter in model.named_parameters():
        assert mask.tensors[name].count == (parameter.numel() if "lora_" in name else 0)


@pytest.mark.parametrize(
    ("family", "name", "config", "message"),
    [
        ("qwen2", "adaption_prompt", {}, r"`adaption_prompt` does not go with `Qwen2ForCausalLM`: Unsupported model"),
        ("granite", "ia3", {}, r"`ia3` .*`GraniteForCausalLM`: Please specify `target_modules`.*methods\.ia3\.config"),
        ("llama", "shira", {"r": 16}, r"`shira` .*more shira params than the total number"),
        ("llama", "lora", {"target_modules": ["nope"]}, r"`lora` .*nope.* not found in the base model"),
    ],
)
def test_attach_refuses_what_cannot_be(family: str, name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        attach(tiny_model(family), tiny_tokenizer(), name, config, seed=0)


@pytest.mark.parametrize("name", ["lora", "dora", "eva", "ia3", "shira", "adapters"])
def test_attach_trains_the_head_of_a_reward_model(name: str, tmp_path: Path) -> None:
    """A copy of it, in the base's dtype; the base keeps its own, and the model starts as the base."""
    save_with_reward_head(save_tiny("llama", tmp_path / "writer"), tmp_path / "base", dtype="bfloat16", seed=0)
    model, tokenizer = load_model(tmp_path / "base", dtype="bfloat16", kind="reward_model")
    head = dict(model.named_parameters())["score.weight"]
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    adapted: Any = attach(model, tokenizer, name, CONFIGS[name], seed=0, texts=TEXTS)
    trained = adapter_parameters(adapted)
    (key,) = [key for key in trained if "score" in key]
    assert same_bits(trained[key].data, head.data)
    assert trained[key] is not head
    assert {p.dtype for other, p in trained.items() if other != key} == {torch.float32}
    assert len(trained) == 1 + len(adapter_parameters(attached(name)))
    with torch.no_grad():
        if name != "dora":
            assert same_bits(adapted.eval()(IDS).logits, expected)
        trained[key].zero_()
        assert not adapted.eval()(IDS).logits.any()
        with adapted.disable_adapter():
            assert same_bits(adapted(IDS).logits, expected)


@pytest.mark.parametrize("name", ["adaption_prompt"])
def test_attach_refuses_to_leave_a_new_head_as_it_was_drawn(name: str, tmp_path: Path) -> None:
    save_with_reward_head(save_tiny("llama", tmp_path / "writer"), tmp_path / "base", dtype="bfloat16", seed=0)
    model, tokenizer = load_model(tmp_path / "base", dtype="bfloat16", kind="reward_model")
    with pytest.raises(MethodError, match=r"`AdaptionPromptConfig` leaves `score\.weight` as it was drawn"):
        attach(model, tokenizer, name, seed=0)


def test_adapter_config_puts_the_recipe_over_defaults_and_under_what_is_fixed() -> None:
    config: Any = adapter_config(METHODS["dora"], {"r": 3, "use_dora": False}, base="x")
    assert (config.r, config.lora_alpha, config.use_dora, config.task_type) == (3, 32, True, "CAUSAL_LM")
    words = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "add", "num_virtual_tokens": 2}
    prompt: Any = adapter_config(METHODS["prompt_tuning"], words, base="the base's folder")
    assert prompt.tokenizer_name_or_path == "the base's folder"
