"""Ctrl-C at a chosen line of chosen files."""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Collection, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def interrupted_at(number: int, files: Collection[str]) -> Iterator[None]:
    """Inside, raise KeyboardInterrupt before the given line that runs in one of the files, on this thread.

    Args:
        number: Lines are counted from 0, in the order in which they run.
        files: Ends of paths.
    """
    left = number

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(tuple(files)):
            return None
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        # On its way out a `with` is traced outside of what it protects, where no signal is ever taken.
        if event == "line" and not source.lstrip().startswith("with "):
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
