"""Triton's optimizer steps against the reference, bit for bit, in launches that do not grow with the tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from gpu_cases import DEVICE, WEIGHTS, Update, adamw_update, bit_mask, cases, changed_tensors, on_device, sgd_update
from helpers import random_bits, same_bits

from subnet_kernels import TILE_SIZE, AdamWUpdate, SGDUpdate, reference, split_master
from subnet_kernels.gpu import launch, masked_adamw, masked_sgd, step

Step = Callable[..., None]
SCALE = torch.tensor(0.3)

# What the weights are, and the gradient's dtype; `None` is a compact one.
KINDS = [
    ("bf16, remainders", None),
    ("bf16, masters", torch.bfloat16),
    ("bf16, masters", None),
    ("bf16, stochastic", torch.bfloat16),
    ("fp16, masters", torch.float16),
    ("fp32", torch.float32),
    ("fp32", None),
]


def assert_as_reference(
    run: Step, expected_run: Step, updates: Sequence[Update], scale: torch.Tensor | None = SCALE
) -> None:
    """Run both on copies; everything must agree bit for bit, off the mask with what was there before."""
    expected = [on_device(update) for update in updates]
    found = [on_device(update) for update in updates]
    run(found, grad_scale=None if scale is None else scale.to(DEVICE), cache={})
    if DEVICE.type == "cuda":
        expected = [_on_cpu(update) for update in updates]
    expected_run(expected, grad_scale=scale)
    for before, ours, theirs in zip(updates, found, expected, strict=True):
        theirs_changed = changed_tensors(theirs)
        for name, tensor in changed_tensors(ours).items():
            assert same_bits(tensor, theirs_changed[name]), name
        chosen = reference.unpack_bits(before.mask.bits, before.mask.num_elements)
        assert same_bits(ours.param.cpu()[~chosen], before.param[~chosen])
        assert ours.param.cpu()[chosen].isfinite().all()


def _on_cpu(update: Update) -> Update:
    fields = {field.name: getattr(update, field.name) for field in dataclasses.fields(update)}
    return dataclasses.replace(update, **{n: f.clone() for n, f in fields.items() if isinstance(f, torch.Tensor)})


def test_masked_adamw_gives_the_values_of_its_example() -> None:
    param = torch.ones(4, device=DEVICE)
    mask = bit_mask(torch.tensor([False, True, False, True]))
    state = [torch.zeros(2, device=DEVICE) for _ in range(2)]
    update = AdamWUpdate(
        param, mask, torch.full((2,), 0.5, device=DEVICE), *state, None,
        lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, step=1,
    )  # fmt: skip
    masked_adamw([update], grad_scale=None, cache={})
    assert same_bits(param.cpu()[[0, 2]], torch.ones(2))
    torch.testing.assert_close(param.cpu()[[1, 3]], torch.tensor([0.9, 0.9]))


def test_masked_sgd_gives_the_values_of_its_example() -> None:
    param = torch.ones(4, device=DEVICE)
    mask = bit_mask(torch.tensor([False, True, False, True]))
    grad = torch.full((2,), 0.5, device=DEVICE)
    update = SGDUpdate(param, mask, grad, None, None, lr=0.1, momentum=0.0, weight_decay=0.0)
    masked_sgd([update], grad_scale=None, cache={})
    torch.testing.assert_close(param.cpu(), torch.tensor([1.0, 0.95, 1.0, 0.95]))


@pytest.mark.parametrize(("size", "density", "kind"), cases(*KINDS))
def test_masked_adamw_equals_the_reference(size: int, density: float, kind: tuple[str, Any]) -> None:
    assert_as_reference(masked_adamw, reference.masked_adamw, [adamw_update(size, density, *kind, seed=size)])


@pytest.mark.parametrize(("size", "density", "kind"), cases(*KINDS))
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_masked_sgd_equals_the_reference(
    size: int, density: float, kind: tuple[str, Any], momentum: float, nesterov: bool
) -> None:
    if size > 5000 and not nesterov:
        size = 3000  # rules differ in their arithmetic alone
    update = sgd_update(size, density, *kind, seed=size, momentum=momentum, nesterov=nesterov)
    assert_as_reference(masked_sgd, reference.masked_sgd, [update])


def test_masked_adamw_takes_tensors_of_every_kind_step_and_rate_in_one_call() -> None:
    kinds = [(weights, grad) for weights in WEIGHTS for grad in (None, torch.bfloat16, torch.float16, torch.float32)]
    densities = (0.3, 1.0, 0.0, 0.01)
    updates = [
        adamw_update(
            500 + 97 * i, densities[i % 4], *kind, seed=i,
            step=1 + i, lr=10.0 ** -(1 + i % 4), weight_decay=0.1 * (i % 3), betas=(0.9 - 0.01 * i, 0.99), eps=1e-6,
        )
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    assert_as_reference(masked_adamw, reference.masked_adamw, updates)
    assert_as_reference(masked_adamw, reference.masked_adamw, updates, scale=None)


def test_masked_sgd_takes_rules_of_every_kind_in_one_call() -> None:
    rules = [(0.0, False), (0.9, False), (0.5, True)]
    updates = [
        sgd_update(700 + 31 * i, 0.4, "bf16, remainders", None, seed=i, momentum=momentum, nesterov=nesterov)
        for i, (momentum, nesterov) in enumerate(rules * 2)
    ]
    assert_as_reference(masked_sgd, reference.masked_sgd, updates)


@pytest.mark.parametrize("weights", ["bf16, masters", "fp16, masters"])
@pytest.mark.parametrize("lr", [1e-2, 1e-6])
def test_masked_adamw_writes_rounded_weights_where_their_rounding_changes(weights: str, lr: float) -> None:
    """Whether few weights change or all do; what does not is not even written, shown by a weight that lies."""
    update = adamw_update(3000, 0.3, weights, None, lr=lr, weight_decay=0.0, is_rounded=True)
    chosen = reference.unpack_bits(update.mask.bits, 3000)
    assert update.master is not None
    update.param[chosen] = reference.round_to_weights(update.master, update.param.dtype)
    assert_as_reference(masked_adamw, reference.masked_adamw, [update])

    still = dataclasses.replace(update, lr=0.0)
    lying = on_device(still)
    lying.param.view(torch.int16)[int(chosen.nonzero()[0])] = 0x1234
    masked_adamw([lying], grad_scale=None, cache={})
    assert lying.param.view(torch.int16)[int(chosen.nonzero()[0])] == 0x1234


def started_kernels(monkeypatch: pytest.MonkeyPatch, updates: Sequence[AdamWUpdate]) -> list[Any]:
    """Run one step and return the kernel of every launch."""
    started = []
    launched = launch.launch

    def noted(function: Any, num_programs: int, *arguments: Any, **options: Any) -> None:
        started.append(function)
        launched(function, num_programs, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "launch", noted)
        masked_adamw(updates, grad_scale=None, cache={})
    return started


@pytest.mark.parametrize("weights", WEIGHTS)
def test_masked_adamw_under_a_full_mask_reads_addresses_of_any_alignment(
    monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """A view two bytes further on is not read in vectors, which would need multiples of 16 bytes."""
    update = adamw_update(2500, 1.0, weights, torch.float32)
    straight, moved = on_device(update), on_device(update)
    moved = dataclasses.replace(moved, param=torch.cat([moved.param[:1], moved.param])[1:])
    assert started_kernels(monkeypatch, [straight]) == [step.step_full, step.step_slots]
    assert started_kernels(monkeypatch, [moved]) == [step.step_slots]
    for name, tensor in changed_tensors(moved).items():
        assert same_bits(tensor, changed_tensors(straight)[name]), name


def test_masked_adamw_launches_as_often_for_30_tensors_as_for_3(monkeypatch: pytest.MonkeyPatch) -> None:
    densities = (0.1, 1.0, 0.5)
    updates = [on_device(adamw_update(1100 + i, densities[i % 3], "bf16, masters", None)) for i in range(30)]
    few = started_kernels(monkeypatch, updates[:3])
    assert few == [step.step_full, step.step_slots]
    assert started_kernels(monkeypatch, updates) == few


def test_masked_adamw_keeps_its_plan_while_the_masks_stay_and_notices_a_change() -> None:
    cache: dict[Any, Any] = {}
    updates = [adamw_update(1500, 0.3, "bf16, remainders", None, seed=seed) for seed in range(2)]
    ours = [on_device(update) for update in updates]
    theirs = [on_device(update) for update in updates]
    plans = set()
    for number in range(1, 4):
        for which in (ours, theirs):
            which[:] = [dataclasses.replace(update, step=number, lr=0.1 / number) for update in which]
        masked_adamw(ours, grad_scale=None, cache=cache)
        reference.masked_adamw(theirs, grad_scale=None)
        plans.add(id(cache["triton_plan"]))
    assert len(plans) == 1

    other = adamw_update(1500, 0.6, "bf16, remainders", None, seed=9)
    for which in (ours, theirs):
        which[1] = on_device(other)
        masked_adamw(which, grad_scale=None, cache=cache) if which is ours else reference.masked_adamw(
            which, grad_scale=None
        )
    for mine, reference_one in zip(ours, theirs, strict=True):
        for name, tensor in changed_tensors(mine).items():
            assert same_bits(tensor, changed_tensors(reference_one)[name]), name


def tied_steps(num_steps: int) -> int:
    """Train with masters and with remainders, half of the steps on multiples of half a unit; return the ties met."""
    chosen = random_bits(63, 0.5)
    mask = bit_mask(chosen)
    generator = torch.Generator().manual_seed(0)
    master = 1 + torch.randint(0, 200, (mask.count,), generator=generator) / 256
    weights = [torch.full((63,), float("nan"), dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    upper, remainder = split_master(master)
    for weight in weights:
        weight[chosen.to(DEVICE)] = upper.to(DEVICE)
    masters = [master.to(DEVICE), remainder.to(DEVICE)]
    states = [[torch.zeros(mask.count, device=DEVICE) for _ in range(2)] for _ in range(2)]
    caches: list[dict[Any, Any]] = [{}, {}]
    ties = 0
    for number in range(1, num_steps + 1):
        uses_sgd = number % 2 == 0
        if uses_sgd:
            # Back onto the grid of half units, so that every other master is a tie.
            target = 1 + torch.randint(0, 250, (mask.count,), generator=generator) / 256
            grad = (masters[0].cpu() - target).to(DEVICE)
        else:
            grad = torch.randn(mask.count, generator=generator).to(DEVICE)
        for weight, kept, (first, second), cache in zip(weights, masters, states, caches, strict=True):
            common, is_rounded = (weight, mask, grad), kept.dtype == torch.float32
            if uses_sgd:
                update = SGDUpdate(
                    *common, None, kept, lr=1.0, momentum=0.0, weight_decay=0.0, is_rounded=is_rounded
                )  # fmt: skip
                masked_sgd([update], grad_scale=None, cache=cache)
            else:
                other = AdamWUpdate(
                    *common, first, second, kept,
                    lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, step=number, is_rounded=is_rounded,
                )  # fmt: skip
                masked_adamw([other], grad_scale=None, cache=cache)
        ties += int(((masters[0].view(torch.int32) & 0xFFFF) == 0x8000).sum())
        assert same_bits(weights[0], weights[1]), number
        joined = reference.join_master(weights[1][chosen.to(DEVICE)], masters[1])
        assert same_bits(joined, masters[0]), number
        assert all(same_bits(a, b) for a, b in zip(*states, strict=True)), number
    return ties


def test_masters_and_remainders_give_the_same_weights_ties_included() -> None:
    assert tied_steps(60) > 300


@pytest.mark.slow
def test_masters_and_remainders_give_the_same_weights_over_10000_steps() -> None:
    assert tied_steps(10_000) > 50_000


def test_masked_adamw_with_nothing_to_do_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = on_device(adamw_update(100, 0.0, "fp32", None))
    assert started_kernels(monkeypatch, [empty]) == []


def test_the_plan_says_what_it_holds_on_the_device() -> None:
    mask = bit_mask(random_bits(5 * TILE_SIZE + 1, 0.2))
    param, grad = (torch.zeros(count, device=DEVICE) for count in (mask.num_elements, mask.count))
    update = SGDUpdate(param, mask, grad, None, None, lr=0.1, momentum=0.0, weight_decay=0.0)
    cache: dict[Any, Any] = {}
    masked_sgd([update], grad_scale=None, cache=cache)
    assert cache["triton_plan"].nbytes == 6 * 8 + 8 * step.COLUMNS  # six tiles, one row
