"""A free reference gives the losses of a second model to the last bit, leaves the policy alone, refuses the rest."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits
from training.every_trainer import base_model, build
from training.free_reference_runs import WITH_KL, left_by, run, same, trainer_with_reference
from training.masked_runs import same_weights, third_of, weights_of

import subnet_kernels
from subnet_ft.errors import MaskMismatchError, TrainerError
from subnet_ft.masks import SubnetMask
from subnet_ft.recipe.algorithms import ALGORITHMS
from subnet_ft.training import MaskSchedule, restrict
from subnet_ft.training.free_reference import FreeReference, take_reference_from_policy

MAIN = ("DPO", "KTO", "GRPO")
INPUTS = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 3, 4, 2]])}


def free_dpo(folder: Path, **options: Any) -> tuple[Any, SubnetMask, FreeReference]:
    """Build a DPO trainer on the usual mask, whose reference is free."""
    trainer = trainer_with_reference("DPO", folder, **options)
    mask = third_of(trainer.model)
    free = take_reference_from_policy(trainer, mask)
    restrict(trainer, mask)
    return trainer, mask, free


def test_every_trainer_with_a_reference_model_is_tested() -> None:
    named = {algorithm.trainer.rpartition(":")[2] for algorithm in ALGORITHMS.values() if algorithm.references}
    assert {f"{name}Trainer" for name in WITH_KL} == named


@pytest.mark.parametrize("name", WITH_KL)
def test_free_reference_gives_the_run_of_a_second_model_to_the_last_bit(name: str, tmp_path: Path) -> None:
    with_second = run(name, tmp_path / "second", free=False, max_steps=5)
    losses = [entry["loss"] for entry in with_second.logs if "loss" in entry]
    assert len(set(losses)) > 1, "a run in which nothing happens shows nothing"
    same(run(name, tmp_path / "free", free=True, max_steps=5), with_second)


@pytest.mark.parametrize("name", MAIN)
def test_a_reference_that_followed_the_policy_would_be_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_second = run(name, tmp_path / "second", free=False, max_steps=5)
    monkeypatch.setattr(subnet_kernels, "swap", lambda *args: None)
    assert run(name, tmp_path / "free", free=True, max_steps=5).logs != with_second.logs


VARIANTS: dict[str, dict[str, Any]] = {
    "checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    },
    "re-entrant checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "two micro-batches": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "remainders": {"restrict_options": {"master": "remainder"}},
    "no masters, dense gradients": {"restrict_options": {"master": "none", "compact_grads": False}},
    "float32": {"dtype": torch.float32},
    "float32 under autocast": {"dtype": torch.float32, "bf16": True},
}


# transformers before 5.24 checkpoints layers also where no gradient is taken, and torch says so.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("variant", VARIANTS)
def test_free_reference_gives_the_same_bits_with(name: str, variant: str, tmp_path: Path) -> None:
    options = {"max_steps": 3, **VARIANTS[variant]}
    if name == "GRPO" and variant == "two micro-batches":
        options["steps_per_generation"] = 2
    same(run(name, tmp_path / "free", free=True, **options), run(name, tmp_path / "second", free=False, **options))


def test_free_reference_is_in_eval_mode_while_the_policy_has_dropout(tmp_path: Path) -> None:
    def dropout(trainer: Any) -> None:
        trainer.model.config.attention_dropout = 0.5
        for module in trainer.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5

    options: dict[str, Any] = {"max_steps": 3, "disable_dropout": False}
    with_second = run("DPO", tmp_path / "second", free=False, prepare=dropout, **options)
    same(run("DPO", tmp_path / "free", free=True, prepare=dropout, **options), with_second)
    assert run("DPO", tmp_path / "without", free=False, **options).logs != with_second.logs


def test_free_reference_after_a_resume_is_that_of_the_base(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = run("DPO", tmp_path / "second", free=False, max_steps=4, **options)

    def stop(trainer: Any) -> None:
        trainer.args.max_steps = 2

    run("DPO", tmp_path / "free", free=True, max_steps=4, prepare=stop, **options)
    resumed = run("DPO", tmp_path / "free", free=True, max_steps=4, resume=True, **options)
    same_weights(resumed.weights, whole.weights)
    assert [entry.get("loss") for entry in resumed.logs[:4]] == [entry.get("loss") for entry in whole.logs[:4]]


def test_free_reference_serves_evaluations(tmp_path: Path) -> None:
    found = []
    for free in (False, True):
        trainer = trainer_with_reference("DPO", tmp_path / str(free), max_steps=2)
        mask = third_of(trainer.model)
        if free:
            take_reference_from_policy(trainer, mask)
        restrict(trainer, mask)
        before = trainer.evaluate(trainer.train_dataset)
        trainer.train()
        after = trainer.evaluate(trainer.train_dataset)
        assert before["eval_loss"] != after["eval_loss"]
        found.append(left_by(trainer))
    same(*found)


@pytest.mark.parametrize("order", ["before", "after", "option"])
def test_take_reference_from_policy_drops_the_second_model(order: str, tmp_path: Path) -> None:
    trainer = trainer_with_reference("GRPO", tmp_path)
    mask = third_of(trainer.model)
    alive = [weakref.ref(trainer.ref_model), *map(weakref.ref, trainer.ref_model.parameters())]
    assert trainer.ref_model in trainer.accelerator._models
    if order == "after":
        restrict(trainer, mask)
    gc.disable()  # it does not wait for Python to find the cycle
    try:
        if order == "option":
            free = restrict(trainer, mask, free_reference=True).ref_model
        else:
            free = take_reference_from_policy(trainer, mask)
    finally:
        gc.enable()
    assert trainer.ref_model is free
    assert [reference() for reference in alive] == [None] * len(alive)
    assert list(free.parameters()) == []
    assert 2 * mask.num_trainable < free.nbytes < 2 * mask.num_trainable + 0.2 * mask.num_parameters


def test_free_reference_between_forward_and_backward_changes_no_gradient_and_no_counter(tmp_path: Path) -> None:
    trainer, mask, free = free_dpo(tmp_path)
    trainer.train()
    model: Any = base_model("DPO")
    model.load_state_dict(trainer.model.state_dict())
    policy: Any = trainer.model
    trainer.masked_optimizer.release()
    with torch.no_grad():
        expected = base_model("DPO")(**INPUTS).logits
    start = weights_of(policy)
    marks = [(p._version, p.data_ptr()) for p in policy.parameters()]
    gradients = []
    for twin, reference in ((policy, free), (model, None)):
        twin.train()
        loss = twin(**INPUTS).logits.float().logsumexp(-1).sum()
        if reference is not None:
            assert same_bits(reference(**INPUTS).logits, expected)
            assert [(p._version, p.data_ptr()) for p in policy.parameters()] == marks
            same_weights(weights_of(policy), start)
        loss.backward()
        gradients.append([p.grad for p in twin.parameters()])
    assert all(same_bits(a, b) for a, b in zip(*gradients, strict=True))
    assert mask.num_trainable


def test_free_reference_leaves_the_masters_of_the_optimizer_alone(tmp_path: Path) -> None:
    trainer, _, free = free_dpo(tmp_path, max_steps=1)
    trainer.train()
    roundings = trainer.masked_optimizer._roundings
    masters = {p: trainer.masked_optimizer.state[p]["master"] for p in trainer.masked_optimizer.state}
    assert masters
    assert all(roundings.has(p, master) for p, master in masters.items())
    free(**INPUTS)
    assert all(roundings.has(p, master) for p, master in masters.items())


def test_free_reference_gives_every_module_its_mode_back(tmp_path: Path) -> None:
    trainer, _, free = free_dpo(tmp_path)
    policy = trainer.model
    policy.train()
    policy.model.layers[0].mlp.eval()
    before = {name: module.training for name, module in policy.named_modules()}
    seen = []
    policy.model.layers[1].register_forward_pre_hook(
        lambda module, args: seen.append((module.training, policy.training, torch.is_grad_enabled()))
    )
    output = free(**INPUTS)
    assert seen == [(False, False, False)]
    assert {name: module.training for name, module in policy.named_modules()} == before
    assert not output.logits.requires_grad


def test_free_reference_gives_the_policy_back_when_the_forward_pass_fails(tmp_path: Path) -> None:
    trainer, _, free = free_dpo(tmp_path, max_steps=1)
    trainer.train()
    policy = trainer.model.train()
    start, marks = weights_of(policy), [p._version for p in policy.parameters()]

    def fail(module: Any, args: Any) -> None:
        raise MemoryError("no room")

    hook = policy.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="no room"):
        free(**INPUTS)
    hook.remove()
    same_weights(weights_of(policy), start)
    assert [p._version for p in policy.parameters()] == marks
    assert policy.training
    with torch.no_grad():
        assert same_bits(free(**INPUTS).logits, base_model("DPO")(**INPUTS).logits)


def schedule(masks: dict[int, SubnetMask]) -> Callable[[Any], None]:
    """Return what adds a schedule to a trainer."""
    return lambda trainer: trainer.add_callback(MaskSchedule(masks))


def test_free_reference_refuses_a_mask_whose_base_values_it_does_not_hold(tmp_path: Path) -> None:
    other = random_mask(base_model("DPO"), 0.3, seed=7)
    with pytest.raises(TrainerError, match=r"trains [\d,]+ weights whose base values the free reference does not hold"):
        run("DPO", tmp_path, free=True, max_steps=4, prepare=schedule({2: other}))


def test_free_reference_follows_a_schedule_of_masks_with_their_union(tmp_path: Path) -> None:
    model = base_model("DPO")
    first, second = third_of(model), random_mask(model, 0.3, seed=7)
    found = []
    for free in (False, True):
        trainer = trainer_with_reference("DPO", tmp_path / str(free), max_steps=4)
        if free:
            take_reference_from_policy(trainer, first | second)
        restrict(trainer, first).add_callback(MaskSchedule({2: second}))
        trainer.train()
        found.append(left_by(trainer))
    same(*found)


def test_free_reference_of_a_policy_that_was_trained_before_is_the_reference_model(tmp_path: Path) -> None:
    base = base_model("DPO")
    mask = third_of(base)
    found = []
    for free in (False, True):
        policy: Any = base_model("DPO")
        for name, weight in policy.named_parameters():
            weight.data = torch.where(mask[name], weight * 2, weight)
        trainer: Any = build("DPO", tmp_path / str(free), model=policy, max_steps=2)
        if free:
            take_reference_from_policy(trainer, mask)
        trainer.train() if not free else restrict(trainer, mask)
        if free:
            with torch.no_grad():
                assert same_bits(trainer.ref_model(**INPUTS).logits, base(**INPUTS).logits)
        found.append(trainer)


def spoiled(trainer: Any, mask: SubnetMask) -> None:
    """Change a weight of the reference model that the mask does not train."""
    weight = trainer.ref_model.model.layers[0].self_attn.q_proj.weight
    weight.data[0, 0] += 1.0
    assert not mask["model.layers.0.self_attn.q_proj.weight"].any()


def sharing(trainer: Any, mask: SubnetMask) -> None:
    """Take it once before."""
    take_reference_from_policy(trainer, mask)


@pytest.mark.parametrize(
    ("name", "options", "change", "error", "message"),
    [
        ("DPO", {}, spoiled, MaskMismatchError, r"`model.layers.0.self_attn.q_proj.weight` differs .* does not train"),
        ("DPO", {}, sharing, TrainerError, "is its policy already"),
        ("DPO", {"sync_ref_model": True, "ref_model_sync_steps": 1}, None, TrainerError, "moves the reference model"),
        (
            "DPO",
            {},
            lambda t, m: t.ref_model.float(),
            MaskMismatchError,
            r"bfloat16 .* in the policy, and torch.float32",
        ),
        (
            "DPO",
            {},
            lambda t, m: t.ref_model.model.rotary_emb.inv_freq.mul_(2),
            MaskMismatchError,
            "The buffer `model.rotary_emb.inv_freq`",
        ),
        (
            "DPO",
            {},
            lambda t, m: setattr(t.ref_model.config, "_attn_implementation", "eager"),
            MaskMismatchError,
            "with attention `sdpa`, its reference model",
        ),
        ("DPO", {}, lambda t, m: setattr(t.args, "torch_compile", True), TrainerError, "Set `torch_compile=False`"),
        ("DPO", {}, lambda t, m: setattr(t, "is_fsdp_enabled", True), TrainerError, "are sharded"),
        ("DPO", {}, lambda t, m: setattr(t.state, "global_step", 3), TrainerError, "at step 3"),
        ("GRPO", {}, lambda t, m: setattr(t, "ref_model", None), TrainerError, "holds no reference model"),
        ("SFT", {}, None, TrainerError, "`SFTTrainer` holds no reference model"),
    ],
)
def test_take_reference_from_policy_refuses(
    name: str, options: dict[str, Any], change: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with_reference = name in WITH_KL
    trainer: Any = (
        trainer_with_reference(name, tmp_path, **options)
        if with_reference
        else build(name, tmp_path, model=base_model(name))
    )
    mask = third_of(trainer.model)
    if change is not None:
        change(trainer, mask)
    held = getattr(trainer, "ref_model", None)
    with pytest.raises(error, match=message):
        take_reference_from_policy(trainer, mask)
    assert getattr(trainer, "ref_model", None) is held


def test_take_reference_from_policy_refuses_a_mask_of_another_model(tmp_path: Path) -> None:
    trainer = trainer_with_reference("DPO", tmp_path)
    mask = third_of(trainer.model)
    fewer = SubnetMask({name: tensor for name, tensor in mask.tensors.items() if "norm" not in name})
    with pytest.raises(MaskMismatchError, match="different parameters"):
        take_reference_from_policy(trainer, fewer)
