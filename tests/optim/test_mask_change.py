"""The masks that may not follow another, and what a refusal leaves as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits, set_gradients, small_model
from masked_optimizers import BUILDERS, Build, differing, masked_adamw, only, state_of, weights_of, wrapped
from wrapped_optimizers import EightBit, Lion

import subnet_kernels
from subnet_ft.errors import FrozenWeightError, GradientError, MaskMismatchError, OptimizerError
from subnet_ft.masks import ModelRecord, Provenance, SubnetMask, format_fingerprint
from subnet_ft.optim import MaskedBase, base, mask_change


def trained(
    build: Build, dtype: torch.dtype = torch.bfloat16, mask: SubnetMask | None = None, **options: Any
) -> tuple[torch.nn.Module, MaskedBase]:
    """Return a model after two steps under a mask in which nothing of `0.bias` is trained, and its optimizer."""
    model = small_model(dtype)
    optimizer = build(model.named_parameters(), mask or first_mask(model), **options)
    for step in range(2):
        set_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def first_mask(model: torch.nn.Module, provenance: Provenance | None = None) -> SubnetMask:
    drawn = random_mask(model, 0.4)
    return SubnetMask(only(model, {n: drawn[n] for n in drawn.names if n != "0.bias"}).tensors, provenance)


def base_of(model: torch.nn.Module, **other: str) -> Provenance:
    """Return the record of a model as it stands, with other fingerprints for some tensors."""
    prints = {n: format_fingerprint(subnet_kernels.fingerprint(p.detach())) for n, p in model.named_parameters()}
    dtypes = {name: str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters()}
    return Provenance(base=ModelRecord("some/base", fingerprints={**prints, **other}, dtypes=dtypes))


def refuses(
    model: torch.nn.Module, optimizer: MaskedBase, mask: SubnetMask, error: type[Exception], message: str
) -> None:
    """Assert that `set_mask` is refused, changes nothing, and that training goes on under the old mask."""
    before = weights_of(model), state_of(optimizer)
    held = [(parameter, dict(values)) for parameter, values in optimizer.state.items()]
    groups = [dict(group) for group in optimizer.param_groups]
    old, requires = optimizer.mask, [p.requires_grad for p in model.parameters()]
    frozen, hooks = (
        optimizer.frozen_fingerprints,
        [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
    )
    with pytest.raises(error, match=message):
        optimizer.set_mask(mask)
    assert optimizer.mask is old
    assert differing(weights_of(model), before[0]) == differing(state_of(optimizer), before[1]) == []
    assert all(optimizer.state[p][key] is value for p, values in held for key, value in values.items())
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert [p.requires_grad for p in model.parameters()] == requires
    assert optimizer.frozen_fingerprints == frozen
    assert [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()] == hooks


@pytest.mark.parametrize("kind", BUILDERS)
def test_set_mask_refuses_masks_of_another_model_and_an_empty_one(kind: str) -> None:
    model, optimizer = trained(BUILDERS[kind])
    tensors = dict(random_mask(model, 0.5, seed=5).tensors)
    missing = SubnetMask({name: tensor for name, tensor in tensors.items() if name != "2.bias"})
    refuses(model, optimizer, missing, MaskMismatchError, r"`2\.bias` only in the model")
    wide = torch.nn.Sequential(torch.nn.Linear(13, 17), torch.nn.LayerNorm(17), torch.nn.Linear(17, 6))
    refuses(model, optimizer, random_mask(wide, 0.5), MaskMismatchError, r"`2\.weight` has shape \(6, 17\)")
    refuses(model, optimizer, only(model, {}), MaskMismatchError, "no trainable weight")


@pytest.mark.parametrize("kind", BUILDERS)
def test_set_mask_refuses_while_compact_gradients_wait(kind: str) -> None:
    model, optimizer = trained(BUILDERS[kind])
    new = random_mask(model, 0.5, seed=5)
    model(torch.ones(3, 13).bfloat16()).square().sum().backward()
    refuses(model, optimizer, new, GradientError, r"wait for their step under the old mask")
    optimizer.zero_grad()
    optimizer.set_mask(new)


@pytest.mark.parametrize("kind", BUILDERS)
def test_set_mask_refuses_another_base_than_that_of_the_first_mask(kind: str) -> None:
    base = small_model(torch.bfloat16)
    model, optimizer = trained(BUILDERS[kind], mask=first_mask(base, base_of(base)))
    tensors = random_mask(model, 0.5, seed=5).tensors
    # A tensor that was trained in the meantime: only what the two masks record can tell.
    other = SubnetMask(tensors, base_of(base, **{"2.weight": "0" * 32}))
    refuses(model, optimizer, other, MaskMismatchError, r"another base: `2\.weight` has fingerprint")
    optimizer.set_mask(SubnetMask(tensors, base_of(base)))


@pytest.mark.parametrize("kind", BUILDERS)
def test_set_mask_compares_untrained_tensors_with_the_base_of_the_new_mask(kind: str) -> None:
    model, optimizer = trained(BUILDERS[kind])  # its mask records no base
    tensors = random_mask(model, 0.5, seed=5).tensors
    base = small_model(torch.bfloat16)
    other = SubnetMask(tensors, base_of(base, **{"0.bias": "0" * 32}))
    refuses(
        model, optimizer, other, MaskMismatchError, r"weights of `0\.bias` are not those that the mask was made for"
    )
    optimizer.set_mask(SubnetMask(tensors, base_of(base)))


def test_set_mask_refuses_a_mask_that_was_compared_in_another_dtype() -> None:
    model, optimizer = trained(masked_adamw, torch.bfloat16, random_mask(small_model(torch.bfloat16), 0.4))
    new = SubnetMask(random_mask(model, 0.5, seed=5).tensors, base_of(small_model(torch.float32)))
    refuses(model, optimizer, new, MaskMismatchError, "is bfloat16 but the new mask was compared in float32")


@pytest.mark.parametrize("kind", BUILDERS)
def test_set_mask_audits_the_old_mask_first(kind: str) -> None:
    model, optimizer = trained(BUILDERS[kind])
    with torch.no_grad():
        dict(model.named_parameters())["0.bias"][3] += 1.0
    refuses(model, optimizer, random_mask(model, 0.5, seed=5), FrozenWeightError, r"`0\.bias`")


_KEEPS: list[tuple[type[torch.optim.Optimizer], dict[str, Any], str]] = [
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}, "sum"),
    (torch.optim.Rprop, {}, "step_size"),
    (torch.optim.ASGD, {}, "ax"),
]
"""Optimizers with an entry that does not start at zero."""


@pytest.mark.parametrize(("optimizer_cls", "options", "entry"), _KEEPS)
def test_set_mask_of_state_that_does_not_start_at_zero_may_shrink_but_not_grow(
    optimizer_cls: type[torch.optim.Optimizer], options: dict[str, Any], entry: str
) -> None:
    model, optimizer = trained(wrapped(optimizer_cls, **options))
    old = optimizer.mask
    grown = SubnetMask.from_dense({name: old[name] | random_mask(model, 0.3, seed=5)[name] for name in old.names})
    message = rf"`{optimizer_cls.__name__}` keeps `\w+` of `[\w.]+`, which has no value for the weights that enter"
    refuses(model, optimizer, grown, OptimizerError, message)
    before = {p: optimizer.state[p][entry].clone() for p in optimizer.state}
    shrunk = SubnetMask.from_dense({name: old[name] & random_mask(model, 0.7, seed=6)[name] for name in old.names})
    optimizer.set_mask(shrunk)
    for name, parameter in model.named_parameters():
        if shrunk.tensors[name].count:
            assert same_bits(optimizer.state[parameter][entry], before[parameter][shrunk[name][old[name]]])


def test_set_mask_refuses_state_that_is_not_compact() -> None:
    model, optimizer = trained(wrapped(EightBit))
    shrunk = {name: optimizer.mask[name] & random_mask(model, 0.7, seed=6)[name] for name in optimizer.mask.names}
    refuses(model, optimizer, SubnetMask.from_dense(shrunk), OptimizerError, "which is not compact")


def test_set_mask_of_whole_tensors_is_allowed_whatever_the_state() -> None:
    """A tensor that enters whole, or leaves whole, has no state to take over."""
    model = small_model(torch.float32)
    build = wrapped(EightBit)
    optimizer = build(model.named_parameters(), only(model, {"0.weight": True}))
    set_gradients(model, 0)
    optimizer.step()
    before = weights_of(model)
    optimizer.set_mask(only(model, {"2.weight": True}))
    set_gradients(model, 1)
    optimizer.step()
    assert differing(weights_of(model), before) == ["2.weight"]


@pytest.mark.parametrize("compact_grads", [True, False])
def test_under_ddp_no_frozen_tensor_may_enter_with_dense_gradients(
    compact_grads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(masked_adamw, compact_grads=compact_grads)
    new = random_mask(model, 0.5, seed=5)
    monkeypatch.setattr(mask_change, "num_processes", lambda: 2)
    if compact_grads:
        optimizer.set_mask(new)  # one process in truth; several are refused elsewhere
    else:
        refuses(model, optimizer, new, GradientError, r"`0\.bias` had no trainable weight so far")
        without = {name: new[name] for name in new.names if name != "0.bias"}
        optimizer.set_mask(only(model, without))


def test_set_mask_refuses_state_that_other_code_has_cut() -> None:
    model, optimizer = trained(wrapped(Lion))
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter]["exp_avg"] = optimizer.state[parameter]["exp_avg"][:1]
    refuses(model, optimizer, random_mask(model, 0.3, seed=5), OptimizerError, "which is not compact")


@pytest.mark.parametrize("kind", BUILDERS)
def test_under_ddp_a_tensor_that_leaves_keeps_its_gradient_and_may_come_back(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP waits for the gradients of all tensors that required one when it wrapped the model."""
    model, optimizer = trained(BUILDERS[kind], compact_grads=False)
    first, before = optimizer.mask, [name for name, p in model.named_parameters() if p.requires_grad]
    monkeypatch.setattr(base, "num_processes", lambda: 2)
    monkeypatch.setattr(mask_change, "num_processes", lambda: 2)
    optimizer.set_mask(only(model, {name: first[name] for name in first.names if name != "0.weight"}))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == before
    weights = weights_of(model)
    set_gradients(model, 2)
    optimizer.step()
    assert model[0].weight.grad is None, "no later step sees it"
    moved = differing(weights_of(model), weights)
    assert "0.weight" not in moved
    assert moved != []
    optimizer.set_mask(first)
    set_gradients(model, 3)
    optimizer.step()
    assert "0.weight" in differing(weights_of(model), weights)
