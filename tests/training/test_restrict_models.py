"""`restrict` on other models than a plain one: averaged, mirrored, with adapters, tied, partly frozen, compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_bits, same_bits
from masked_optimizers import only
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim.swa_utils import AveragedModel
from training.every_trainer import base_model, build
from training.masked_runs import (
    FROZEN,
    Watch,
    check_weights,
    restricted,
    same_state,
    same_weights,
    state_of,
    third_of,
    weights_of,
)
from transformers import AutoModelForCausalLM, Trainer

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import MaskMismatchError, TrainerError
from subnet_ft.masks import SubnetMask
from subnet_ft.training import restrict

# Older releases of PEFT look for a config where the model came from, which is nowhere here.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")


@pytest.mark.parametrize("name", ["Trainer", "DPO", "GRPO"])
def test_restrict_beside_an_averaged_model(name: str, tmp_path: Path) -> None:
    """The average reads the weights: training does not notice, and off the mask it stays the base."""
    alone, _ = restricted(name, tmp_path, dtype=torch.float32)
    alone.train()
    trainer, mask = restricted(name, tmp_path, dtype=torch.float32)
    start = weights_of(trainer.model)
    average = AveragedModel(trainer.model)
    seen: list[dict[str, torch.Tensor]] = []

    def update(step: int) -> None:
        average.update_parameters(trainer.model)
        seen.append(weights_of(trainer.model))

    trainer.add_callback(Watch(end=update))
    trainer.train()
    same_weights(weights_of(trainer.model), weights_of(alone.model))
    check_weights(trainer.model, mask, start)
    averaged = weights_of(average.module)
    for key, value in averaged.items():
        assert same_bits(value[~mask[key]], start[key][~mask[key]])
        torch.testing.assert_close(value, torch.stack([weights[key] for weights in seen]).mean(0))


@pytest.mark.parametrize("alpha", [0.6, 1.0])
@pytest.mark.parametrize("name", ["DPO", "GRPO", "RLOO"])
def test_restrict_with_a_reference_model_that_follows(name: str, alpha: float, tmp_path: Path) -> None:
    """`sync_ref_model` writes to the reference alone; a whole copy makes it the policy, bit by bit."""
    trainer, mask = restricted(name, tmp_path, **following(alpha))
    start = weights_of(trainer.model)
    trainer.train()
    check_weights(trainer.model, mask, start)
    if alpha == 1.0:
        # TRL before 1.16 loads the reference in float32.
        reference = {key: value.to(start[key].dtype) for key, value in weights_of(trainer.ref_model).items()}
        same_weights(reference, weights_of(trainer.model))


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_restrict_resumes_with_a_reference_model_that_follows(name: str, tmp_path: Path) -> None:
    """The reference has moved by then, and is part of the checkpoint."""

    def run(folder: Path, **options: Any) -> Trainer:
        return restricted(name, folder, max_steps=4, **following(0.6), **options)[0]

    straight, resumed = run_straight_and_resumed(run, tmp_path)
    same_weights(weights_of(resumed.ref_model), weights_of(straight.ref_model))


def following(alpha: float) -> dict[str, Any]:
    return {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": alpha, "beta": 0.1}


def run_straight_and_resumed(run: Callable[..., Trainer], folder: Path) -> tuple[Trainer, Trainer]:
    """Train four steps at a stretch, and again with a break at the third; both end with the same bits."""

    def cut_off(step: int) -> None:
        if step == 3:
            raise InterruptedError

    straight = run(folder / "straight")
    straight.train()
    saving = {"save_strategy": "steps", "save_steps": 2}
    broken = run(folder / "cut", **saving)
    broken.add_callback(Watch(end=cut_off))
    with pytest.raises(InterruptedError):
        broken.train()
    resumed = run(folder / "cut", **saving)
    resumed.train(resume_from_checkpoint=True)
    same_weights(weights_of(resumed.model), weights_of(straight.model))
    same_state(state_of(resumed), state_of(straight))
    return straight, resumed


def with_adapters(seed: int = 0) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)  # zeros would leave lora_A without a gradient
    return model


def half_of_the_adapters(model: PeftModel) -> SubnetMask:
    return SubnetMask.from_dense(
        {
            key: random_bits(parameter.numel(), 0.5 if "lora_" in key else 0.0, seed).view(parameter.shape)
            for seed, (key, parameter) in enumerate(model.named_parameters())
        }
    )


@pytest.mark.parametrize("name", ["Trainer", "SFT", "DPO", "GRPO"])
def test_restrict_trains_a_part_of_the_adapters(name: str, tmp_path: Path) -> None:
    model = with_adapters()
    mask = half_of_the_adapters(model)
    start = weights_of(model)
    trainer = build(name, tmp_path, model=model, weight_decay=0.0)
    restrict(trainer, mask)
    trainer.train()
    check_weights(trainer.model, mask, start)
    assert {key for key, p in trainer.model.named_parameters() if p.requires_grad} == {k for k in start if "lora_" in k}


@pytest.mark.parametrize("name", ["Trainer", "DPO"])
def test_restrict_resumes_the_training_of_adapters(name: str, tmp_path: Path) -> None:
    """A checkpoint holds only the adapters then."""

    def run(folder: Path, **options: Any) -> Trainer:
        model = with_adapters()
        return restrict(build(name, folder, model=model, max_steps=4, **options), half_of_the_adapters(model))

    run_straight_and_resumed(run, tmp_path)
    assert (tmp_path / "cut" / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "cut" / "checkpoint-2" / "model.safetensors").exists()


def test_restrict_refuses_a_mask_of_the_model_below_the_adapters(tmp_path: Path) -> None:
    trainer = build("Trainer", tmp_path, model=with_adapters())
    with pytest.raises(
        MaskMismatchError, match=r"`base_model\.model\.model\.embed_tokens\.weight`.* only in the model"
    ):
        restrict(trainer, third_of(tiny_model("llama")))


@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.0.self_attn.q_proj.base_layer.weight"])
def test_restrict_refuses_a_mask_of_weights_that_peft_leaves_out_of_checkpoints(name: str, tmp_path: Path) -> None:
    model, lost = with_adapters(), f"base_model.model.model.{name}"
    adapters = half_of_the_adapters(model)
    trainer = build("Trainer", tmp_path, model=model)
    before = type(trainer), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(TrainerError, match=rf"The mask trains `{lost}`, which PEFT freezes.*\(1 such tensors\)"):
        restrict(trainer, only(model, {**{key: adapters[key] for key in adapters.names}, lost: True}))
    assert (type(trainer), [parameter.requires_grad for parameter in model.parameters()]) == before
    restrict(trainer, adapters).train()


@pytest.mark.parametrize("tied", [True, False])
def test_restrict_trains_the_two_embeddings_as_the_model_ties_them(tied: bool, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    mask = third_of(model)
    assert ("lm_head.weight" in mask) is not tied
    start = weights_of(model)
    trainer = restrict(build("Trainer", tmp_path, model=model), mask)
    trainer.train()
    check_weights(trainer.model, mask, start)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    same_weights(weights_of(loaded), weights_of(trainer.model))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


def test_restrict_refuses_a_mask_that_names_tied_weights_twice(tmp_path: Path) -> None:
    mask = third_of(tiny_model("llama", tie_word_embeddings=False))
    with pytest.raises(MaskMismatchError, match=r"`lm_head\.weight` only in the mask"):
        restrict(build("Trainer", tmp_path), mask)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["Trainer", "SFT", "GRPO"])
def test_restrict_checkpoints_activations_above_frozen_embeddings(
    name: str, use_reentrant: bool, tmp_path: Path
) -> None:
    """The inputs of the first layer need no gradient then; the re-entrant kind would drop every gradient below."""
    weights = []
    for options in ({}, {"activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}}):
        model = base_model(name)
        dense = third_of(model)
        frozen = {key: torch.zeros_like(dense[key]) for key in dense.names if "embed" in key or "layers.0." in key}
        mask = SubnetMask.from_dense({key: frozen.get(key, dense[key]) for key in dense.names})
        start = weights_of(model)
        trainer = build(name, tmp_path, model=model, activation_checkpointing=bool(options), **options)
        restrict(trainer, mask).train()
        check_weights(trainer.model, mask, start)
        weights.append(weights_of(trainer.model))
    same_weights(*weights)


def test_restrict_leaves_frozen_what_somebody_froze_off_the_mask(tmp_path: Path) -> None:
    model = tiny_model("llama")
    frozen = model.get_parameter(FROZEN).requires_grad_(False)
    trainer = restrict(build("Trainer", tmp_path, model=model), third_of(model))
    trainer.train()
    assert not frozen.requires_grad
    assert frozen.grad is None


def test_restrict_trains_a_model_that_is_compiled_already(tmp_path: Path) -> None:
    model = tiny_model("llama")
    mask = third_of(model)
    start = weights_of(model)
    compiled: Any = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        restrict(build("Trainer", tmp_path, model=compiled, remove_unused_columns=False), mask).train()
    check_weights(model, mask, start)


def test_restrict_exempts_what_the_trainer_exempts_from_decay(tmp_path: Path) -> None:
    trainer = build("Trainer", tmp_path, learning_rate=1e-2, weight_decay=0.5)
    exempt = {"model.embed_tokens.weight", "model.norm.weight"}
    names = [key for key, _ in trainer.model.named_parameters() if key not in exempt]
    trainer.get_decay_parameter_names = lambda model, forbidden_name_patterns=None: names
    groups = restrict(trainer, third_of(trainer.model)).create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert set(groups[1]["param_names"]) == exempt
