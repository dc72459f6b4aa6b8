"""Gather, scatter, swap and patch against dense boolean indexing, for every backend."""

from __future__ import annotations

import pytest
import torch
from helpers import DENSITIES, SIZES, random_bits, same_bits

from subnet_kernels import BitMask, fingerprint, gather, layout, pack_bits, patch, scatter, swap

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EXAMPLE = BitMask.from_bits(torch.tensor([0b1010], dtype=torch.uint8), 4)


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        pytest.importorskip("numba")
        torch.set_num_threads(3)  # large tensors are cut into runs of tiles
    monkeypatch.setenv("SUBNET_KERNELS_BACKEND", request.param)
    return str(request.param)


def masked(size: int, density: float) -> tuple[torch.Tensor, BitMask]:
    dense = random_bits(size, density)
    return dense, BitMask.from_bits(pack_bits(dense), size)


def values_with_nan_outside(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    dense = torch.randn(mask.numel(), generator=torch.Generator().manual_seed(3)).to(dtype)
    dense[~mask] = float("nan")
    return dense


def test_gather_gives_the_values_of_its_example() -> None:
    assert gather(torch.tensor([1.0, 2.0, 3.0, 4.0]), EXAMPLE).tolist() == [2.0, 4.0]


def test_scatter_gives_the_values_of_its_example() -> None:
    dense = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scatter(dense, EXAMPLE, torch.tensor([8.0, 9.0]))
    assert dense.tolist() == [1.0, 8.0, 3.0, 9.0]


def test_swap_gives_the_values_of_its_example() -> None:
    dense, compact = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([8.0, 9.0])
    swap(dense, EXAMPLE, compact)
    assert (dense.tolist(), compact.tolist()) == ([1.0, 8.0, 3.0, 9.0], [2.0, 4.0])


def test_patch_gives_the_values_and_fingerprints_of_its_example() -> None:
    dense = torch.tensor([1.0, 2.0, 3.0, 4.0])
    sums = patch(dense, EXAMPLE, torch.tensor([8.0, 9.0]), offset=5)
    assert dense.tolist() == [1.0, 8.0, 3.0, 9.0]
    assert sums == (fingerprint(torch.tensor([1.0, 2.0, 3.0, 4.0]), offset=5), fingerprint(dense, offset=5))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_patch_is_scatter_between_two_fingerprints(size: int, density: float, dtype: torch.dtype) -> None:
    dense_mask, mask = masked(size, density)
    dense = values_with_nan_outside(dense_mask, dtype)
    compact = torch.arange(mask.count).to(dtype)
    patched, scattered = dense.clone(), dense.clone()
    scatter(scattered, mask, compact)
    assert patch(patched, mask, compact, offset=2**40) == tuple(
        fingerprint(each, offset=2**40) for each in (dense, scattered)
    )
    assert same_bits(patched, scattered)


def test_patch_refuses_a_negative_offset() -> None:
    dense = torch.zeros(4)
    with pytest.raises(ValueError, match="`offset` must be >= 0, got -1"):
        patch(dense, EXAMPLE, torch.ones(2), offset=-1)
    assert not dense.any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_scatter_undoes_gather_and_leaves_the_rest_alone(size: int, density: float, dtype: torch.dtype) -> None:
    dense_mask, mask = masked(size, density)
    dense = values_with_nan_outside(dense_mask, dtype)
    values = gather(dense, mask, dtype=dtype)
    assert same_bits(values, dense[dense_mask])
    assert same_bits(gather(dense, mask), dense[dense_mask].float())
    changed = dense.clone()
    scatter(changed, mask, -values)
    assert same_bits(changed[dense_mask], -dense[dense_mask])
    assert same_bits(changed[~dense_mask], dense[~dense_mask])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_swap_exchanges_and_twice_is_nothing(size: int, density: float, dtype: torch.dtype) -> None:
    dense_mask, mask = masked(size, density)
    dense = values_with_nan_outside(dense_mask, dtype)
    compact = torch.arange(mask.count).to(dtype)
    changed, kept = dense.clone(), compact.clone()
    swap(changed, mask, kept)
    assert same_bits(changed[dense_mask], compact)
    assert same_bits(changed[~dense_mask], dense[~dense_mask])
    assert same_bits(kept, dense[dense_mask])
    swap(changed, mask, kept)
    assert same_bits(changed, dense)
    assert same_bits(kept, compact)


@pytest.mark.parametrize("dtype", FLOATS)
def test_copies_keep_every_bit_of_a_nan(dtype: torch.dtype) -> None:
    kind = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    patterns = torch.randint(-(2**15), 2**15, (65539,), generator=torch.Generator().manual_seed(0))
    dense = (patterns if kind == torch.int16 else patterns * 65537).to(kind).view(dtype)
    dense_mask, mask = masked(65539, 0.3)
    values = gather(dense, mask, dtype=dtype)
    assert same_bits(values, dense[dense_mask])
    other = torch.zeros_like(dense)
    scatter(other, mask, values)
    assert same_bits(other[dense_mask], dense[dense_mask])
    swap(other, mask, values)
    assert same_bits(values, dense[dense_mask])
    assert same_bits(gather(other, mask, dtype=dtype), dense[dense_mask])


@pytest.mark.parametrize("bits", [0xFF, 0x0F])
def test_gather_returns_a_copy_also_under_a_full_mask(bits: int) -> None:
    dense = torch.ones(8)
    gather(dense, BitMask.from_bits(torch.tensor([bits], dtype=torch.uint8), 8)).zero_()
    assert dense.tolist() == [1.0] * 8


def test_copies_cross_the_borders_of_segments_and_of_threads(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SEGMENT_TILES", 3)
    if backend == "cpu":
        monkeypatch.setattr("subnet_kernels.cpu.copies._SMALL", 0)  # as many threads as for a large tensor
    dense_mask, mask = masked(65539, 0.2)
    assert mask.bases.numel() == 22
    dense = torch.randn(65539)
    before = dense.clone()
    values = gather(dense, mask)
    assert same_bits(values, dense[dense_mask])
    others = torch.arange(mask.count).float()
    swap(dense, mask, values)
    assert same_bits(dense, before)
    swap(dense, mask, others)
    assert same_bits(others, values)
    assert same_bits(dense[dense_mask], torch.arange(mask.count).float())
    scatter(dense, mask, values)
    assert same_bits(dense, before)
    assert patch(dense, mask, torch.zeros(mask.count)) == (fingerprint(before), fingerprint(dense))
    assert not dense[dense_mask].any()
    assert same_bits(dense[~dense_mask], before[~dense_mask])


def test_copies_write_through_a_view_of_a_parameter() -> None:
    parameter = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    scatter(parameter.detach().view(-1), EXAMPLE, torch.tensor([8.0, 9.0]))
    assert parameter.tolist() == [[1.0, 8.0], [3.0, 9.0]]


@pytest.mark.parametrize("dense", [torch.zeros(2, 2), torch.zeros(1, 4), torch.zeros(8)[::2]])
@pytest.mark.parametrize("bits", [0b1010, 0b1111])
def test_gather_refuses_rows_and_strides(dense: torch.Tensor, bits: int) -> None:
    mask = BitMask.from_bits(torch.tensor([bits], dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="`dense` must be flat and contiguous: what is read are elements"):
        gather(dense, mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_copies_refuse_elements_that_no_weight_has(dtype: torch.dtype) -> None:
    dense, compact = torch.zeros(4).to(dtype), torch.ones(2).to(dtype)
    before = dense.view(torch.uint8).clone()
    message = rf"`dense` must be bfloat16, float16 or float32, got {dtype}"
    with pytest.raises(ValueError, match=message):
        gather(dense, EXAMPLE, dtype=dtype)
    for write in (scatter, swap, patch):
        with pytest.raises(ValueError, match=message):
            write(dense, EXAMPLE, compact)
    assert torch.equal(dense.view(torch.uint8), before)


def test_gather_refuses_a_third_dtype() -> None:
    with pytest.raises(ValueError, match=r"must be torch\.float32 or that of `dense`, torch\.bfloat16"):
        gather(torch.zeros(4, dtype=torch.bfloat16), EXAMPLE, dtype=torch.float16)


def test_gather_refuses_a_mask_of_another_length() -> None:
    with pytest.raises(ValueError, match="the mask has 4 elements, the tensor 5"):
        gather(torch.zeros(5), EXAMPLE)


@pytest.mark.parametrize("copy", [scatter, swap])
def test_copies_refuse_to_round(copy: object) -> None:
    with pytest.raises(ValueError, match="round before scattering"):
        copy(torch.zeros(4, dtype=torch.bfloat16), EXAMPLE, torch.ones(2))  # type: ignore[operator]


@pytest.mark.parametrize("copy", [scatter, swap])
def test_copies_refuse_a_copy_and_a_wrong_count(copy: object) -> None:
    with pytest.raises(ValueError, match="`dense` must be flat and contiguous"):
        copy(torch.zeros(8)[::2], EXAMPLE, torch.ones(2))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"`compact` has shape \(3,\), the mask has 2 set bits"):
        copy(torch.zeros(4), EXAMPLE, torch.ones(3))  # type: ignore[operator]
