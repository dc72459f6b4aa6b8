"""The masked SGD op: its example, torch.optim.SGD, and the compiled form against the reference bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import DENSITIES, SIZES, random_bits, same_bits
from update_cases import CLUSTERED, GRADS, WEIGHTS, assert_same, bit_mask, chosen, copied, sgd_update, values

from subnet_kernels import SGDUpdate, join_master, masked_sgd, reference, round_to_bfloat16

SCALE = torch.tensor(0.3)
MOMENTA = ({"momentum": 0.0}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True})


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("SUBNET_KERNELS_BACKEND", request.param)
    return str(request.param)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setenv("SUBNET_KERNELS_BACKEND", "cpu")


def example(**fields: Any) -> SGDUpdate:
    mask = bit_mask(torch.tensor([False, True, False, True]))
    tensors = {"param": torch.ones(4), "mask": mask, "grad": torch.full((2,), 0.5), "momentum_buffer": None}
    return SGDUpdate(**(tensors | {"master": None, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0} | fields))


def test_masked_sgd_gives_the_values_of_its_example(backend: str) -> None:
    update = example()
    masked_sgd([update])
    assert same_bits(update.param[[0, 2]], torch.ones(2))
    torch.testing.assert_close(update.param[[1, 3]], torch.tensor([0.95, 0.95]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("options", MOMENTA)
def test_masked_sgd_equals_torch(size: int, density: float, options: dict[str, Any], backend: str) -> None:
    mask = random_bits(size, density)
    start = values(size, 1)
    theirs = start[mask].clone().requires_grad_()
    optimizer = torch.optim.SGD([theirs], lr=0.1, weight_decay=0.2, **options)
    buffer = torch.zeros(theirs.numel()) if options["momentum"] else None
    param, bits = start.clone(), bit_mask(mask)
    for step in range(3):
        grad = values(size, 10 + step)
        theirs.grad = grad[mask] * 0.5
        optimizer.step()
        masked_sgd(
            [SGDUpdate(param, bits, grad, buffer, None, lr=0.1, weight_decay=0.2, **options)],
            grad_scale=torch.tensor(0.5),
        )
    torch.testing.assert_close(param[mask], theirs.detach(), rtol=1e-6, atol=1e-6)
    assert same_bits(param[~mask], start[~mask])


@pytest.mark.parametrize("kind", WEIGHTS)
def test_masked_sgd_ignores_nan_off_the_mask_and_keeps_its_bits(kind: str, backend: str) -> None:
    mask = chosen(1000, 0.3)
    for grad in GRADS:
        update = sgd_update(mask, kind, grad)
        before = copied(update)
        masked_sgd([update])
        assert same_bits(update.param[~mask], before.param[~mask])
        assert not same_bits(update.param[mask], before.param[mask])
        assert update.param[mask].isfinite().all()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(
    ("size", "density"), [*itertools.product(SIZES, DENSITIES), (5000, 0.6), (65539, 0.02), (300_000, CLUSTERED)]
)
@pytest.mark.usefixtures("cpu")
def test_masked_sgd_compiled_equals_the_reference(size: int, density: float | str, kind: str) -> None:
    mask = chosen(size, density)
    for grad, is_rounded, options in itertools.product(GRADS, (False, True), MOMENTA):
        update = sgd_update(mask, kind, grad, is_rounded=is_rounded, **options)
        expected, found = copied(update), copied(update)
        for scale in (None, SCALE):
            reference.masked_sgd([expected], grad_scale=scale)
            masked_sgd([found], grad_scale=scale)
        assert_same(found, expected, (grad, is_rounded, options))


def test_masked_sgd_steps_tensors_together_as_one_by_one(backend: str) -> None:
    cache: dict[Any, Any] = {}
    updates = [
        sgd_update(chosen(size, 0.3), kind, GRADS[size % 4], lr=0.01 * size, **options)
        for kind, size, options in itertools.product(WEIGHTS, (1, 1000, 5003), MOMENTA)
    ]
    alone, together = [copied(update) for update in updates], [copied(update) for update in updates]
    for _ in range(2):
        for update in alone:
            masked_sgd([update], grad_scale=SCALE)
        masked_sgd(together, grad_scale=SCALE, cache=cache)
    for one, all_ in zip(alone, together, strict=True):
        assert_same(all_, one)


@pytest.mark.usefixtures("cpu")
def test_masked_sgd_gives_the_same_bits_for_every_number_of_threads() -> None:
    updates = [sgd_update(chosen(65539, density), "bf16, masters", torch.bfloat16) for density in (0.1, 0.7, 1.0)]
    cache: dict[Any, Any] = {}
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append([copied(update) for update in updates])
        masked_sgd(results[-1], cache=cache)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert_same(found, expected, "threads")


@pytest.mark.parametrize("is_rounded", [False, True])
def test_masked_sgd_keeps_masters_and_remainders_equal(is_rounded: bool, backend: str) -> None:
    """10,000 random steps; every tenth of them puts half of the masters on a tie."""
    steps = 10_000 if backend == "cpu" else 300
    mask = chosen(200, 0.5)
    count = int(mask.sum())
    half = torch.arange(count) < count // 2
    start = torch.where(values(200, 1) < 0, -0.75, 0.75).bfloat16()
    bits = bit_mask(mask)
    param, master = start.clone(), start[mask].float()
    other, remainder = start.clone(), torch.zeros(count, dtype=torch.int16)
    generator = torch.Generator().manual_seed(0)
    num_ties = 0
    for step in range(1, steps + 1):
        grad = torch.randn(count, generator=generator) * 1e-3
        if step % 10 == 0:  # the difference of two numbers this near is exact, and so is the step
            tie = ((master.view(torch.int32) & -0x10000) | 0x8000).view(torch.float32)
            grad = torch.where(half, master - tie, grad)
        options = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "is_rounded": is_rounded}
        masked_sgd([SGDUpdate(param, bits, grad, None, master, **options)])
        masked_sgd([SGDUpdate(other, bits, grad, None, remainder, **options)])
        assert same_bits(param, other), step
        assert same_bits(join_master(other[mask], remainder), master), step
        num_ties += int(((master.view(torch.int32) & 0xFFFF) == 0x8000).sum())
    assert num_ties >= steps // 10 * (count // 2)
    assert same_bits(param[mask], round_to_bfloat16(master))


BAD = {
    "`momentum` 0.9 without a buffer": {"momentum": 0.9},
    "`momentum` 0.0 with a buffer": {"momentum_buffer": torch.zeros(2)},
    "must be flat and contiguous": {"param": torch.zeros(8)[::2]},
    "the mask has 4 elements, the tensor 5": {"param": torch.zeros(5)},
    "`grad` must be torch.float32 of shape": {"grad": torch.zeros(3)},
    "state has shape": {"momentum": 0.9, "momentum_buffer": torch.zeros(4)},
    "needs `rounding_key`": {"param": torch.zeros(4, dtype=torch.bfloat16)},
}


@pytest.mark.parametrize("message", BAD)
def test_masked_sgd_refuses_what_does_not_fit(message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_sgd([example(**BAD[message])])
