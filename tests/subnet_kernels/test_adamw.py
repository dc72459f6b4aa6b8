"""The masked AdamW op: its example, a plain dense update, and the compiled form against the reference bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Any

import pytest
import torch
from helpers import DENSITIES, SIZES, random_bits, same_bits
from update_cases import (
    CLUSTERED,
    GRADS,
    WEIGHTS,
    adamw_update,
    assert_same,
    at_page_end,
    bit_mask,
    chosen,
    copied,
    gradient,
    tensors_of,
    values,
)

from subnet_kernels import AdamWUpdate, join_master, masked_adamw, reference, round_to_bfloat16, rounding_key

SCALE = torch.tensor(0.3)
EXAMPLE = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "step": 1}


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


def example(**fields: Any) -> AdamWUpdate:
    mask = bit_mask(torch.tensor([False, True, False, True]))
    tensors = {
        "param": torch.ones(4), "mask": mask, "grad": torch.full((2,), 0.5), "exp_avg": torch.zeros(2),
        "exp_avg_sq": torch.zeros(2), "master": None,
    }  # fmt: skip
    return AdamWUpdate(**(tensors | EXAMPLE | fields))


def test_masked_adamw_gives_the_values_of_its_example(backend: str) -> None:
    update = example()
    masked_adamw([update])
    assert same_bits(update.param[[0, 2]], torch.ones(2))
    torch.testing.assert_close(update.param[[1, 3]], torch.tensor([0.9, 0.9]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_adamw_equals_a_dense_update(size: int, density: float, dtype: torch.dtype, backend: str) -> None:
    mask = random_bits(size, density)
    start, grad, exp_avg, exp_avg_sq = (
        values(size, 1).to(dtype),
        values(size, 2),
        values(size, 3),
        values(size, 4).abs(),
    )
    update = AdamWUpdate(
        start.clone(), bit_mask(mask), grad[mask], exp_avg[mask], exp_avg_sq[mask],
        None if dtype == torch.float32 else start[mask].float(),
        lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3, step=7,
    )  # fmt: skip
    masked_adamw([update], grad_scale=torch.tensor(0.25))

    first = 0.8 * exp_avg + 0.2 * grad * 0.25
    second = 0.95 * exp_avg_sq + 0.05 * (grad * 0.25) ** 2
    denominator = (second / (1 - 0.95**7)).sqrt() + 1e-6
    expected = start.float() * (1 - 1e-2 * 0.3) - 1e-2 * (first / (1 - 0.8**7)) / denominator
    exact = update.param[mask] if update.master is None else update.master
    torch.testing.assert_close(exact, expected[mask], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(update.exp_avg, first[mask], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(update.exp_avg_sq, second[mask], rtol=1e-6, atol=1e-7)
    assert same_bits(update.param[~mask], start[~mask])
    if update.master is not None:
        assert same_bits(update.param[mask], round_to_bfloat16(update.master))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_masked_adamw_ignores_nan_off_the_mask_and_keeps_its_bits(kind: str, backend: str) -> None:
    mask = chosen(1000, 0.3)
    for grad in GRADS:
        update = adamw_update(mask, kind, grad)
        before = copied(update)
        masked_adamw([update])
        assert same_bits(update.param[~mask], before.param[~mask])
        assert not same_bits(update.param[mask], before.param[mask])
        assert all(tensor.isfinite().all() for tensor in (update.param[mask], update.exp_avg, update.exp_avg_sq))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(
    ("size", "density"), [*itertools.product(SIZES, DENSITIES), (5000, 0.6), (65539, 0.02), (300_000, CLUSTERED)]
)
@pytest.mark.usefixtures("cpu")
def test_masked_adamw_compiled_equals_the_reference(size: int, density: float | str, kind: str) -> None:
    mask = chosen(size, density)
    for grad, is_rounded, scale in itertools.product(GRADS, (False, True), (None, SCALE)):
        update = adamw_update(mask, kind, grad, is_rounded=is_rounded)
        expected, found = copied(update), copied(update)
        for step in (3, 4):
            reference.masked_adamw([dataclasses.replace(expected, step=step)], grad_scale=scale)
            masked_adamw([dataclasses.replace(found, step=step)], grad_scale=scale)
        assert_same(found, expected, (grad, is_rounded, scale))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.usefixtures("cpu")
def test_masked_adamw_compiled_rounds_every_master_as_the_reference(kind: str) -> None:
    """With lr 0 the weights are only rounded: all upper halves, infinities and NaN included, ties and both sides."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    bits = torch.cat([upper | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    mask = torch.ones(bits.numel() + 77, dtype=torch.bool)
    mask[::7] = False
    start = adamw_update(mask, kind, torch.bfloat16, lr=0.0, weight_decay=0.0)
    exact = bits[: start.mask.count].view(torch.float32)
    if start.master is None or start.master.dtype != torch.float32:
        dense = torch.zeros(mask.numel())
        dense[mask] = exact
        start = dataclasses.replace(start, param=dense.to(start.param.dtype))
    else:
        start = dataclasses.replace(start, master=exact)
    expected, found = copied(start), copied(start)
    reference.masked_adamw([expected], grad_scale=None)
    masked_adamw([found])
    for name, tensor in tensors_of(found).items():
        wanted = tensors_of(expected)[name]
        if tensor.dtype == torch.float32:  # which NaN comes out of arithmetic is up to the processor
            tensor, wanted = tensor.nan_to_num(nan=1.5), wanted.nan_to_num(nan=1.5)
        assert same_bits(tensor, wanted), name


def test_masked_adamw_steps_tensors_together_as_one_by_one(backend: str) -> None:
    cache: dict[Any, Any] = {}
    updates = []
    for number, (kind, size) in enumerate(itertools.product(WEIGHTS, (1, 1000, 5000))):
        options = {"lr": 0.01 * (number + 1), "step": number + 1, "weight_decay": 0.01 * number, "eps": 10.0**-number}
        options |= {"betas": (0.05 * number, 0.99 - 0.05 * number), "rounding_key": rounding_key(0, number, 1)}
        updates.append(adamw_update(chosen(size, 0.3), kind, GRADS[number % 4], **options))
    alone, together = [copied(update) for update in updates], [copied(update) for update in updates]
    for _ in range(2):
        for update in alone:
            masked_adamw([update], grad_scale=SCALE)
        masked_adamw(together, grad_scale=SCALE, cache=cache)
    for one, all_ in zip(alone, together, strict=True):
        assert_same(all_, one)


@pytest.mark.usefixtures("cpu")
def test_masked_adamw_gives_the_same_bits_for_every_number_of_threads() -> None:
    updates = [adamw_update(chosen(65539, density), "bf16, masters", torch.bfloat16) for density in (0.1, 0.7, 1.0)]
    cache: dict[Any, Any] = {}
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append([copied(update) for update in updates])
        masked_adamw(results[-1], cache=cache)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert_same(found, expected, "threads")


@pytest.mark.usefixtures("cpu")
def test_masked_adamw_follows_a_new_mask_in_an_old_cache() -> None:
    cache: dict[Any, Any] = {}
    for density in (0.2, 0.5, 0.2):
        update = adamw_update(chosen(5000, density), "bf16, masters", None)
        expected = copied(update)
        reference.masked_adamw([expected], grad_scale=None)
        masked_adamw([update], cache=cache)
        assert_same(update, expected, density)


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.usefixtures("cpu")
def test_masked_adamw_touches_nothing_behind_its_tensors(kind: str) -> None:
    for size, density, grad in itertools.product((1, 31, 32, 33, 1000, 2080, 4099), (0.001, 0.3, 1.0), GRADS):
        update = adamw_update(chosen(size, density), kind, grad, is_rounded=True)
        expected = copied(update)
        reference.masked_adamw([expected], grad_scale=None)
        guarded = {name: at_page_end(tensor) for name, tensor in tensors_of(update).items()}
        mask = dataclasses.replace(update.mask, bits=at_page_end(update.mask.bits))
        found = dataclasses.replace(update, mask=mask, **guarded)
        masked_adamw([found])
        assert_same(found, expected, (size, density, grad))


@pytest.mark.parametrize("is_rounded", [False, True])
def test_masked_adamw_keeps_masters_and_remainders_equal(is_rounded: bool, backend: str) -> None:
    """10,000 steps; without averaging and with steps of 2**-9, half of the first half's masters are ties."""
    steps = 10_000 if backend == "cpu" else 300
    mask = chosen(200, 0.5)
    count = int(mask.sum())
    ties = torch.arange(count) < count // 2
    start = torch.where(values(200, 1) < 0, -0.75, 0.75).bfloat16()
    one, other = (
        adamw_update(mask, kind, None, betas=(0.0, 0.0), eps=1e-30, weight_decay=0.0)
        for kind in ("bf16, masters", "bf16, remainders")
    )
    one = copied(one, param=start.clone(), master=start[mask].float(), exp_avg=torch.zeros(count))
    other = copied(other, param=start.clone(), master=torch.zeros(count, dtype=torch.int16), exp_avg=torch.zeros(count))
    generator = torch.Generator().manual_seed(0)
    num_ties = 0
    for step in range(1, steps + 1):
        # A gradient of +-1 moves a master by lr exactly; it stays within [0.5, 1), where bfloat16s are 2**-8 apart.
        assert one.master is not None
        toward = torch.where(one.master.abs() > 0.9, 1.0, torch.where(one.master.abs() < 0.6, -1.0, 0.0))
        sign = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0
        sign = torch.where(toward == 0, sign, toward * one.master.sign())
        grad = torch.where(ties, sign, torch.randn(count, generator=generator))
        betas = (0.0, 0.0) if step % 2 else (1e-3, 1e-3)
        grad[ties] *= float(step % 2)  # every other step averages, and leaves the ties where they are
        fields = {"grad": grad, "step": step, "lr": 2.0**-9, "betas": betas, "is_rounded": is_rounded}
        if not step % 2:
            one.exp_avg[ties], other.exp_avg[ties] = 0.0, 0.0
        masked_adamw([dataclasses.replace(one, **fields)])
        masked_adamw([dataclasses.replace(other, **fields)])
        assert other.master is not None
        assert same_bits(one.param, other.param), step
        assert same_bits(join_master(other.param[mask], other.master), one.master), step
        num_ties += int(((one.master.view(torch.int32) & 0xFFFF) == 0x8000).sum())
    assert num_ties > steps * count // 8
    assert same_bits(one.exp_avg, other.exp_avg)
    assert same_bits(one.exp_avg_sq, other.exp_avg_sq)
    assert same_bits(one.param[mask], round_to_bfloat16(one.master))


BAD = {
    "must be flat and contiguous": {"param": torch.zeros(8)[::2]},
    "`param` must be flat": {"param": torch.zeros(2, 2)},
    "got torch.float64": {"param": torch.zeros(4, dtype=torch.float64)},
    "the mask has 4 elements, the tensor 5": {"param": torch.zeros(5)},
    "`grad` must be torch.float32 of shape": {"grad": torch.zeros(3)},
    "`grad` must be contiguous": {"grad": torch.zeros(4)[::2]},
    "state must be torch.float32": {"exp_avg": torch.zeros(2, dtype=torch.bfloat16)},
    "state has shape": {"exp_avg_sq": torch.zeros(4)},
    "state must be contiguous": {"exp_avg": torch.zeros(4)[::2]},
    "absent beside": {"master": torch.zeros(2)},
    "remainders go with": {"master": torch.zeros(2, dtype=torch.int16)},
    "needs `rounding_key`": {"param": torch.zeros(4, dtype=torch.bfloat16)},
    "needs float32 masters": {"param": torch.zeros(4, dtype=torch.float16)},
}


@pytest.mark.parametrize("message", BAD)
def test_masked_adamw_refuses_what_does_not_fit(message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_adamw([example(**BAD[message])])


def test_masked_adamw_of_no_tensors_does_nothing(backend: str) -> None:
    masked_adamw([])


def test_gradient_of_a_case_is_poisoned() -> None:
    """The tests above rely on it."""
    mask = chosen(1000, 0.3)
    assert gradient(mask, torch.bfloat16)[~mask].isnan().all()
