"""Zstandard, an optional package: single frames, and a decoder that gives no more than it is asked for."""

from __future__ import annotations

import importlib.util

from subnet_ft.errors import MissingDependencyError

_LEVEL = 3
_MOST_PER_BYTE = 1 << 15
"""What a byte of a frame can stand for: the densest block has 4 bytes, for 2^17 times one byte (RFC 8878, 3.1.1.2)."""


def check_zstd(purpose: str) -> None:
    """Raise MissingDependencyError unless the package is installed.

    Args:
        purpose: What it is needed for, as the end of a sentence.
    """
    if importlib.util.find_spec("zstandard") is None:
        raise MissingDependencyError("zstandard", purpose, "zstd")


def compress(data: bytes | memoryview) -> bytes:
    """Compress to one frame that states its decoded size."""
    import zstandard

    frame: bytes = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(data)
    return frame


def decompress(frame: bytes, nbytes: int) -> bytearray:
    """Decode exactly one frame of exactly `nbytes` bytes.

    Nothing is allocated for a frame that states another size, or more than its own bytes could ever stand for.

    Raises:
        ValueError: The frame is damaged, states another size, is followed by something, or memory does not hold it.
    """
    import zstandard

    try:
        stated = zstandard.get_frame_parameters(frame).content_size
        if stated != nbytes:
            raise ValueError(f"it states a size of {stated:,} bytes, expected {nbytes:,}")
        if nbytes > _MOST_PER_BYTE * len(frame):
            raise ValueError(f"it states a size of {stated:,} bytes, and its {len(frame):,} cannot stand for as many")
        decoded = zstandard.ZstdDecompressor().decompress(frame, max_output_size=nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    except MemoryError as error:
        raise ValueError(f"its {nbytes:,} bytes do not fit into memory") from error
    if len(decoded) != nbytes:
        raise ValueError(f"it holds {len(decoded):,} bytes, expected {nbytes:,}")
    return bytearray(decoded)
