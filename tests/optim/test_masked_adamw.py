"""MaskedAdamW against `torch.optim.AdamW`, and the promises about weights outside the mask."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits, set_gradients, small_model, ulps_at_scale

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import MaskError, MaskMismatchError
from subnet_ft.masks import ModelRecord, Provenance, SubnetMask
from subnet_ft.optim import MaskedAdamW

ULP_PER_STEP = 4  # a promise of CONTRIBUTING.md; one fused multiply-add more or less moves the last bit


def two_groups(model: torch.nn.Module, as_pairs: bool) -> list[dict[str, Any]]:
    matrices = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    vectors = [(n, p) for n, p in model.named_parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 2e-3}]
    return groups if as_pairs else [{**g, "params": [p for _, p in g["params"]]} for g in groups]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("grouped", [False, True])
def test_masked_adamw_equals_adamw_on_fp32_masters_over_50_steps(
    dtype: torch.dtype, weight_decay: float, grouped: bool
) -> None:
    model = small_model(dtype)
    mask = random_mask(model, 0.4)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    reference = small_model(torch.float32)
    for (_, theirs), ours in zip(reference.named_parameters(), model.parameters(), strict=True):
        theirs.data.copy_(ours.data.float())

    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": weight_decay}
    ours = MaskedAdamW(
        two_groups(model, as_pairs=True) if grouped else model.named_parameters(), mask, max_grad_norm=None, **options
    )
    theirs = torch.optim.AdamW(
        two_groups(reference, as_pairs=False) if grouped else reference.parameters(), foreach=False, **options
    )
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50) for optimizer in (ours, theirs)]
    for step in range(50):
        set_gradients(model, step)
        for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
            other.grad = parameter.grad.float() * mask[name]
        ours.step()
        theirs.step()
        for schedule in schedules:
            schedule.step()

    for (name, parameter), other in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        state = ours.state[parameter]
        chosen = mask[name]
        master = state.get("master", parameter.detach()[chosen])
        assert ulps_at_scale(master, other[1].detach()[chosen], scale=1e-3) <= 50 * ULP_PER_STEP
        assert ulps_at_scale(state["exp_avg"], theirs.state[other[1]]["exp_avg"][chosen], 0.1) <= 50 * ULP_PER_STEP
        assert same_bits(parameter.detach()[~chosen], start[name][~chosen])
        if dtype == torch.float16:
            assert same_bits(parameter.detach()[chosen], master.half())


def test_masked_adamw_with_a_full_mask_is_adamw() -> None:
    model, reference = small_model(torch.float32), small_model(torch.float32)
    full = SubnetMask.full({name: tuple(p.shape) for name, p in model.named_parameters()})
    ours = MaskedAdamW(model.named_parameters(), full, lr=1e-2, weight_decay=0.1, max_grad_norm=None)
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    for step in range(20):
        set_gradients(model, step)
        set_gradients(reference, step)
        ours.step()
        theirs.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert ulps_at_scale(a.detach(), b.detach(), scale=1e-2) <= 20 * ULP_PER_STEP


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_adamw_leaves_off_mask_bits_alone(dtype: torch.dtype) -> None:
    model = small_model(dtype)
    mask = random_mask(model, 0.3)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter.view(-1)[:2] = torch.tensor([float("nan"), -0.0])
    dense = {name: mask[name] for name in mask.names}
    for values in dense.values():
        values.view(-1)[:2] = False
    mask = SubnetMask.from_dense(dense)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = MaskedAdamW(model.named_parameters(), mask, lr=0.1, weight_decay=0.5, max_grad_norm=1.0)
    for step in range(5):
        set_gradients(model, step)
        for name, parameter in model.named_parameters():
            parameter.grad[~dense[name]] = float("nan")
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert same_bits(parameter.detach()[~dense[name]], start[name][~dense[name]])
        changed = parameter.detach()[dense[name]] != start[name][dense[name]]
        assert changed.float().mean() > 0.9
        assert parameter.detach()[dense[name]].isfinite().all()


def test_masked_adamw_keeps_updates_below_the_rounding_step_of_bfloat16() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    mask = SubnetMask.from_dense({"w": torch.tensor([True, False, True, True])})
    optimizer = MaskedAdamW([("w", parameter)], mask, lr=1e-4, max_grad_norm=None)
    for _ in range(50):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[parameter]["master"], torch.full((3,), 0.995), rtol=0, atol=1e-6)
    assert parameter.tolist() == [0.99609375, 1.0, 0.99609375, 0.99609375]


def test_masked_adamw_remainder_gives_the_weights_of_fp32_masters() -> None:
    results = []
    for master in ("fp32", "remainder"):
        model = small_model(torch.bfloat16)
        optimizer = MaskedAdamW(
            model.named_parameters(),
            random_mask(model, 0.4),
            lr=1e-3,
            weight_decay=0.1,
            max_grad_norm=1.0,
            master=master,
        )
        for step in range(100):
            set_gradients(model, step)
            optimizer.step()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
        kept = {values["master"].dtype for values in optimizer.state.values()}
        assert kept == {torch.float32 if master == "fp32" else torch.int16}
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_masked_adamw_state_exists_only_for_the_mask() -> None:
    model = small_model(torch.bfloat16)
    mask = random_mask(model, 0.25)
    optimizer = MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None)
    set_gradients(model, 0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shapes = {key: tuple(value.shape) for key, value in optimizer.state[parameter].items() if key != "step"}
        assert shapes == dict.fromkeys(("exp_avg", "exp_avg_sq", "master"), (mask.tensors[name].count,))


def test_masked_adamw_freezes_tensors_without_trainable_weights() -> None:
    model = small_model(torch.float32)
    dense = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    dense["2.weight"][0, 0] = True
    mask = SubnetMask.from_dense(dense)
    optimizer = MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None, compact_grads=False)
    model(torch.randn(3, 13)).sum().backward()
    with_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert with_gradient == ["2.weight"]
    optimizer.release()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_masked_adamw_gives_requires_grad_back_once() -> None:
    model = small_model(torch.float32)
    names = dict(model.named_parameters())
    names["0.bias"].requires_grad_(False)
    mask = SubnetMask.from_dense({name: torch.full(p.shape, name == "0.bias") for name, p in names.items()})
    first = MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None)
    first.release()
    assert [name for name, p in names.items() if not p.requires_grad] == ["0.bias"]
    second = MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None)
    del first
    gc.collect()  # the first one has nothing to give back any more
    assert [name for name, p in names.items() if p.requires_grad] == ["0.bias"]
    del second
    gc.collect()
    assert [name for name, p in names.items() if not p.requires_grad] == ["0.bias"]


def test_masked_adamw_trains_what_the_mask_names_whoever_froze_it() -> None:
    model = small_model(torch.float32)
    dense = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    dense["2.weight"][0, 0] = True
    MaskedAdamW(model.named_parameters(), SubnetMask.from_dense(dense), max_grad_norm=None)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    full = SubnetMask.full({name: tuple(p.shape) for name, p in model.named_parameters()})
    optimizer = MaskedAdamW(model.named_parameters(), full, lr=1e-2, max_grad_norm=None)
    model(torch.randn(3, 13)).square().sum().backward()
    optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p.detach(), start[name])] == []


def test_masked_adamw_skips_a_tensor_without_gradient_whole() -> None:
    model = small_model(torch.float32)
    mask = random_mask(model, 0.5)
    optimizer = MaskedAdamW(model.named_parameters(), mask, lr=0.1, weight_decay=0.5, max_grad_norm=None)
    set_gradients(model, 0)
    optimizer.step()
    weight = dict(model.named_parameters())["2.weight"]
    before, steps = weight.detach().clone(), int(optimizer.state[weight]["step"])
    set_gradients(model, 1)
    weight.grad = None
    optimizer.step()
    assert same_bits(weight.detach(), before)
    assert int(optimizer.state[weight]["step"]) == steps == 1


def test_masked_adamw_clips_on_the_norm_of_the_mask() -> None:
    model = small_model(torch.float32)
    mask = random_mask(model, 0.3)
    optimizer = MaskedAdamW(model.named_parameters(), mask, lr=1e-3, max_grad_norm=0.5)
    set_gradients(model, 0)
    masked = torch.cat([p.grad[mask[name]] for name, p in model.named_parameters()])
    torch.testing.assert_close(optimizer.grad_norm(), masked.norm())
    optimizer.step()
    seen = torch.cat([optimizer.state[p]["exp_avg"] for p in model.parameters()]) / 0.1
    torch.testing.assert_close(seen, masked * (0.5 / masked.norm()), rtol=1e-4, atol=1e-7)


def test_masked_adamw_forgets_the_clip_coefficient_of_a_step_that_was_left_out() -> None:
    model = small_model(torch.float32)
    optimizer = MaskedAdamW(model.named_parameters(), random_mask(model, 0.3), max_grad_norm=None)
    set_gradients(model, 0)
    optimizer.clip_grad_norm_(0.5)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    set_gradients(model, 1)
    norm = float(optimizer.grad_norm())
    optimizer.step()
    used = torch.cat([optimizer.state[p]["exp_avg"] for p in model.parameters()]).norm() / 0.1
    assert float(used) == pytest.approx(norm, rel=1e-5)


def test_masked_adamw_does_not_keep_a_norm_that_is_not_finite() -> None:
    model = small_model(torch.float32)
    mask = SubnetMask.full({name: tuple(p.shape) for name, p in model.named_parameters()})
    optimizer = MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None, nonfinite="ignore")
    set_gradients(model, 0)
    next(model.parameters()).grad[0, 0] = float("nan")
    assert optimizer.clip_grad_norm_(1.0).isnan()
    optimizer.zero_grad(set_to_none=False)
    set_gradients(model, 1)
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    set_gradients(model, 2)
    next(model.parameters()).grad[0, 0] = float("nan")
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert all(parameter.isnan().all() for parameter in model.parameters())  # as torch's clip_grad_norm_ would


def test_masked_adamw_refuses_missing_names_and_other_shapes() -> None:
    model = small_model(torch.float32)
    mask = random_mask(model, 0.4)
    with pytest.raises(MaskMismatchError, match=r"`2\.bias` only in the mask"):
        MaskedAdamW([pair for pair in model.named_parameters() if pair[0] != "2.bias"], mask, max_grad_norm=None)
    other = torch.nn.Sequential(torch.nn.Linear(13, 17), torch.nn.LayerNorm(17), torch.nn.Linear(17, 6))
    with pytest.raises(MaskMismatchError, match=r"`2\.weight` has shape \(5, 17\)"):
        MaskedAdamW(other.named_parameters(), mask, max_grad_norm=None)


def test_masked_adamw_refuses_another_base() -> None:
    model = small_model(torch.float32)
    mask = random_mask(model, 0.4)
    base = ModelRecord("somebody/else", fingerprints=dict.fromkeys(mask.names, "0" * 32))
    mask = SubnetMask(mask.tensors, Provenance(base=base))
    with pytest.raises(MaskMismatchError, match="somebody/else"):
        MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "`lr` must be >= 0"),
        ({"betas": (0.9, 1.0)}, "`betas` must lie"),
        ({"eps": 0.0}, "`eps` must be > 0"),
        ({"weight_decay": -0.1}, "`weight_decay` must be >= 0"),
        ({"max_grad_norm": 0.0}, "`max_grad_norm` must be > 0"),
        ({"master": "bf16"}, "`master` must be one of"),
    ],
)
def test_masked_adamw_names_a_bad_option(options: dict[str, Any], message: str) -> None:
    model = small_model(torch.float32)
    with pytest.raises(ValueError, match=message):
        MaskedAdamW(model.named_parameters(), random_mask(model, 0.4), **{"max_grad_norm": None, **options})


def test_masked_adamw_refuses_two_parameters_of_one_name() -> None:
    one, two = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    mask = SubnetMask.full({"w": (2,)})
    with pytest.raises(MaskError, match=r"`w` and `module\.w` both become `w`"):
        MaskedAdamW([{"params": [("w", one)]}, {"params": [("module.w", two)]}], mask, max_grad_norm=None)


def test_masked_adamw_wants_names() -> None:
    model = small_model(torch.float32)
    with pytest.raises(TypeError, match="named_parameters"):
        MaskedAdamW(model.parameters(), random_mask(model, 0.4), max_grad_norm=None)  # type: ignore[arg-type]


def test_masked_adamw_counts_tied_weights_once() -> None:
    model = tiny_model("llama")
    mask = random_mask(model, 0.4)
    assert "lm_head.weight" not in mask
    optimizer = MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(mask.names)
