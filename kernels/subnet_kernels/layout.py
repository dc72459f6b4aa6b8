"""`BitMask`: the bits of one tensor's mask with the slot at which every tile's compact values start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

TILE_SIZE = 1024
"""Weights per tile: what one program of a kernel works on."""

SEGMENT_TILES = 1 << 20
"""Tiles per segment: an offset inside a segment of 2**30 weights fits 32 bits, whatever the size of the tensor."""

_TILE_BYTES = TILE_SIZE // 8


@dataclass(frozen=True, eq=False)
class BitMask:
    """The mask of one flat tensor on the device of the tensor; the only index structure that lives between steps.

    The masked elements of tile `t` lie in a compact tensor from slot `bases[t // SEGMENT_TILES] + offsets[t]` on.

    Args:
        bits: (ceil(N / 8),) uint8, or longer: on an accelerator it is padded with zeros to whole tiles. Bit `i` of byte
            `j` is element `8 * j + i`.
        offsets: (T,) int32, the exclusive prefix count of set bits before each tile, counted from its segment's start.
        bases: (S,) int64, the count of set bits before each segment.
        num_elements: N, the number of elements of the tensor.
        count: K, the number of set bits.

    Example:
        1,030 elements of which 0, 3 and 1,028 are masked: two tiles, offsets [0, 2], bases [0], count 3.
    """

    bits: torch.Tensor
    offsets: torch.Tensor
    bases: torch.Tensor
    num_elements: int
    count: int

    @classmethod
    def from_bits(cls, bits: torch.Tensor, num_elements: int, device: torch.device | str | None = None) -> BitMask:
        """Index the (ceil(N / 8),) uint8 `bits` of a tensor; on the CPU the bits themselves are shared, not copied.

        Args:
            bits: (ceil(N / 8),) uint8 with zero padding. In.
            num_elements: N, the number of elements.
            device: Where the mask is used; the device of `bits` when `None`.

        Raises:
            ValueError: `bits` has another dtype or length, or sets a bit behind the last element.
        """
        expected = (num_elements + 7) // 8
        if bits.dtype != torch.uint8 or bits.shape != (expected,):
            raise ValueError(
                f"a mask of {num_elements} elements is uint8 of shape ({expected},), got {bits.dtype} "
                f"{tuple(bits.shape)}"
            )
        on_host = bits.detach().cpu().contiguous()
        if num_elements % 8 and int(on_host[-1]) >> num_elements % 8:
            raise ValueError(f"the mask sets a padding bit behind its last element, {num_elements - 1}")
        counts = _counts_per_tile(on_host.numpy())
        before = np.cumsum(counts, dtype=np.int64) - counts
        bases = before[::SEGMENT_TILES].copy() if before.size else np.zeros(1, dtype=np.int64)
        within = before - np.repeat(bases, SEGMENT_TILES)[: before.size] if bases.size > 1 else before - bases[0]
        target = bits.device if device is None else torch.device(device)
        return cls(
            bits=on_host if target.type == "cpu" else _padded(on_host).to(target),
            offsets=torch.from_numpy(within.astype(np.int32)).to(target),
            bases=torch.from_numpy(bases).to(target),
            num_elements=num_elements,
            count=int(counts.sum()),
        )

    @property
    def num_tiles(self) -> int:
        """T, the number of tiles."""
        return self.offsets.numel()

    @property
    def is_full(self) -> bool:
        """Whether every element is masked."""
        return self.count == self.num_elements

    @property
    def device(self) -> torch.device:
        """The device of the bits."""
        return self.bits.device

    @property
    def nbytes(self) -> int:
        """Bytes that the mask holds: bits, offsets and bases."""
        return self.bits.nbytes + self.offsets.nbytes + self.bases.nbytes


def _counts_per_tile(bits: np.ndarray) -> np.ndarray:
    """Count the set bits of every tile of (B,) uint8; (T,) int64."""
    whole = bits.size // _TILE_BYTES
    counts = np.empty(-(-bits.size // _TILE_BYTES), dtype=np.int64)
    words = bits[: whole * _TILE_BYTES].view(np.uint64).reshape(whole, _TILE_BYTES // 8)
    rows = 1 << 13  # tiles at a time, so that the counts of words stay small
    for first in range(0, whole, rows):
        last = min(first + rows, whole)
        np.bitwise_count(words[first:last]).sum(axis=1, dtype=np.int64, out=counts[first:last])
    counts[whole:] = np.bitwise_count(bits[whole * _TILE_BYTES :]).sum(dtype=np.int64)
    return counts


def _padded(bits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(bits, (0, -bits.numel() % _TILE_BYTES))
