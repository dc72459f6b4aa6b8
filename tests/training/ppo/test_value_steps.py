"""`ValueSteps`: the value model steps with the policy, and with it only; its mask, its clipping and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits
from small_runs import cut_off
from training.adapted import adapted
from training.masked_runs import Watch, each_step, losses_of, same_state, same_weights, state_of, third_of, weights_of
from training.ppo.ppo_runs import each_value_step, logged, ppo, values_of

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import MaskMismatchError, NonFiniteGradientError, TrainerError
from subnet_ft.masks import SubnetMask
from subnet_ft.training import restrict
from subnet_ft.training.ppo import ValueModel, value_mask_like

TWO = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
NAN = float("nan")


def masked(folder: Path, *, dtype: torch.dtype = torch.float32, nonfinite: str = "raise", **options: Any) -> Any:
    """Restrict a PPO trainer to a third of the policy and of the value model's backbone."""
    model = tiny_model("llama", dtype=dtype)
    mask = third_of(model)
    arguments = {"value_mask": value_mask_like(mask, ValueModel(model))}
    return restrict(ppo(folder, model=model, arguments=arguments, **options), mask, nonfinite=nonfinite)


def value_state(trainer: Any) -> dict[str, dict[str, Any]]:
    state: dict[str, dict[str, Any]] = trainer.value_optimizer.state_dict()["state"]
    return {
        name: {key: part.clone() if isinstance(part, torch.Tensor) else part for key, part in entries.items()}
        for name, entries in state.items()
    }


@pytest.mark.parametrize("options", [{}, TWO, {"num_iterations": 2}, {"steps_per_generation": 4}])
def test_the_value_model_steps_once_with_every_step_of_the_policy(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = ppo(tmp_path, max_steps=4, **options)
    before: list[dict[str, torch.Tensor]] = []
    trainer.add_callback(Watch(before=lambda step: before.append(values_of(trainer))))
    after = each_value_step(trainer)
    trainer.train()
    assert all(entries["step"] == 4 for entries in value_state(trainer).values())
    for one, other in zip(before, after, strict=True):
        assert not same_bits(one["score.bias"], other["score.bias"])
    for one, other in zip(after, before[1:], strict=False):
        same_weights(one, other)


def test_the_value_model_has_its_own_learning_rate(tmp_path: Path) -> None:
    for rates in ({"value_learning_rate": 0.0}, {"learning_rate": 0.0}):
        trainer = ppo(tmp_path, **rates)
        policy, value = weights_of(trainer.model), values_of(trainer)
        trainer.train()
        moved = [not same_bits(policy[k], v) for k, v in weights_of(trainer.model).items()]
        value_moved = [not same_bits(value[k], v) for k, v in values_of(trainer).items()]
        assert any(moved) == ("learning_rate" not in rates)
        assert any(value_moved) == ("value_learning_rate" not in rates)


@pytest.mark.parametrize("limit", [None, 0.05])
def test_the_value_model_is_clipped_by_its_own_norm(tmp_path: Path, limit: float | None) -> None:
    """Without momentum, the first average after a step is the gradient that the step took."""
    options = {"max_steps": 1, "adam_beta1": 0.0, "max_grad_norm": 1e-3}
    trainer = ppo(tmp_path, value_max_grad_norm=limit, **options)
    trainer.train()
    taken = torch.cat([entries["exp_avg"] for entries in value_state(trainer).values()]).norm()
    norm = logged(trainer, "value/grad_norm")[0]
    assert norm > 0.1
    assert float(taken) == pytest.approx(norm if limit is None else limit, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_off_the_value_mask_keep_their_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    trainer = masked(tmp_path, dtype=dtype, max_steps=4)
    mask, start = trainer.value_mask, values_of(trainer)
    trainer.train()
    for name, weight in values_of(trainer).items():
        assert same_bits(weight[~mask[name]], start[name][~mask[name]])
        assert bool((weight != start[name])[mask[name]].any()) == bool(mask[name].any())


def following(folder: Path, *, full: bool = False, **options: Any) -> Any:
    """Restrict a PPO trainer whose value model takes the mask of its policy."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    mask = SubnetMask.full(shapes(model)) if full else third_of(model)
    return restrict(ppo(folder, model=model, value_trains="subnet", **options), mask)


def test_value_trains_subnet_is_the_run_with_the_policys_mask(tmp_path: Path) -> None:
    given = masked(tmp_path, dtype=torch.bfloat16)
    given.train()
    found = following(tmp_path)
    found.train()
    assert found.value_mask == given.value_mask
    same_weights(values_of(found), values_of(given))
    same_state(value_state(found), value_state(given))
    same_weights(weights_of(found.model), weights_of(given.model))


def test_value_trains_subnet_of_a_full_run_trains_everything(tmp_path: Path) -> None:
    found = following(tmp_path, full=True)
    found.train()
    model = tiny_model("llama", dtype=torch.bfloat16)
    whole = restrict(ppo(tmp_path, model=model), SubnetMask.full(shapes(model)))
    whole.train()
    same_weights(values_of(found), values_of(whole))


def test_value_trains_subnet_resumes_to_the_same_bits(tmp_path: Path) -> None:
    straight = following(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    straight.train()
    again = following(tmp_path / "again", max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    same_weights(values_of(again), values_of(straight))
    same_state(value_state(again), value_state(straight))


def test_value_trains_subnet_needs_one_mask_of_the_policys_own_weights(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"mask of the policy, which has none\. Call `restrict\(trainer, mask\)`"):
        ppo(tmp_path, value_trains="subnet").train()
    mask = value_mask_like(SubnetMask.full(shapes(tiny_model("llama"))), ValueModel(tiny_model("llama")))
    with pytest.raises(TrainerError, match="`value_mask` names another one"):
        ppo(tmp_path, value_trains="subnet", arguments={"value_mask": mask})
    with pytest.raises(TrainerError, match="that is a mask of an adapter"):
        ppo(tmp_path, value_trains="subnet", model=adapted())


def test_a_value_mask_of_another_model_is_refused(tmp_path: Path) -> None:
    policy = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(MaskMismatchError, match=r"lm_head|score"):
        ppo(tmp_path, model=policy, arguments={"value_mask": random_mask(policy, 0.3)})


def spoil_loss(trainer: Any, call: int) -> None:
    """Make one micro-batch's loss NaN, and with it both gradients."""
    compute, calls = trainer.compute_loss, iter(range(1, 100))
    trainer.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * (NAN if next(calls) == call else 1.0)


def spoil_values(trainer: Any, call: int) -> None:
    """Make the gradient of the value model NaN in one micro-batch, and leave the policy's alone."""
    calls = iter(range(1, 100))

    def hook(grad: torch.Tensor) -> torch.Tensor:
        return grad * (NAN if next(calls) == call else 1.0)

    trainer.value_model.score.bias.register_hook(hook)


def spoil_policys(trainer: Any, call: int) -> None:
    """The same the other way round."""
    calls = iter(range(1, 100))
    trainer.model.model.norm.weight.register_hook(lambda grad: grad * (NAN if next(calls) == call else 1.0))


SPOILERS = [spoil_loss, spoil_values, spoil_policys]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_step_that_one_leaves_out_the_other_leaves_out_too(tmp_path: Path, spoil: Callable[..., None]) -> None:
    trainer = masked(tmp_path, nonfinite="skip", max_steps=3, **TWO)
    policy, values = each_step(trainer), each_value_step(trainer)
    left: list[float] = []
    trainer.add_callback(Watch(end=lambda step: left.append(float(trainer.value_optimizer.grad_norm()))))
    spoil(trainer, 4)
    trainer.train()
    assert left == [0, 0, 0]
    same_weights(policy[1][0], policy[0][0])
    same_state(policy[1][1], policy[0][1])
    same_weights(values[1], values[0])
    for seen in ([weights for weights, _ in policy], values):
        assert any(not same_bits(seen[2][name], seen[1][name]) for name in seen[0])
    for state in (state_of(trainer), value_state(trainer)):
        assert {int(entries["step"]) for entries in state.values()} == {2}


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_step_that_is_refused_changes_neither(tmp_path: Path, spoil: Callable[..., None]) -> None:
    trainer = masked(tmp_path, max_steps=3, **TWO)
    policy, values = each_step(trainer), each_value_step(trainer)
    spoil(trainer, 4)
    with pytest.raises(NonFiniteGradientError):
        trainer.train()
    assert (len(policy), len(values)) == (1, 1)
    same_weights(weights_of(trainer.model), policy[0][0])
    same_weights(values_of(trainer), values[0])


def test_a_trainer_that_is_not_restricted_refuses_values_that_are_not_finite(tmp_path: Path) -> None:
    trainer = ppo(tmp_path)
    start = weights_of(trainer.model)
    spoil_values(trainer, 1)
    with pytest.raises(NonFiniteGradientError, match="Step 1 was not taken and no weight was changed: the gradient of"):
        trainer.train()
    same_weights(weights_of(trainer.model), start)


def test_gradients_of_a_run_that_was_broken_off_are_dropped(tmp_path: Path) -> None:
    twin, trainer = (masked(tmp_path / name, max_steps=2, **TWO) for name in ("twin", "broken"))
    step, calls = trainer.training_step, iter(range(1, 100))

    def breaking(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        if next(calls) == 1:
            raise InterruptedError
        return found

    trainer.training_step = breaking
    torch.manual_seed(5)
    with pytest.raises(InterruptedError):
        trainer.train()
    trainer._step, trainer._buffered_inputs = 0, None
    for one in (twin, trainer):
        torch.manual_seed(5)
        one.train()
    same_weights(values_of(trainer), values_of(twin))


RESUMED = {"max_steps": 7, "steps_per_generation": 2, "num_iterations": 2, "lr_scheduler_type": "linear"}


def test_a_run_resumes_to_the_same_bits_inside_a_batch_of_completions(tmp_path: Path) -> None:
    """Completions serve four steps; 2, 3 and 6 lie inside, 4 between two batches."""
    straight = masked(tmp_path / "straight", dtype=torch.bfloat16, **RESUMED)
    straight.train()
    saving = {**RESUMED, "save_strategy": "steps", "save_steps": 1}
    broken = masked(tmp_path / "cut", dtype=torch.bfloat16, **saving)
    cut_off(broken, after=7)
    for step in (2, 3, 4, 6):
        again = masked(tmp_path / "cut", dtype=torch.bfloat16, **RESUMED)
        sampled: list[Any] = []
        generate = again._generate_and_score_completions
        again._generate_and_score_completions = lambda inputs, g=generate, s=sampled: s.append(0) or g(inputs)
        again.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
        assert len(sampled) == (1 if step <= 4 else 0)
        assert losses_of(again) == losses_of(straight)
        assert logged(again, "value/loss") == logged(straight, "value/loss")
        same_weights(weights_of(again.model), weights_of(straight.model))
        same_weights(values_of(again), values_of(straight))
        same_state(value_state(again), value_state(straight))
        same_state(state_of(again), state_of(straight))


def test_a_checkpoint_without_a_value_model_is_refused(tmp_path: Path) -> None:
    ppo(tmp_path, save_strategy="steps", save_steps=1).train()
    with pytest.raises(TrainerError, match="resumed at step 1, but only the checkpoints of a restricted trainer hold"):
        ppo(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_computes_the_same_bits(tmp_path: Path, use_reentrant: bool) -> None:
    seen = []
    for on in (False, True):
        options = {"activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        model = tiny_model("llama", dtype=torch.float32)
        trainer = restrict(
            ppo(tmp_path, model=model, activation_checkpointing=on, **options), SubnetMask.full(shapes(model))
        )
        trainer.train()
        assert trainer.value_model.is_checkpointing == on
        seen.append((weights_of(trainer.model), values_of(trainer)))
    for one, other in zip(*seen, strict=True):
        same_weights(one, other)


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
