"""Clipping by the norm of the mask and of the whole gradient, both norms, and the second gradient that has no norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits, set_gradients, small_model
from masked_optimizers import BUILDERS, masked_adamw, masked_sgd, only, weights_of
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from subnet_ft.errors import GradientError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import clipping
from subnet_ft.optim.clipping import norm_of_squares, sum_of_squares

FROZEN = ("0.bias", "1.weight")


def partial_mask(model: torch.nn.Module) -> SubnetMask:
    """Mask a third of every tensor and nothing of those in `FROZEN`."""
    drawn = random_mask(model, 0.3)
    return only(model, {name: drawn[name] for name in drawn.names if name not in FROZEN})


def dense_gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the gradients of step 0 of a model without a mask."""
    twin = small_model(dtype)
    set_gradients(twin, 0)
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def full_mask(model: torch.nn.Module) -> SubnetMask:
    return SubnetMask.full({name: tuple(p.shape) for name, p in model.named_parameters()})


@pytest.mark.parametrize("compact_grads", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_norm_full_scales_as_torch_does_with_all_gradients(
    compact_grads: bool, dtype: torch.dtype, max_norm: float
) -> None:
    model = small_model(dtype)
    mask = partial_mask(model)
    options: dict[str, Any] = {"betas": (0.0, 0.9), "compact_grads": compact_grads}
    optimizer = masked_adamw(model.named_parameters(), mask, max_grad_norm=max_norm, clip_norm="full", **options)
    dense = dense_gradients(dtype)
    total = torch.nn.utils.get_total_norm([grad.float() for grad in dense.values()])
    scale = float(torch.clamp(max_norm / (total + 1e-6), max=1.0))
    set_gradients(model, 0)
    norms = optimizer.grad_norms()
    torch.testing.assert_close(norms["full"], total, rtol=1e-6, atol=0)
    masked = torch.cat([dense[name][mask[name]].float() for name in mask.names])
    torch.testing.assert_close(norms["masked"], masked.norm(), rtol=1e-6, atol=0)
    assert norms["full"] > 1.05 * norms["masked"]  # or the two could not be told apart
    assert same_bits(optimizer.grad_norm(), norms["full"])
    optimizer.step()
    # Without a first momentum, the average after the first step is the gradient that the step took.
    used = torch.cat([optimizer.state[p]["exp_avg"] for n, p in model.named_parameters() if n not in FROZEN])
    torch.testing.assert_close(used, masked * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BUILDERS)
def test_clip_norm_full_gives_the_same_bits_compact_and_dense(kind: str, dtype: torch.dtype) -> None:
    weights = []
    for compact_grads in (True, False):
        model = small_model(dtype)
        optimizer = BUILDERS[kind](
            model.named_parameters(), partial_mask(model), max_grad_norm=0.5, clip_norm="full",
            compact_grads=compact_grads,
        )  # fmt: skip
        start = weights_of(model)
        for step in range(4):
            set_gradients(model, step)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(weights_of(model))
        for name, value in weights[-1].items():
            chosen = optimizer.mask[name]
            assert same_bits(value[~chosen], start[name][~chosen])
            assert not chosen.any() or (value[chosen] != start[name][chosen]).any()
    assert all(same_bits(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("compact_grads", [True, False])
@pytest.mark.parametrize("options", [{"clip_norm": "full"}, {"measure_full_norm": True}])
def test_frozen_tensors_keep_requires_grad_while_the_whole_norm_is_measured(
    compact_grads: bool, options: dict[str, Any]
) -> None:
    model = small_model(torch.float32)
    frozen_by_hand = dict(model.named_parameters())["1.weight"].requires_grad_(False)
    optimizer = masked_adamw(model.named_parameters(), partial_mask(model), compact_grads=compact_grads, **options)
    bias = dict(model.named_parameters())["0.bias"]
    assert bias.requires_grad
    assert not frozen_by_hand.requires_grad  # its owner said so; no norm asks for it
    seen = []
    bias.register_hook(lambda grad: seen.append(grad.norm()))
    start = weights_of(model)
    model(torch.randn(3, 13)).square().sum().backward()
    assert seen
    assert (bias.grad is None) == compact_grads
    assert frozen_by_hand.grad is None
    assert optimizer.grad_norms()["full"] > optimizer.grad_norms()["masked"]
    optimizer.step()
    assert bias.grad is None  # no step takes it, so nobody else would free it
    assert all(same_bits(value, start[name]) for name, value in weights_of(model).items() if name in FROZEN)


@pytest.mark.parametrize("compact_grads", [True, False])
def test_without_the_whole_norm_frozen_tensors_get_no_gradient(compact_grads: bool) -> None:
    model = small_model(torch.float32)
    optimizer = masked_adamw(model.named_parameters(), partial_mask(model), compact_grads=compact_grads)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(FROZEN)
    model(torch.randn(3, 13)).square().sum().backward()
    assert list(optimizer.grad_norms()) == ["masked"]
    assert same_bits(optimizer.grad_norm(), optimizer.grad_norms()["masked"])


@pytest.mark.parametrize("compact_grads", [True, False])
@pytest.mark.parametrize("clip_norm", clipping.CLIP_NORMS)
def test_measure_full_norm_gives_both_norms_and_clips_on_the_one_asked_for(clip_norm: str, compact_grads: bool) -> None:
    model = small_model(torch.float32)
    optimizer = masked_adamw(
        model.named_parameters(), partial_mask(model), clip_norm=clip_norm, measure_full_norm=True,
        compact_grads=compact_grads, betas=(0.0, 0.9),
    )  # fmt: skip
    set_gradients(model, 0)
    norms = {kind: float(norm) for kind, norm in optimizer.grad_norms().items()}
    assert list(norms) == ["masked", "full"]
    assert norms["full"] > 1.05 * norms["masked"]
    assert float(optimizer.clip_grad_norm_(0.25)) == norms[clip_norm] == float(optimizer.grad_norm())
    optimizer.step()
    used = torch.cat([values["exp_avg"] for values in optimizer.state.values()]).norm()
    assert float(used) == pytest.approx(0.25 * norms["masked"] / norms[clip_norm], rel=1e-5)


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("options", [{"clip_norm": "full"}, {"measure_full_norm": True}])
def test_a_second_gradient_is_refused_where_the_whole_norm_needs_the_dense_sum(
    kind: str, options: dict[str, Any]
) -> None:
    model = small_model(torch.float32)
    optimizer = BUILDERS[kind](model.named_parameters(), partial_mask(model), **options)
    batch = torch.randn(3, 13)
    model(batch).square().sum().backward()
    with pytest.raises(GradientError, match=r"`2\.bias` got a second gradient .*`compact_grads=False`"):
        model(batch).square().sum().backward()
    optimizer.release()
    dense = BUILDERS[kind](model.named_parameters(), partial_mask(model), compact_grads=False, **options)
    model.zero_grad()
    for _ in range(2):
        model(batch).square().sum().backward()
    twin = small_model(torch.float32)
    (2 * model(batch).square().sum()).backward()
    (4 * twin(batch).square().sum()).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters()])
    torch.testing.assert_close(dense.grad_norms()["full"], expected, rtol=1e-5, atol=0)


def test_a_second_gradient_by_reentrant_checkpointing_is_refused() -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(13, 17), torch.nn.Linear(17, 13))
    optimizer = masked_adamw(layers.named_parameters(), only(layers, {"0.weight": True}), clip_norm="full")
    hidden = checkpoint(layers[1], layers[0](torch.randn(3, 13)), use_reentrant=True)
    # The first layer is used inside and outside of what is checkpointed, so its hook fires twice in one backward.
    hidden = checkpoint(layers[0], hidden, use_reentrant=True)
    with pytest.raises(GradientError, match=r"`0\.\w+` got a second gradient .*`compact_grads=False`"):
        hidden.square().sum().backward()
    optimizer.zero_grad()
    layers[1](layers[0](torch.randn(3, 13))).square().sum().backward()
    optimizer.step()


def test_zero_grad_after_a_refused_gradient_leaves_nothing_behind() -> None:
    model = small_model(torch.float32)
    optimizer = masked_adamw(model.named_parameters(), only(model, {"0.weight": True}), clip_norm="full")
    batch = torch.randn(3, 13)
    model(batch).square().sum().backward()
    norms = optimizer.grad_norms()
    with pytest.raises(GradientError, match="second gradient"):
        model(batch).square().sum().backward()
    optimizer.zero_grad()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == []
    model(batch).square().sum().backward()
    assert all(same_bits(norm, norms[kind]) for kind, norm in optimizer.grad_norms().items())


@pytest.mark.parametrize("compact_grads", [True, False])
def test_zero_grad_drops_what_was_set_by_hand_on_frozen_tensors(compact_grads: bool) -> None:
    model = small_model(torch.float32)
    optimizer = masked_adamw(
        model.named_parameters(), partial_mask(model), clip_norm="full", compact_grads=compact_grads
    )
    set_gradients(model, 0)
    optimizer.zero_grad()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == []
    assert optimizer.grad_norms() == {"masked": torch.tensor(0.0), "full": torch.tensor(0.0)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sum_of_squares_makes_no_float32_copy(dtype: torch.dtype) -> None:
    grad = torch.ones(4 * clipping._CHUNK + 3, dtype=dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        total = sum_of_squares(grad)
    allocated = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 0 < max(allocated) <= 8 * clipping._CHUNK < 4 * grad.numel()
    assert float(total) == pytest.approx(grad.numel(), rel=1e-5)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.linalg.vector_norm(grad, dtype=torch.float32)  # what it avoids, so that the test can see it
    copies = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(copies) >= 4 * grad.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_sum_of_squares_is_that_of_all_its_parts(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipping, "_CHUNK", 64)
    grad = (300 * torch.randn(size, generator=torch.Generator().manual_seed(size))).to(dtype)  # squares leave float16
    assert float(sum_of_squares(grad)) == pytest.approx(float(grad.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("compact_grads", [True, False])
@pytest.mark.parametrize("value", [1e20, 1e-25])
def test_both_norms_hold_gradients_whose_squares_leave_float32(value: float, compact_grads: bool) -> None:
    model = small_model(torch.float32)
    optimizer = masked_adamw(
        model.named_parameters(), full_mask(model), max_grad_norm=1.0, clip_norm="full", compact_grads=compact_grads
    )
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    expected = torch.nn.utils.get_total_norm([p.grad.double() for p in model.parameters()]).float()
    norms = optimizer.grad_norms()
    torch.testing.assert_close(norms["masked"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(norms["full"], expected, rtol=1e-5, atol=0)
    optimizer.step()  # finite, so nobody objects


@pytest.mark.parametrize("compact_grads", [True, False])
def test_the_strictest_of_several_clips_counts(compact_grads: bool) -> None:
    moved = []
    for limits in ((0.5,), (0.5, 2.0), (2.0, 0.5), (100.0, 0.5, 0.7)):
        model = small_model(torch.float32)
        optimizer = masked_sgd(model.named_parameters(), partial_mask(model), compact_grads=compact_grads)
        set_gradients(model, 0)
        norms = [float(optimizer.clip_grad_norm_(limit)) for limit in limits]
        assert len(set(norms)) == 1  # each tells the norm before any
        optimizer.step()
        moved.append(weights_of(model))
    assert all(same_bits(other[name], moved[0][name]) for other in moved for name in other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_norm": "both"}, r"`clip_norm` must be one of masked, full, got 'both'"),
        ({"nonfinite": "warn"}, r"`nonfinite` must be one of raise, skip, ignore, got 'warn'"),
        ({"max_grad_norm": -1.0}, r"`max_grad_norm` must be > 0, or None for no clipping, got -1\.0"),
        ({"max_grad_norm": float("nan")}, r"`max_grad_norm` must be > 0"),
    ],
)
@pytest.mark.parametrize("kind", BUILDERS)
def test_every_optimizer_names_a_bad_option_of_clipping(kind: str, options: dict[str, Any], message: str) -> None:
    model = small_model(torch.float32)
    with pytest.raises(ValueError, match=message):
        BUILDERS[kind](model.named_parameters(), partial_mask(model), **options)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("max_norm", [-0.5, float("nan")])
def test_clip_grad_norm_refuses_a_norm_that_is_none(max_norm: float) -> None:
    model = small_model(torch.float32)
    optimizer = masked_adamw(model.named_parameters(), partial_mask(model))
    set_gradients(model, 0)
    with pytest.raises(ValueError, match=r"`max_norm` must be >= 0"):
        optimizer.clip_grad_norm_(max_norm)


def test_a_scaler_does_not_spoil_the_masked_norm_of_dense_gradients() -> None:
    weights = []
    for scale in (1.0, 1024.0):
        model = small_model(torch.float32)
        optimizer = masked_sgd(model.named_parameters(), partial_mask(model), max_grad_norm=0.5, compact_grads=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(model(torch.ones(3, 13)).square().sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        weights.append(weights_of(model))
    for name in weights[0]:  # a power of two only moves exponents
        assert same_bits(weights[0][name], weights[1][name])


def test_a_scaler_is_refused_with_the_full_norm() -> None:
    """It unscales what is in the param groups, not the frozen tensors whose gradients count in the whole norm."""
    model = small_model(torch.float32)
    optimizer = masked_sgd(
        model.named_parameters(), partial_mask(model), clip_norm="full", max_grad_norm=0.5, compact_grads=False
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.ones(3, 13)).square().sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(GradientError, match="the rest of a full norm"):
        scaler.step(optimizer)


def test_a_scaler_is_refused_with_compact_gradients() -> None:
    model = small_model(torch.float32)
    optimizer = masked_adamw(model.named_parameters(), partial_mask(model))
    start = weights_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.ones(3, 13)).square().sum()).backward()
    with pytest.raises(GradientError, match=r"GradScaler unscales what stands in `\.grad`.*`compact_grads=False`"):
        scaler.step(optimizer)
    assert all(same_bits(value, start[name]) for name, value in weights_of(model).items())


def test_norm_of_squares_does_not_wait_for_the_device() -> None:
    """A meta tensor has no values, so reading one on the host raises, as it would stall a GPU."""
    norm = norm_of_squares([torch.empty((), device="meta", dtype=torch.float64) for _ in range(2)])
    assert (norm.device.type, norm.dtype, norm.shape) == ("meta", torch.float32, ())
    assert float(norm_of_squares([torch.tensor(9e36), torch.tensor(16e36)])) == pytest.approx(5e18, rel=1e-6)
    assert float(norm_of_squares([])) == 0.0
