"""`Piece`: stretches of a tensor that together are the tensor, shared by threads; what a failing one leaves."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bits

from subnet_ft.deltas import pieces
from subnet_ft.deltas.pieces import Piece, pieces_of, side_by_side
from subnet_kernels import BitMask, pack_bits

CPU = torch.device("cpu")


def tensor_of(length: int) -> tuple[torch.nn.Parameter, BitMask, torch.Tensor, torch.Tensor]:
    """Return a parameter, a mask, values for it, and what the parameter is with them."""
    generator = torch.Generator().manual_seed(length)
    weights = torch.randn(length, generator=generator).bfloat16()
    chosen = torch.rand(length, generator=generator) < 0.3
    chosen[-1] = True
    values = torch.randn(int(chosen.sum()), generator=generator).bfloat16()
    expected = weights.clone()
    expected[chosen] = values
    return torch.nn.Parameter(weights), BitMask.from_bits(pack_bits(chosen), length), values, expected


@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, 3 * 4096, 10_001])
def test_pieces_of_are_the_whole_tensor_in_order(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_LENGTH", 4096)
    parameter, mask, values, expected = tensor_of(length)
    base = parameter.detach().clone()
    found = list(pieces_of("w", parameter, mask, values))
    assert [piece.start for piece in found] == list(range(0, length, 4096))
    assert same_bits(torch.cat([piece.values for piece in found]), values)
    side_by_side(Piece.bring_in, found, {CPU})
    assert same_bits(parameter.detach(), expected)
    side_by_side(Piece.bring_out, found, {CPU})
    assert same_bits(parameter.detach(), base)
    assert all(piece.is_intact for piece in found)


def test_pieces_of_leave_out_stretches_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_LENGTH", 4096)
    parameter = torch.nn.Parameter(torch.zeros(3 * 4096))
    bits = torch.zeros(3 * 512, dtype=torch.uint8)
    bits[1024] = 1
    (piece,) = pieces_of("w", parameter, BitMask.from_bits(bits, 3 * 4096), torch.ones(1))
    assert (piece.start, piece.values.tolist()) == (8192, [1.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_piece_sees_every_bit_that_changed_inside(dtype: torch.dtype, count: int) -> None:
    mask = BitMask.from_bits(torch.tensor([2**count - 1], dtype=torch.uint8), 8)
    for index in range(count):
        parameter = torch.nn.Parameter(torch.ones(8, dtype=dtype))
        piece = Piece("w", parameter, 8, 0, mask, torch.zeros(count, dtype=dtype))
        piece.bring_in()
        parameter.data[index] = -0.0
        piece.bring_out()
        assert piece.is_intact is False


def test_side_by_side_does_the_rest_when_one_fails() -> None:
    done = []

    def action(item: int) -> None:
        if item == 3:
            raise ValueError("three")
        done.append(item)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="three"):
            side_by_side(action, range(100), {CPU})
    finally:
        torch.set_num_threads(before)
    assert len(done) == len(set(done))
    assert 3 not in done
