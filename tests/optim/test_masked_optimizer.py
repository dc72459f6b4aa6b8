"""MaskedOptimizer against the wrapped optimizers on dense float32 weights, and the promises of masked training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits, set_gradients, small_model, ulps_at_scale
from wrapped_optimizers import WRAPPED, Counting, Failing, Hoarding, Lion, WithList, WithOwnMaster, WithStranger

import subnet_ft
import subnet_kernels
from subnet_ft.errors import MaskMismatchError, OptimizerError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW, MaskedOptimizer, memory_ledger

STEPS = 20
# Unclipped the bits are the same wherever torch's loops round alike in their vector part and in their rest.
ULP_PER_STEP = 1
# The sum of squares has another order here, and the last bit of the coefficient counts in every step after.
CLIPPED_ULP_PER_STEP = 8


def grouped(model: torch.nn.Module, *, named: bool) -> list[dict[str, Any]]:
    """Matrices in one group, vectors in another with a step size of its own."""
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in model.named_parameters() if p.dim() > 1]},
        {"params": [(n, p) for n, p in model.named_parameters() if p.dim() == 1], "lr": 3e-3},
    ]
    return groups if named else [{**group, "params": [p for _, p in group["params"]]} for group in groups]


def dense_twin(model: torch.nn.Module) -> torch.nn.Module:
    """Build a float32 model with the weights of another."""
    twin = small_model(torch.float32)
    with torch.no_grad():
        for theirs, ours in zip(twin.parameters(), model.parameters(), strict=True):
            theirs.copy_(ours)
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("max_grad_norm", "ulp_per_step"), [(None, ULP_PER_STEP), (5.0, CLIPPED_ULP_PER_STEP)])
@pytest.mark.parametrize(("optimizer_cls", "options"), WRAPPED)
def test_masked_optimizer_equals_the_wrapped_one_on_dense_float32_weights(
    optimizer_cls: type[torch.optim.Optimizer],
    options: dict[str, Any],
    max_grad_norm: float | None,
    ulp_per_step: int,
    dtype: torch.dtype,
) -> None:
    model = small_model(dtype)
    mask = random_mask(model, 0.4)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    twin = dense_twin(model)
    ours = MaskedOptimizer(
        optimizer_cls, grouped(model, named=True), mask, max_grad_norm=max_grad_norm, lr=1e-3, **options
    )
    theirs = optimizer_cls(grouped(twin, named=False), lr=1e-3, **options)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS) for optimizer in (ours, theirs)]
    for step in range(STEPS):
        set_gradients(model, step)
        for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            other.grad = parameter.grad.float() * mask[name]
            parameter.grad[~mask[name]] = float("nan")
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm)
        ours.step()
        theirs.step()
        for schedule in schedules:
            schedule.step()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        chosen, master = mask[name], ours.state[parameter]["master"]
        assert ulps_at_scale(master, other.detach()[chosen], scale=1e-3) <= STEPS * ulp_per_step
        assert not same_bits(master, start[name][chosen].float())
        assert same_bits(parameter.detach()[chosen], subnet_kernels.round_to_weights(master, dtype))
        assert same_bits(parameter.detach()[~chosen], start[name][~chosen])


def test_masked_optimizer_around_adamw_is_masked_adamw() -> None:
    results = []
    for wrapped in (True, False):
        model = small_model(torch.bfloat16)
        mask, options = random_mask(model, 0.4), {"lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}
        optimizer = (
            MaskedOptimizer(torch.optim.AdamW, model.named_parameters(), mask, **options)
            if wrapped
            else MaskedAdamW(model.named_parameters(), mask, **options)
        )
        for step in range(STEPS):
            set_gradients(model, step)
            optimizer.step()
        results.append([optimizer.state[parameter]["master"] for parameter in model.parameters()])
    assert all(ulps_at_scale(a, b, scale=1e-3) <= STEPS * CLIPPED_ULP_PER_STEP for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("compact_grads", [True, False])
def test_masked_optimizer_leaves_off_mask_bits_alone(compact_grads: bool) -> None:
    model = small_model(torch.float32)
    mask = random_mask(model, 0.3)
    dense = {name: mask[name] for name in mask.names}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.view(-1)[:2] = torch.tensor([float("nan"), -0.0])
            dense[name].view(-1)[:2] = False
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = MaskedOptimizer(
        torch.optim.SGD,
        model.named_parameters(),
        SubnetMask.from_dense(dense),
        lr=0.1,
        momentum=0.9,
        weight_decay=0.5,
        max_grad_norm=1.0,
        compact_grads=compact_grads,
    )
    for step in range(5):
        set_gradients(model, step)
        for name, parameter in model.named_parameters():
            parameter.grad[~dense[name]] = float("nan")
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert same_bits(parameter.detach()[~dense[name]], start[name][~dense[name]])
        assert (parameter.detach()[dense[name]] != start[name][dense[name]]).float().mean() > 0.9
        assert parameter.detach()[dense[name]].isfinite().all()


def test_masked_optimizer_keeps_updates_below_the_rounding_step_of_bfloat16() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    mask = SubnetMask.from_dense({"w": torch.tensor([True, False, True, True])})
    optimizer = MaskedOptimizer(torch.optim.SGD, [("w", parameter)], mask, lr=1e-4, max_grad_norm=None)
    for _ in range(50):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[parameter]["master"], torch.full((3,), 0.995), rtol=0, atol=1e-6)
    assert parameter.tolist() == [0.99609375, 1.0, 0.99609375, 0.99609375]


def test_masked_optimizer_rounds_ties_away_from_zero_as_the_kernels_do() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.bfloat16))
    mask = SubnetMask.full({"w": (2,)})
    optimizer = MaskedOptimizer(torch.optim.SGD, [("w", parameter)], mask, lr=1.0, max_grad_norm=None)
    parameter.grad = torch.tensor([-(2.0**-8), 2.0**-8], dtype=torch.bfloat16)
    optimizer.step()
    assert parameter.tolist() == [1.0078125, -1.0078125]


def test_masked_optimizer_trains_on_the_gradients_of_a_backward_and_consumes_them() -> None:
    results = []
    for compact_grads in (True, False):
        model = small_model(torch.float32)
        optimizer = MaskedOptimizer(
            Lion,
            model.named_parameters(),
            random_mask(model, 0.4),
            lr=1e-2,
            max_grad_norm=1.0,
            compact_grads=compact_grads,
        )
        for step in range(3):
            for micro in range(2):
                torch.manual_seed(10 * step + micro)
                model(torch.randn(4, 13)).square().mean().backward()
            optimizer.step()
            if compact_grads:
                assert all(parameter.grad is None for parameter in model.parameters())
                assert float(optimizer.grad_norm()) == 0.0
            optimizer.zero_grad()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_masked_optimizer_skips_a_tensor_without_gradient_whole() -> None:
    model = small_model(torch.float32)
    optimizer = MaskedOptimizer(
        torch.optim.AdamW,
        model.named_parameters(),
        random_mask(model, 0.5),
        lr=0.1,
        weight_decay=0.5,
        max_grad_norm=None,
    )
    set_gradients(model, 0)
    optimizer.step()
    weight = dict(model.named_parameters())["2.weight"]
    before = weight.detach().clone()
    kept = {key: value.clone() for key, value in optimizer.state[weight].items()}
    set_gradients(model, 1)
    weight.grad = None
    optimizer.step()
    assert same_bits(weight.detach(), before)
    assert all(same_bits(optimizer.state[weight][key], value) for key, value in kept.items())
    assert int(optimizer.state[next(model.parameters())]["step"]) == 2


def test_masked_optimizer_forgets_the_gradients_of_a_step_that_failed() -> None:
    model = small_model(torch.float32)
    optimizer = MaskedOptimizer(Failing, model.named_parameters(), random_mask(model, 0.4), max_grad_norm=None)
    set_gradients(model, 0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = float("inf")
    set_gradients(model, 1)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.1
    master = optimizer.state[model[2].weight]["master"]
    before = master.clone()
    set_gradients(model, 2)
    model[2].weight.grad = None
    optimizer.step()
    assert same_bits(master, before)


def test_masked_optimizer_clips_on_the_norm_of_the_mask() -> None:
    model = small_model(torch.float32)
    mask = random_mask(model, 0.3)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = MaskedOptimizer(torch.optim.SGD, model.named_parameters(), mask, lr=1.0, max_grad_norm=0.5)
    set_gradients(model, 0)
    masked = torch.cat([p.grad[mask[name]] for name, p in model.named_parameters()])
    optimizer.step()
    moved = [(s - p.detach())[mask[n]] for s, (n, p) in zip(start, model.named_parameters(), strict=True)]
    torch.testing.assert_close(torch.cat(moved), masked * (0.5 / masked.norm()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("switch", ["fused", "foreach"])
def test_masked_optimizer_passes_options_on(switch: str) -> None:
    results = []
    for value in (True, False):
        model = small_model(torch.bfloat16)
        optimizer = MaskedOptimizer(
            torch.optim.AdamW, model.named_parameters(), random_mask(model, 0.4), max_grad_norm=1.0, **{switch: value}
        )
        assert [group[switch] for group in optimizer.param_groups] == [value]
        for step in range(5):
            set_gradients(model, step)
            optimizer.step()
        results.append([optimizer.state[parameter]["master"] for parameter in model.parameters()])
    assert all(ulps_at_scale(a, b, scale=1e-3) <= 5 * CLIPPED_ULP_PER_STEP for a, b in zip(*results, strict=True))


def test_masked_optimizer_shows_the_options_of_the_wrapped_one_and_what_its_step_changes() -> None:
    model = small_model(torch.float32)
    optimizer = MaskedOptimizer(Counting, model.named_parameters(), random_mask(model, 0.4), max_grad_norm=None)
    assert optimizer.defaults == {"lr": 0.25, "count": 0}
    optimizer.param_groups[0]["count"] = 5
    set_gradients(model, 0)
    optimizer.step()
    optimizer.step()
    assert optimizer.param_groups[0]["count"] == 7
    assert optimizer.state_dict()["param_groups"][0]["count"] == 7


def test_masked_optimizer_starts_from_weights_that_were_loaded_after_it_was_built() -> None:
    model = small_model(torch.bfloat16)
    mask = random_mask(model, 0.4)
    optimizer = MaskedOptimizer(torch.optim.SGD, model.named_parameters(), mask, lr=0.0, max_grad_norm=None)
    model.load_state_dict({name: torch.full_like(p, 3.0) for name, p in model.state_dict().items()})
    set_gradients(model, 0)
    optimizer.step()
    assert all(parameter.eq(3.0).all() for parameter in model.parameters())


def test_masked_optimizer_overwrites_weights_that_somebody_changed() -> None:
    model = small_model(torch.float32)
    mask = random_mask(model, 0.4)
    optimizer = MaskedOptimizer(torch.optim.SGD, model.named_parameters(), mask, lr=0.0, max_grad_norm=None)
    set_gradients(model, 0)
    optimizer.step()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    set_gradients(model, 1)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert same_bits(parameter.detach(), torch.where(mask[name], start[name], 0.0))


def test_masked_optimizer_gives_away_a_gradient_that_the_wrapped_one_keeps() -> None:
    model = small_model(torch.float32)
    mask = random_mask(model, 0.4)
    optimizer = MaskedOptimizer(Hoarding, model.named_parameters(), mask, max_grad_norm=None)
    weight = model[2].weight
    for step in range(3):
        set_gradients(model, step)
        seen = weight.grad[mask["2.weight"]].clone()
        optimizer.step()
        set_gradients(model, step + 1)
        optimizer.grad_norm()  # compacts into the buffer
        assert same_bits(optimizer.state[weight]["previous"], seen)
        optimizer.zero_grad()


def test_masked_optimizer_counts_what_the_wrapped_one_keeps() -> None:
    model = small_model(torch.bfloat16)
    mask = random_mask(model, 0.25)
    optimizer = MaskedOptimizer(torch.optim.AdamW, model.named_parameters(), mask, max_grad_norm=None)
    set_gradients(model, 0)
    optimizer.step()
    count = mask.num_trainable
    ledger = memory_ledger(model, optimizer)
    assert (ledger["moments"], ledger["masters"], ledger["gradients"]) == (8 * count, 4 * count, 4 * count)


@pytest.mark.parametrize(
    ("optimizer_cls", "message"),
    [
        (WithList, "`WithList` keeps `history`, a list"),
        (WithOwnMaster, "`WithOwnMaster` keeps `master`, a Tensor"),
        (WithStranger, r"`WithStranger` keeps state under \['shared'\]"),
    ],
)
def test_masked_optimizer_refuses_state_that_it_cannot_save(
    optimizer_cls: type[torch.optim.Optimizer], message: str
) -> None:
    model = small_model(torch.float32)
    optimizer = MaskedOptimizer(optimizer_cls, model.named_parameters(), random_mask(model, 0.4), max_grad_norm=None)
    set_gradients(model, 0)
    with pytest.raises(OptimizerError, match=message):
        optimizer.step()


def test_masked_optimizer_refuses_what_cannot_be_wrapped_and_touches_no_parameter() -> None:
    model = small_model(torch.float32)
    mask = random_mask(model, 0.4)
    refused = [
        (torch.optim.Muon, {}, OptimizerError, "`Muon` cannot train a subnetwork"),
        (MaskedAdamW, {}, OptimizerError, "`MaskedAdamW` is masked already"),
        (torch.optim.AdamW, {"learning_rate": 1.0}, TypeError, "no option `learning_rate`"),
        (torch.optim.AdamW, {"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter"),
        (torch.optim.AdamW, {"max_grad_norm": 0.0}, ValueError, "`max_grad_norm` must be > 0"),
    ]
    kept = []  # a traceback keeps its frames, and with them an optimizer that had taken the gradients
    for optimizer_cls, options, error, message in refused:
        with pytest.raises(error, match=message) as caught:
            MaskedOptimizer(optimizer_cls, model.named_parameters(), mask, **{"max_grad_norm": None, **options})
        kept.append(caught)
    with pytest.raises(TypeError, match="max_grad_norm"):
        MaskedOptimizer(torch.optim.AdamW, model.named_parameters(), mask)  # type: ignore[call-arg]
    with pytest.raises(MaskMismatchError, match=r"`2\.bias` only in the mask"):
        MaskedOptimizer(torch.optim.AdamW, list(model.named_parameters())[:-1], mask, max_grad_norm=None)
    subnet_ft.MaskedOptimizer(torch.optim.AdamW, model.named_parameters(), mask, max_grad_norm=None)
