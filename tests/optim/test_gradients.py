"""Gradient compaction: the hooks, what they keep, and what they leave alone."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import RELATIVE, random_mask, relative, same_bits, set_gradients, small_model
from masked_optimizers import weights_of
from torch.utils.checkpoint import checkpoint

import subnet_kernels
from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import GradientError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW, MaskedSGD


def tokens(count: int) -> torch.Tensor:
    return torch.randint(2, 60, (count, 12), generator=torch.Generator().manual_seed(0))


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=batch, labels=batch).loss
    return loss


def compact_gradient(optimizer: MaskedAdamW | MaskedSGD) -> torch.Tensor:
    """Return all compact gradients (sum of K,) of an optimizer, as its next step will see them."""
    found = [optimizer._gradients.get(p) for group in optimizer.param_groups for p in group["params"]]
    return torch.cat([grad for grad in found if grad is not None])


def dense_gradient(model: torch.nn.Module, mask: SubnetMask) -> torch.Tensor:
    """Return what autograd left in `.grad`, on the mask."""
    pairs = ((mask[name], parameter.grad) for name, parameter in model.named_parameters())
    return torch.cat([grad[chosen].float() for chosen, grad in pairs if grad is not None])


@pytest.mark.parametrize("family", ["llama", "mixtral"])  # mixtral's experts are stacked: three dimensions
def test_compaction_keeps_the_gradient_on_the_mask_and_frees_the_dense_one(family: str) -> None:
    model, twin = tiny_model(family), tiny_model(family)
    assert any(parameter.dim() == 3 for parameter in model.parameters()) == (family == "mixtral")
    mask = random_mask(model, 0.3)
    optimizer = MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None)
    loss_of(model, tokens(4)).backward()
    loss_of(twin, tokens(4)).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert same_bits(compact_gradient(optimizer), dense_gradient(twin, mask))
    torch.testing.assert_close(optimizer.grad_norm(), dense_gradient(twin, mask).norm())


SPLITS = {"8x1": 8, "4x2": 4, "1x8": 1}
"""Micro-batches that eight rows are cut into."""


@dataclass
class Accumulated:
    """What a step on eight rows left, by name and on the mask: gradients (K,), and moves (K,) under a rate of 1."""

    grads: dict[str, torch.Tensor]
    moves: dict[str, torch.Tensor]


def accumulated(split: str, *, divides: bool = True) -> Accumulated:
    """Take one step of SGD on eight rows in micro-batches; check what stands outside the mask, and the step itself."""
    model = tiny_model("llama", dtype=torch.float32)
    mask, start = random_mask(model, 0.3), weights_of(model)
    optimizer = MaskedSGD(model.named_parameters(), mask, lr=1.0, max_grad_norm=None)
    backward(model, split, divides=divides)
    grads = {name: optimizer._gradients.get(p).clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, value in weights_of(model).items():
        assert same_bits(value[mask[name]], start[name][mask[name]] - grads[name])
        assert same_bits(value[~mask[name]], start[name][~mask[name]])
    return Accumulated(grads, {n: (v - start[n])[mask[n]] for n, v in weights_of(model).items()})


def backward(model: torch.nn.Module, split: str, *, divides: bool = True) -> None:
    for part in tokens(8).chunk(SPLITS[split]):
        (loss_of(model, part) / (SPLITS[split] if divides else 1)).backward()


@pytest.fixture(scope="module")
def exact() -> dict[str, torch.Tensor]:
    """Gradients of one backward in float64 over all eight rows, by name and on the mask."""
    model, narrow = tiny_model("llama", dtype=torch.float64), tiny_model("llama", dtype=torch.float32)
    mask = random_mask(narrow, 0.3)
    assert all(torch.equal(p, q.double()) for p, q in zip(model.parameters(), narrow.parameters(), strict=True))
    loss_of(model, tokens(8)).backward()
    return {name: parameter.grad[mask[name]] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("split", SPLITS)
def test_compaction_has_the_bits_that_autograd_accumulates_over_the_same_micro_batches(split: str) -> None:
    twin = tiny_model("llama", dtype=torch.float32)
    backward(twin, split)
    mask = random_mask(twin, 0.3)
    found = accumulated(split).grads
    assert [name for name, p in twin.named_parameters() if not same_bits(found[name], p.grad[mask[name]])] == []


def test_compaction_gives_the_gradient_of_all_rows_however_they_are_split(exact: dict[str, torch.Tensor]) -> None:
    found = {split: accumulated(split) for split in SPLITS}
    for split in SPLITS:
        assert distances(found[split].grads, exact) == pytest.approx(dict.fromkeys(exact, 0.0), abs=RELATIVE)
    for one, other in itertools.combinations(SPLITS, 2):
        for what in ("grads", "moves"):
            apart = distances(getattr(found[one], what), getattr(found[other], what))
            assert apart == pytest.approx(dict.fromkeys(exact, 0.0), abs=RELATIVE)


def distances(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: relative(found[name], expected[name]) for name in expected}


COMPACT = subnet_kernels.compact
Compact = Callable[..., torch.Tensor]


def _overwrites(call: int, grad: torch.Tensor, mask: Any, out: torch.Tensor, accumulate: bool) -> torch.Tensor:
    return COMPACT(grad, mask, out, accumulate=False)


def _drops_the_last(call: int, grad: torch.Tensor, mask: Any, out: torch.Tensor, accumulate: bool) -> torch.Tensor:
    return COMPACT(grad if call < 8 else torch.zeros_like(grad), mask, out, accumulate=accumulate)


def _counts_one_twice(call: int, grad: torch.Tensor, mask: Any, out: torch.Tensor, accumulate: bool) -> torch.Tensor:
    return COMPACT(2 * grad if call == 5 else grad, mask, out, accumulate=accumulate)


def _rounds_to(dtype: torch.dtype) -> Compact:
    def rounds(call: int, grad: torch.Tensor, mask: Any, out: torch.Tensor, accumulate: bool) -> torch.Tensor:
        squares = COMPACT(grad, mask, out, accumulate=accumulate)
        out.copy_(out.to(dtype))
        return squares

    return rounds


WRONG: dict[str, Compact | None] = {
    "always overwrites": _overwrites,
    "drops the last micro-batch": _drops_the_last,
    "counts one micro-batch twice": _counts_one_twice,
    "holds bfloat16": _rounds_to(torch.bfloat16),
    "holds float16": _rounds_to(torch.float16),
    "does not divide the loss": None,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_relative_sees_wrong_accumulation_in_every_tensor(
    wrong: str, exact: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[int] = Counter()
    spoiled = WRONG[wrong]

    def compact(grad: torch.Tensor, mask: Any, out: torch.Tensor, *, accumulate: bool) -> torch.Tensor:
        assert spoiled is not None
        calls[out.data_ptr()] += 1
        return spoiled(calls[out.data_ptr()], grad, mask, out, accumulate)

    if spoiled is not None:
        monkeypatch.setattr(subnet_kernels, "compact", compact)
    found = accumulated("8x1", divides=spoiled is not None).grads
    assert set(calls.values()) <= {8}
    assert min(distances(found, exact).values()) > 10 * RELATIVE


def test_relative_example() -> None:
    assert relative(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1
    assert relative(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0


def test_compaction_accumulates_in_float32() -> None:
    parameter = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = MaskedSGD([("w", parameter)], SubnetMask.full({"w": (8,)}), lr=1.0, max_grad_norm=None)
    for value in [256.0] + [0.5] * 8:  # in bfloat16, 256 + 0.5 is 256
        (parameter * value).sum().backward()
    assert compact_gradient(optimizer).tolist() == [260.0] * 8


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_compaction_is_right_under_activation_checkpointing(use_reentrant: bool) -> None:
    def run(layers: torch.nn.Sequential, batch: torch.Tensor) -> torch.Tensor:
        hidden = layers[0](batch)
        hidden = checkpoint(lambda x: layers[2](layers[1](x)), hidden, use_reentrant=use_reentrant)
        # The first layer is used inside and outside: under re-entrant checkpointing its hook fires twice a backward.
        hidden = checkpoint(lambda x: layers[0](x), hidden[:, :13], use_reentrant=use_reentrant)
        output: torch.Tensor = hidden.square().sum()
        return output

    def build() -> torch.nn.Sequential:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(13, 17), torch.nn.Tanh(), torch.nn.Linear(17, 13))

    model, twin = build(), build()
    mask = random_mask(model, 0.5)
    optimizer = MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None)
    batch = torch.randn(3, 13, generator=torch.Generator().manual_seed(1))
    run(model, batch).backward()
    run(twin, batch).backward()
    for name, parameter in twin.named_parameters():
        found = optimizer._gradients.get(dict(model.named_parameters())[name])
        assert relative(found, parameter.grad[mask[name]]) <= RELATIVE


def test_compaction_counts_every_use_of_a_shared_parameter() -> None:
    model, twin = tiny_model("llama"), tiny_model("llama")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    mask = SubnetMask.full({name: tuple(p.shape) for name, p in model.named_parameters()})
    optimizer = MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None)
    loss_of(model, tokens(4)).backward()
    loss_of(twin, tokens(4)).backward()
    assert same_bits(compact_gradient(optimizer), dense_gradient(twin, mask))


def test_compaction_holds_one_dense_gradient_at_a_time() -> None:
    layers = [torch.nn.Linear(32, 32, bias=False) for _ in range(6)]
    model = torch.nn.Sequential(*layers)
    mask = random_mask(model, 0.2)
    optimizer = MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None)
    held: list[int] = []
    for layer in layers:
        layer.weight.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(other.weight.grad is not None for other in layers))
        )
    model(torch.randn(4, 32)).sum().backward()
    assert held == [0] * 6  # our hook ran first each time, and had freed its gradient
    assert optimizer.memory()["gradients"] == 4 * mask.num_trainable


def test_step_consumes_the_gradients() -> None:
    model = small_model(torch.float32)
    optimizer = MaskedAdamW(model.named_parameters(), random_mask(model, 0.5), lr=0.1, max_grad_norm=None)
    model(torch.ones(3, 13)).sum().backward()
    optimizer.step()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()  # nothing arrived since: every tensor is skipped whole
    assert all(same_bits(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True))
    assert float(optimizer.grad_norm()) == 0.0


def test_gradients_of_a_step_that_was_left_out_are_cleared() -> None:
    model, twin = small_model(torch.float32), small_model(torch.float32)
    mask = random_mask(model, 0.5)
    ours, theirs = (MaskedAdamW(m.named_parameters(), mask, lr=0.1, max_grad_norm=1.0) for m in (model, twin))
    model(torch.full((3, 13), float("nan"))).sum().backward()
    assert ours.grad_norm().isnan()
    ours.zero_grad()
    for each, optimizer in ((model, ours), (twin, theirs)):
        each(torch.ones(3, 13)).sum().backward()
        optimizer.step()
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_gradient_set_by_hand_is_added_to_what_the_hooks_took() -> None:
    model = small_model(torch.float32)
    optimizer = MaskedAdamW(model.named_parameters(), random_mask(model, 0.5), max_grad_norm=None)
    model(torch.ones(3, 13)).sum().backward()
    from_hooks = compact_gradient(optimizer).clone()
    set_gradients(model, 0)
    by_hand = torch.cat([p.grad[optimizer.mask[n]] for n, p in model.named_parameters()])
    torch.testing.assert_close(optimizer.grad_norm(), (from_hooks + by_hand).norm())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("compact_grads", [True, False])
def test_nan_off_the_mask_does_not_count(compact_grads: bool) -> None:
    model = small_model(torch.bfloat16)
    mask = random_mask(model, 0.5)
    optimizer = MaskedAdamW(model.named_parameters(), mask, max_grad_norm=1.0, compact_grads=compact_grads)
    set_gradients(model, 0)
    for name, parameter in model.named_parameters():
        parameter.grad[~mask[name]] = float("nan")
    assert optimizer.grad_norm().isfinite()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compact_and_dense_gradients_give_the_same_bits(dtype: torch.dtype) -> None:
    models = [small_model(dtype) for _ in range(2)]
    mask = random_mask(models[0], 0.4)
    for model, compact_grads in zip(models, (True, False), strict=True):
        optimizer = MaskedAdamW(
            model.named_parameters(), mask, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0, compact_grads=compact_grads
        )
        for step in range(5):
            set_gradients(model, step)
            optimizer.step()
            optimizer.zero_grad()
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_a_second_optimizer_on_the_same_parameters_is_refused_while_the_first_lives() -> None:
    model = small_model(torch.float32)
    mask = random_mask(model, 0.5)
    first = MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None)
    with pytest.raises(GradientError, match=r"`0\.weight` and 5 other parameters already belong to another masked"):
        MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None)
    first.release()
    second = MaskedAdamW(model.named_parameters(), mask, lr=0.1, max_grad_norm=None)
    model(torch.ones(3, 13)).sum().backward()
    assert compact_gradient(second).numel() == mask.num_trainable
    assert first.memory()["gradients"] == 0


def test_an_optimizer_that_nobody_holds_gives_its_parameters_back() -> None:
    model = small_model(torch.float32)
    mask = random_mask(model, 0.5)
    first = MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None)
    cycle: dict[str, Any] = {"optimizer": first}
    cycle["itself"] = cycle
    gc.disable()
    try:
        del first, cycle
        MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None)
    finally:
        gc.enable()


def test_a_sparse_gradient_is_refused_by_name() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3, sparse=True))
    optimizer = MaskedAdamW(model.named_parameters(), SubnetMask.full({"0.weight": (5, 3)}), max_grad_norm=None)
    with pytest.raises(GradientError, match=r"`0\.weight` has a sparse gradient"):
        model(torch.tensor([1])).sum().backward()
    assert optimizer.state == {}


@pytest.mark.parametrize("compact_grads", [True, False])
def test_a_gradient_that_is_not_contiguous_counts_like_any_other(compact_grads: bool) -> None:
    parameter = torch.nn.Parameter(torch.zeros(6))
    mask = SubnetMask.from_dense({"w": torch.tensor([True, False] * 3)})
    optimizer = MaskedSGD([("w", parameter)], mask, lr=1.0, max_grad_norm=None, compact_grads=compact_grads)
    parameter.grad = torch.arange(12.0)[::2]
    optimizer.step()
    assert parameter.tolist() == [0.0, 0.0, -4.0, 0.0, -8.0, 0.0]
