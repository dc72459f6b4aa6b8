"""Zstandard, an optional package: single frames, and a decoder that gives no more than it is asked for."""

from __future__ import annotations

import importlib.util

from subnet_ft.errors import MissingDependencyError

_LEVEL = 3


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
    """Decode exactly one frame of exactly `nbytes` bytes; nothing is allocated for a frame that states another size.

    Raises:
        ValueError: The frame is damaged, states another size, or is followed by something.
    """
    import zstandard

    try:
        stated = zstandard.get_frame_parameters(frame).content_size
        if stated != nbytes:
            raise ValueError(f"it states a size of {stated:,} bytes, expected {nbytes:,}")
        decoded = zstandard.ZstdDecompressor().decompress(frame, max_output_size=nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if len(decoded) != nbytes:
        raise ValueError(f"it holds {len(decoded):,} bytes, expected {nbytes:,}")
    return bytearray(decoded)
