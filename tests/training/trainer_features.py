"""The columns of the table in `docs/trainers.md`: each function shows one feature on one trainer, or raises.

Every one of them ends with the weights themselves: off the mask bitwise the base's, on the mask moved.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import same_bits
from old_versions import OLD_TRANSFORMERS, OLD_TRL
from training.every_trainer import BATCH, TRAINERS, base_model, build
from training.masked_runs import (
    FROZEN,
    Watch,
    Weights,
    check_weights,
    each_step,
    losses_of,
    optimizer_of,
    restricted,
    same_state,
    same_weights,
    state_of,
    weights_of,
)
from transformers import Trainer

from subnet_ft.errors import FrozenWeightError, NonFiniteGradientError
from subnet_ft.masks import SubnetMask

TWO_MICRO_BATCHES = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": BATCH // 2}


def clip(name: str, folder: Path) -> None:
    """`max_grad_norm` bounds the norm on the mask, and `grad_norm` in the logs is that norm before clipping."""
    free = _clipped_run(name, folder, 0.0)
    limit = 0.4 * free.norms[0]
    bound = _clipped_run(name, folder, limit)
    assert bound.norms[0] == free.norms[0]
    for run, largest in ((free, float("inf")), (bound, limit)):
        for logged, masked, full, used in zip(run.logged, run.norms, run.full_norms, run.used, strict=True):
            assert logged == pytest.approx(masked, rel=1e-4)
            assert used == pytest.approx(min(masked, largest), rel=1e-4)
            assert full > 1.05 * masked  # or the two norms could not be told apart
    assert any(not same_bits(free.weights[key], bound.weights[key]) for key in free.weights)


def accumulate(name: str, folder: Path) -> None:
    """Two micro-batches make one step, on the very gradient that autograd accumulates in a twin without a mask."""
    options = {**TWO_MICRO_BATCHES, "max_grad_norm": 0.0, "adam_beta1": 0.0}
    twin = build(name, folder, model=base_model(name, torch.float32), max_steps=1, **options)
    dense: Weights = {}
    twin.add_callback(Watch(before=lambda _: dense.update(_dense_gradients(twin.model))))
    twin.train()
    trainer, mask = restricted(name, folder, dtype=torch.float32, **options)
    start = weights_of(trainer.model)
    steps: list[int] = []
    first: Weights = {}

    def after(step: int) -> None:
        steps.append(step)
        if step == 1:
            first.update({key: entries["exp_avg"].clone() for key, entries in state_of(trainer).items()})

    trainer.add_callback(Watch(after=after))
    calls = _count_losses(trainer)
    trainer.train()
    assert (len(calls), steps) == (4, [1, 2])
    assert all(entries["step"] == 2 for entries in state_of(trainer).values())
    # Without a first momentum, the average after the first step is its gradient.
    assert first.keys() == {key for key in dense if mask.tensors[key].count}
    assert all(same_bits(first[key], dense[key].flatten()[mask[key].flatten()]) for key in first)
    check_weights(trainer.model, mask, start)


def schedule(name: str, folder: Path) -> None:
    """A warm-up and a linear decay reach the masked step: its size is the learning rate of that very step."""
    options = {"lr_scheduler_type": "linear", "warmup_steps": 1, "max_steps": 4, "weight_decay": 0.0}
    trainer, mask = restricted(name, folder, **options)
    start = weights_of(trainer.model)
    rates: list[float] = []
    before: Weights = {}

    def note(step: int) -> None:
        rates.append(optimizer_of(trainer).param_groups[0]["lr"])
        assert {group["lr"] for group in optimizer_of(trainer).param_groups} == {rates[-1]}
        before.clear()
        before.update({key: value[mask[key]].float() for key, value in weights_of(trainer.model).items()})
        before.update({key: entries["master"].clone() for key, entries in state_of(trainer).items()})

    def compare(step: int) -> None:
        for key, entries in state_of(trainer).items():
            mean = entries["exp_avg"].double() / (1 - 0.9**step)
            root = (entries["exp_avg_sq"].double() / (1 - 0.999**step)).sqrt()
            moved = before[key].double() - entries["master"].double()
            # Half a unit of the largest master, and what float32 makes of the two corrections.
            torch.testing.assert_close(moved, rates[-1] * mean / (root + 1e-8), rtol=1e-4, atol=2.0**-22)

    trainer.add_callback(Watch(before=note, after=compare))
    trainer.train()
    assert rates == pytest.approx([0.0, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    check_weights(trainer.model, mask, start)


def resume(name: str, folder: Path) -> None:
    """A run that was cut off goes on to the same bits: inside an epoch, at the end of one, and inside a rollout."""
    options = {"max_steps": 8, "lr_scheduler_type": "linear", **TRAINERS[name].long_rollouts}
    trainer, mask = restricted(name, folder / "straight", **options)
    start = weights_of(trainer.model)
    trainer.train()
    straight = weights_of(trainer.model), state_of(trainer), losses_of(trainer)
    check_weights(trainer.model, mask, start)

    saving = {**options, "save_strategy": "steps", "save_steps": 2}
    broken, _ = restricted(name, folder / "cut", **saving)
    broken.add_callback(Watch(end=_cut_off_at_step_7))
    with pytest.raises(InterruptedError):
        broken.train()
    for step in (6, 4, 2):
        again, _ = restricted(name, folder / "cut", **saving)
        taken = each_step(again)
        again.train(resume_from_checkpoint=True if step == 6 else str(folder / "cut" / f"checkpoint-{step}"))
        assert len(taken) == 8 - step
        assert losses_of(again) == straight[2]
        same_weights(weights_of(again.model), straight[0])
        same_state(state_of(again), straight[1])


def checkpointing(name: str, folder: Path) -> None:
    """Activation checkpointing of both kinds computes every layer twice, and the same bits."""
    seen: dict[str, tuple[Weights, Any]] = {}
    for case, options in {
        "off": {},
        "non-reentrant": {"activation_checkpointing_kwargs": {"use_reentrant": False}},
        "reentrant": {"activation_checkpointing_kwargs": {"use_reentrant": True}},
    }.items():
        if case == "reentrant" and TRAINERS[name].is_reentrant_refused:
            with pytest.raises(ValueError, match="re-entrant"):
                restricted(name, folder, activation_checkpointing=True, **options)
            continue
        trainer, mask = restricted(name, folder, activation_checkpointing=case != "off", **options)
        start = weights_of(trainer.model)
        again = _layers_in_backward(trainer)
        trainer.train()
        passes = TRAINERS[name].passes
        assert len(again) == (0 if case == "off" else 2 * 2 * passes), "two layers, two steps"
        check_weights(trainer.model, mask, start)
        seen[case] = weights_of(trainer.model), state_of(trainer)
    for case in seen:
        same_weights(seen[case][0], seen["off"][0])
        same_state(seen[case][1], seen["off"][1])


def compiled(name: str, folder: Path) -> None:
    """`torch_compile=True` trains the mask, whether the model is compiled as a whole or layer by layer."""
    # Distillation samples from the compiled layers: a graph per length, so the one without autograd's is quick enough.
    regional_backend = "eager" if name == "Distillation" else "aot_eager"
    for regional, backend in ((False, "eager"), (True, regional_backend)):
        with _compiling(regional=regional) as graphs:
            options = {"torch_compile": True, "torch_compile_backend": backend, "max_steps": 1}
            trainer, mask = restricted(name, folder, **options)
            start = weights_of(trainer.model)
            trainer.train()
            # The loss of Distillation goes around the forward of the whole; SFT before TRL 1.16 and StepByStep before
            # transformers 5.24 compile nothing.
            uncompiled = {"Distillation": not regional, "SFT": OLD_TRL, "StepByStep": OLD_TRANSFORMERS}
            assert graphs() > 0 or uncompiled.get(name, False)
        assert any("_orig_mod" in key for key, _ in trainer.model_wrapped.named_parameters())
        assert state_of(trainer).keys() == {key for key in start if mask.tensors[key].count}
        check_weights(trainer.model, mask, start)


def nonfinite(name: str, folder: Path) -> None:
    """NaN in one micro-batch stops the run before it touches a weight, or leaves out its step and no other."""
    options = {**TWO_MICRO_BATCHES, "max_steps": 3}
    trainer, mask = restricted(name, folder, restrict_options={"nonfinite": "raise"}, **options)
    start = weights_of(trainer.model)
    seen = each_step(trainer)
    _spoil_loss(trainer, call=4)
    with pytest.raises(NonFiniteGradientError):
        trainer.train()
    assert len(seen) == 1
    same_weights(weights_of(trainer.model), seen[0][0])
    same_state(state_of(trainer), seen[0][1])
    check_weights(trainer.model, mask, start)

    trainer, mask = restricted(name, folder, restrict_options={"nonfinite": "skip"}, **options)
    seen = each_step(trainer)
    _spoil_loss(trainer, call=4)
    trainer.train()
    assert len(seen) == 3
    same_weights(seen[1][0], seen[0][0])
    same_state(seen[1][1], seen[0][1])
    assert any(not same_bits(seen[2][0][key], seen[1][0][key]) for key in start)
    assert all(entries["step"] == 2 for entries in state_of(trainer).values())
    check_weights(trainer.model, mask, start)


def audit(name: str, folder: Path) -> None:
    """With `audit_steps=1` a clean run passes, and a write to one frozen weight stops the run with its name."""
    audited = {"audit_steps": 1}
    trainer, mask = restricted(name, folder, restrict_options=audited)
    start = weights_of(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 2
    check_weights(trainer.model, mask, start)
    for key in (FROZEN, "model.layers.1.mlp.down_proj.weight"):
        trainer, mask = restricted(name, folder, restrict_options=audited, max_steps=3)
        trainer.add_callback(Watch(after=lambda step, t=trainer, k=key, m=mask: _write_off_mask(t.model, m, k, step)))
        with pytest.raises(FrozenWeightError, match=key):
            trainer.train()
        assert trainer.state.global_step < 3


@dataclass
class ClippedRun:
    """What one run clipped, step by step.

    Args:
        logged: `grad_norm` of the logs.
        norms, full_norms: What autograd computed, on the mask and everywhere.
        used: Norm of the gradient that the optimizer took in.
        weights: At the end.
    """

    logged: list[float]
    norms: list[float]
    full_norms: list[float]
    used: list[float]
    weights: Weights


def _clipped_run(name: str, folder: Path, max_grad_norm: float) -> ClippedRun:
    trainer, mask = restricted(name, folder, max_grad_norm=max_grad_norm, adam_beta1=0.0, max_steps=3)
    start = weights_of(trainer.model)
    run = ClippedRun([], [], [], [], {})
    squares: dict[str, tuple[float, float]] = {}

    def watch(key: str, parameter: torch.nn.Parameter) -> None:
        def hook(grad: torch.Tensor) -> None:
            squares[key] = float(grad[mask[key]].double().square().sum()), float(grad.double().square().sum())

        parameter.register_hook(hook)

    def after(step: int) -> None:
        run.norms.append(sum(square for square, _ in squares.values()) ** 0.5)
        run.full_norms.append(sum(square for _, square in squares.values()) ** 0.5)
        run.used.append(float(torch.cat([entries["exp_avg"] for entries in state_of(trainer).values()]).norm()))

    for key, parameter in trainer.model.named_parameters():
        if mask.tensors[key].count:
            watch(key, parameter)
    trainer.add_callback(Watch(after=after))
    trainer.train()
    run.logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    run.weights = weights_of(trainer.model)
    check_weights(trainer.model, mask, start)
    return run


def _dense_gradients(model: torch.nn.Module) -> Weights:
    return {key: p.grad.detach().clone() for key, p in model.named_parameters() if p.grad is not None}


def _count_losses(trainer: Trainer) -> list[None]:
    calls: list[None] = []
    compute = trainer.compute_loss

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return compute(*args, **kwargs)

    trainer.compute_loss = counted
    return calls


def _spoil_loss(trainer: Trainer, *, call: int) -> None:
    """Make the loss of one micro-batch NaN, and with it every gradient of its step."""
    calls = 0
    compute = trainer.compute_loss

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = compute(*args, **kwargs)
        return loss * float("nan") if calls == call else loss

    trainer.compute_loss = spoiled


def _cut_off_at_step_7(step: int) -> None:
    if step == 7:
        raise InterruptedError


def _layers_in_backward(trainer: Trainer) -> list[None]:
    """Return a list that grows with every layer that a backward pass computes again."""
    calls: list[None] = []

    def hook(*args: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            calls.append(None)

    for layer in trainer.model.model.layers:
        layer.mlp.register_forward_pre_hook(hook)  # hooks of the layer itself stay outside its checkpoint
    return calls


@contextlib.contextmanager
def _compiling(*, regional: bool) -> Iterator[Callable[[], int]]:
    """Give the number of compiled graphs; undo what transformers sets for the whole process."""
    from torch._dynamo.utils import counters

    environment = mock.patch.dict(os.environ, ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=str(regional))
    with environment, warnings.catch_warnings():
        # Dynamo asks every tensor that it meets whether it has a gradient, and makes an object of autograd's functions.
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        warnings.filterwarnings("ignore", r".*Function'> should not be instantiated", DeprecationWarning)
        torch._dynamo.reset()
        counters.clear()
        yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def _write_off_mask(model: torch.nn.Module, mask: SubnetMask, key: str, step: int) -> None:
    """Change the first weight of `key` off the mask, behind torch's back, after the first step."""
    if step == 1:
        flat = dict(model.named_parameters())[key].data.view(-1)
        flat[int((~mask[key]).flatten().nonzero()[0])] += 1.0


FEATURES: dict[str, Callable[[str, Path], None]] = {
    "clip": clip,
    "accumulate": accumulate,
    "schedule": schedule,
    "resume": resume,
    "checkpointing": checkpointing,
    "compile": compiled,
    "NaN policy": nonfinite,
    "audit": audit,
}
