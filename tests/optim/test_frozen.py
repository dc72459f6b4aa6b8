"""Audits of the weights outside the mask: what they let pass, what they catch, and how they outlive a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits, set_gradients, small_model
from masked_optimizers import BUILDERS, Stack, differing, only, state_of, weights_of

from subnet_ft.errors import FrozenWeightError, OptimizerStateError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedBase
from subnet_ft.optim.frozen import frozen_fingerprints
from subnet_ft.optim.state import FROZEN

UNTRAINED, FULL = "0.bias", "1.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def partial_mask(model: torch.nn.Module) -> SubnetMask:
    """Mask a third of every tensor, nothing of `UNTRAINED` and all of `FULL`."""
    drawn = random_mask(model, 0.3)
    return only(model, {name: drawn[name] for name in drawn.names if name not in (UNTRAINED, FULL)} | {FULL: True})


def build(kind: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[torch.nn.Module, MaskedBase]:
    model = small_model(dtype)
    return model, BUILDERS[kind](model.named_parameters(), partial_mask(model), **options)


def train(model: torch.nn.Module, optimizer: MaskedBase, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


def flip(parameter: torch.Tensor, place: int, bit: int) -> None:
    """Flip one bit behind torch's back."""
    size = parameter.dtype.itemsize
    parameter.detach().view(-1).view(torch.uint8).numpy()[place * size + bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("compact_grads", [True, False])
@pytest.mark.parametrize("clip_norm", ["masked", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BUILDERS)
def test_audit_passes_whatever_the_optimizer_does(
    kind: str, dtype: torch.dtype, clip_norm: str, compact_grads: bool
) -> None:
    model, optimizer = build(
        kind, dtype, clip_norm=clip_norm, compact_grads=compact_grads, max_grad_norm=0.5, nonfinite="skip"
    )
    optimizer.audit()
    train(model, optimizer, range(2))
    optimizer.audit()
    set_gradients(model, 2)
    dict(model.named_parameters())["0.weight"].grad[...] = float("nan")
    optimizer.step()
    optimizer.zero_grad()
    optimizer.audit()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.audit()
    optimizer.set_mask(random_mask(model, 0.5, seed=5))
    optimizer.audit()
    train(model, optimizer, range(3, 5))
    optimizer.audit()
    assert optimizer.num_skipped_steps == 1


@pytest.mark.parametrize("kind", ["MaskedAdamW", "MaskedOptimizer"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_audit_sees_every_single_bit_off_the_mask_and_none_on_it(kind: str, dtype: torch.dtype) -> None:
    model, optimizer = build(kind, dtype)
    train(model, optimizer, range(1))
    for name, parameter in model.named_parameters():
        chosen = optimizer.mask[name].view(-1)
        for place in (int(chosen.logical_not().nonzero()[k]) for k in (0, -1) if not chosen.all()):
            for bit in range(8 * dtype.itemsize):
                flip(parameter, place, bit)
                with pytest.raises(FrozenWeightError, match=f"in `{name}` \\("):
                    optimizer.audit()
                flip(parameter, place, bit)
        for place in (int(chosen.nonzero()[k]) for k in (0, -1) if chosen.any()):
            flip(parameter, place, 3)
    optimizer.audit()


@pytest.mark.parametrize("name", ["experts", "matrix", "bias"])
@pytest.mark.parametrize("density", [0.0, 0.4])
def test_audit_sees_a_change_anywhere_in_tensors_of_any_dimension(name: str, density: float) -> None:
    model = Stack(torch.bfloat16)
    drawn = random_mask(model, density)
    optimizer = BUILDERS["MaskedSGD"](
        model.named_parameters(), only(model, {n: drawn[n] for n in drawn.names} | {"head": True})
    )
    optimizer.audit()
    parameter = dict(model.named_parameters())[name]
    for place in optimizer.mask[name].view(-1).logical_not().nonzero().view(-1).tolist():
        flip(parameter, place, 0)
        with pytest.raises(FrozenWeightError, match=f"`{name}`"):
            optimizer.audit()
        flip(parameter, place, 0)
    optimizer.audit()


@pytest.mark.parametrize("name", [UNTRAINED, "2.weight"])
@pytest.mark.parametrize(("before", "after"), [(0.0, -0.0), (float("nan"), "payload")])
def test_audit_goes_by_bits_and_not_by_values(name: str, before: float, after: Any) -> None:
    model = small_model(torch.float32)
    mask = partial_mask(model)
    flat = dict(model.named_parameters())[name].detach().view(-1)
    place = int(mask[name].view(-1).logical_not().nonzero()[0])
    flat[place] = before
    optimizer = BUILDERS["MaskedAdamW"](model.named_parameters(), mask)
    optimizer.audit()
    flat[place] = before
    optimizer.audit()  # NaN, though it differs from itself
    if after == "payload":
        flip(flat, place, 2)
        assert flat[place].isnan()
    else:
        flat[place] = after
        assert flat[place] == before
    with pytest.raises(FrozenWeightError, match=f"`{name}`"):
        optimizer.audit()


def test_audit_sees_two_weights_that_changed_places() -> None:
    model, optimizer = build("MaskedAdamW", torch.float32)
    optimizer.audit()
    flat = dict(model.named_parameters())[UNTRAINED].detach().view(-1)
    flat[:2] = flat[:2].flip(0)
    with pytest.raises(FrozenWeightError, match=UNTRAINED):
        optimizer.audit()


def test_audit_counts_the_tensors_and_tells_both_fingerprints() -> None:
    model, optimizer = build("MaskedAdamW", torch.float32)
    optimizer.audit()
    start = optimizer.frozen_fingerprints
    assert start is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # one bias is zero
    now = frozen_fingerprints(model, optimizer.mask)["0.weight"]
    message = rf"`0\.weight` and 3 other tensors \(fingerprint {start['0.weight']} at the start, {now} now\)"
    with pytest.raises(FrozenWeightError, match=message):
        optimizer.audit()
    assert optimizer.frozen_fingerprints == start  # what it compares with stays


def test_fingerprints_are_taken_at_the_first_step_and_leave_out_full_tensors() -> None:
    model, optimizer = build("MaskedSGD")
    assert optimizer.frozen_fingerprints is None
    assert FROZEN not in optimizer.state_dict()["param_groups"][0]
    with torch.no_grad():
        next(model.parameters()).mul_(2.0)  # before the first step: this is the start
    expected = frozen_fingerprints(model, optimizer.mask)
    train(model, optimizer, range(2))
    assert optimizer.frozen_fingerprints == expected == frozen_fingerprints(model, optimizer.mask)
    assert set(expected) == {name for name, _ in model.named_parameters()} - {FULL}
    other = optimizer.frozen_fingerprints
    other[UNTRAINED] = "changed by its reader"
    optimizer.audit()


def test_audit_after_set_mask_goes_by_the_new_mask() -> None:
    model, optimizer = build("MaskedAdamW", torch.float32)
    train(model, optimizer, range(1))
    new = {name: ~optimizer.mask[name] for name in optimizer.mask.names}
    optimizer.set_mask(SubnetMask.from_dense(new))
    assert optimizer.frozen_fingerprints == frozen_fingerprints(model, optimizer.mask)
    train(model, optimizer, range(1, 3))
    optimizer.audit()
    place = int(new["2.weight"].view(-1).logical_not().nonzero()[0])  # trained under the first mask
    flip(dict(model.named_parameters())["2.weight"], place, 0)
    with pytest.raises(FrozenWeightError, match=r"`2\.weight`"):
        optimizer.audit()


@pytest.mark.parametrize("kind", BUILDERS)
def test_fingerprints_are_saved_and_a_resumed_run_is_audited_by_those_of_its_start(kind: str, tmp_path: Path) -> None:
    model, optimizer = build(kind)
    train(model, optimizer, range(2))
    path = tmp_path / "state.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    saved = torch.load(path, weights_only=True)
    assert [FROZEN in group for group in saved["optimizer"]["param_groups"]] == [True]
    other, resumed = build(kind)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.frozen_fingerprints == optimizer.frozen_fingerprints
    assert FROZEN not in resumed.param_groups[0]
    train(other, resumed, range(2, 4))
    resumed.audit()
    flip(dict(other.named_parameters())[UNTRAINED], 0, 0)
    with pytest.raises(FrozenWeightError, match=UNTRAINED):
        resumed.audit()


@pytest.mark.parametrize("name", [UNTRAINED, "2.weight"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_state_is_refused_beside_another_base_and_nothing_changes(kind: str, name: str) -> None:
    model, optimizer = build(kind)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    other, resumed = build(kind)
    train(other, resumed, range(10, 12))
    place = int(resumed.mask[name].view(-1).logical_not().nonzero()[0])
    flip(dict(other.named_parameters())[name], place, 0)
    before = state_of(resumed), weights_of(other), resumed.frozen_fingerprints
    with pytest.raises(OptimizerStateError, match=f"another base: outside the mask, `{name}`"):
        resumed.load_state_dict(saved)
    assert differing(state_of(resumed), before[0]) == differing(weights_of(other), before[1]) == []
    assert resumed.frozen_fingerprints == before[2]
    flip(dict(other.named_parameters())[name], place, 0)
    resumed.load_state_dict(saved)


def test_a_full_mask_has_nothing_to_audit() -> None:
    model = small_model(torch.bfloat16)
    full = SubnetMask.full({name: tuple(p.shape) for name, p in model.named_parameters()})
    optimizer = BUILDERS["MaskedAdamW"](model.named_parameters(), full)
    train(model, optimizer, range(2))
    optimizer.audit()
    assert optimizer.frozen_fingerprints == {}
    other = small_model(torch.bfloat16)
    resumed = BUILDERS["MaskedAdamW"](other.named_parameters(), full)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.frozen_fingerprints == {}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float64, torch.float8_e4m3fn])
def test_audit_covers_frozen_tensors_that_no_mask_could_train(dtype: torch.dtype) -> None:
    """Quantized weights beside trained ones, and tensors that are not contiguous."""
    model = torch.nn.Module()
    model.odd = torch.nn.Parameter(torch.ones(4, 6).to(dtype).t(), requires_grad=False)
    model.nothing = torch.nn.Parameter(torch.ones(0, 3).to(dtype), requires_grad=False)
    model.weight = torch.nn.Parameter(torch.ones(5))
    optimizer = BUILDERS["MaskedAdamW"](model.named_parameters(), only(model, {"weight": True}))
    train(model, optimizer, range(2))
    optimizer.audit()
    model.odd.data.t().view(torch.uint8)[3, 1] ^= 1
    with pytest.raises(FrozenWeightError, match="`odd`"):
        optimizer.audit()


@pytest.mark.parametrize("kind", BUILDERS)
def test_fingerprints_survive_what_accelerate_does_to_an_optimizer(kind: str) -> None:
    from accelerate import Accelerator

    model, optimizer = build(kind, torch.float32)
    train(model, optimizer, range(1))
    before = state_of(optimizer), optimizer.frozen_fingerprints
    accelerator = Accelerator(cpu=True)
    prepared, wrapper = accelerator.prepare(model, optimizer)  # moves the state through load_state_dict
    assert wrapper.optimizer is optimizer
    assert optimizer.frozen_fingerprints == before[1] is not None
    assert differing(state_of(optimizer), before[0]) == []
    accelerator.backward(prepared(torch.ones(3, 13)).square().sum())
    wrapper.step()
    optimizer.audit()
    assert same_bits(prepared.get_parameter(UNTRAINED).detach(), small_model(torch.float32).get_parameter(UNTRAINED))
