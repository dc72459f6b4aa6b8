"""What is taken for granted about accelerate's wrapper of an optimizer, and about torch's hooks and optimizers.

The table of signatures is in `upstream.py`. Everything here runs the installed upstream packages without our code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from training.upstream import OPTIMIZER, differs, expect


class Spied(torch.optim.SGD):
    """Notes what is called on it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.seen: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        self.seen.append("state_dict")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen.append("load_state_dict")
        super().load_state_dict(state_dict)

    def step(self, closure: Any = None) -> None:
        self.seen.append("step")
        super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.seen.append(f"zero_grad {set_to_none}")
        super().zero_grad(set_to_none)


@pytest.fixture
def prepared() -> Iterator[tuple[Accelerator, Spied, AcceleratedOptimizer]]:
    """An optimizer in accelerate's wrapper."""
    accelerator = Accelerator(cpu=True)
    optimizer = Spied([torch.nn.Parameter(torch.ones(3))])
    yield accelerator, optimizer, accelerator.prepare_optimizer(optimizer)
    accelerator.gradient_state._set_sync_gradients(True)
    accelerator.free_memory()


WRAPPER = "accelerate:optimizer.AcceleratedOptimizer"


def test_accelerate_saves_and_loads_the_state_when_it_wraps_an_optimizer(prepared: Any) -> None:
    _, optimizer, wrapper = prepared
    assert type(wrapper) is AcceleratedOptimizer
    expect(optimizer.seen, ["state_dict", "load_state_dict"], WRAPPER, OPTIMIZER)
    assert wrapper.optimizer is optimizer, differs(WRAPPER, "has no `optimizer`", "subnet_ft/training/unwrap.py")


def test_accelerate_passes_the_attributes_of_an_optimizer_on(prepared: Any) -> None:
    _, optimizer, wrapper = prepared
    for name in ("state", "param_groups", "defaults"):
        assert getattr(wrapper, name) is getattr(optimizer, name), differs(WRAPPER, f"copies `{name}`", OPTIMIZER)
    optimizer.audit = lambda: None
    assert not hasattr(wrapper, "audit"), differs(WRAPPER, "passes every attribute on", "subnet_ft/training/unwrap.py")


def test_accelerate_neither_steps_nor_drops_gradients_while_they_accumulate(prepared: Any) -> None:
    accelerator, optimizer, wrapper = prepared
    optimizer.seen.clear()
    for is_last in (False, True):
        accelerator.gradient_state._set_sync_gradients(is_last)
        wrapper.step()
        wrapper.zero_grad()
        expect(optimizer.seen, ["step", "zero_grad True"] if is_last else [], WRAPPER, OPTIMIZER)


def test_torch_calls_the_hook_of_a_gradient_once_per_backward_after_accumulating_it() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    seen: list[torch.Tensor] = []
    handle = parameter.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.clone()))
    where, used_by = "torch:Tensor.register_post_accumulate_grad_hook", "subnet_ft/optim/gradients.py"
    for _ in range(2):
        (parameter.sum() + 2 * parameter.sum()).backward()  # used twice, as a tied weight is
    expect([value.tolist() for value in seen], [[3.0, 3.0], [6.0, 6.0]], where, used_by)
    handle.remove()

    def take(leaf: torch.Tensor) -> None:
        seen.append(leaf.grad)
        leaf.grad = None

    seen.clear()
    parameter.grad = None
    parameter.register_post_accumulate_grad_hook(take)
    for _ in range(2):
        parameter.sum().backward()
    expect([value.tolist() for value in seen], [[1.0, 1.0], [1.0, 1.0]], where, used_by)
    expect(parameter.grad, None, where, used_by)


def test_torch_packs_the_state_of_an_optimizer_by_position_with_names_beside_it() -> None:
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([("a", first), ("b", second)], lr=0.1, momentum=0.9)
    second.grad = torch.ones(2)
    optimizer.step()
    saved = optimizer.state_dict()
    where, used_by = "torch:optim.Optimizer.state_dict", "subnet_ft/optim/state.py"
    expect(list(saved), ["state", "param_groups"], where, used_by)
    expect(list(saved["state"]), [1], where, used_by)
    (group,) = saved["param_groups"]
    expect((group["params"], group["param_names"]), ([0, 1], ["a", "b"]), where, used_by)
    hooks = ["_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"]
    expect([name for name in hooks if not hasattr(optimizer, name)], [], "torch:optim.Optimizer", OPTIMIZER)


def test_torch_counts_a_write_to_each_tensor_that_it_is_told_of() -> None:
    tensors = {torch.ones(1): "a", torch.ones(1): "b"}
    torch.autograd.graph.increment_version(tensors)
    expect([tensor._version for tensor in tensors], [1, 1], "torch:autograd.graph.increment_version", OPTIMIZER)
