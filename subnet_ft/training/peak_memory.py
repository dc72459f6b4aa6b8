"""The peak memory of a block of code, as the operating system or the accelerator counts it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from pathlib import Path
from types import TracebackType

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def _return_freed_memory() -> None:
    """Give the system back what earlier runs in this process freed, where the C library can; else it counts again."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Measures the peak between `with` and its end.

    `measured` has `peak_device` (bytes allocated by torch on the current CUDA device) where there is one, else
    `peak_rss` (bytes resident in the process, everything included) on Linux, else nothing.
    """

    def __init__(self) -> None:
        self.measured: dict[str, int] = {}
        self._can_reset = False

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return self
        _return_freed_memory()
        try:
            _CLEAR.write_text("5")  # sets the peak back to what is resident now
            self._can_reset = True
        except OSError:
            self._can_reset = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.cuda.is_available():
            self.measured = {"peak_device": torch.cuda.max_memory_allocated()}
        elif self._can_reset:
            found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
            if found:
                self.measured = {"peak_rss": int(found.group(1)) * 1024}
