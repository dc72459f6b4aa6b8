"""How the chunks of a step reach the threads."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

steps = pytest.importorskip("subnet_kernels.cpu.steps", reason="needs numba")


class RacingList(list[int]):
    """A list as it is without an interpreter lock: two threads on one iterator may get the same item."""

    def __iter__(self) -> Any:
        return _RacingIterator(self)


class _RacingIterator:
    def __init__(self, items: RacingList) -> None:
        self.items, self.position = items, 0

    def __iter__(self) -> _RacingIterator:
        return self

    def __next__(self) -> int:
        position = self.position
        time.sleep(0.02)
        self.position = position + 1
        if position >= len(self.items):
            raise StopIteration
        return self.items[position]


def test_run_chunks_gives_every_chunk_to_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    monkeypatch.setattr(steps.table, "rows", lambda *_: None)
    monkeypatch.setattr(steps.table, "chunks", lambda *_: RacingList(range(9)))
    taken: list[int] = []

    def function(rows: Any, scalars: Any, chunk: int, scale: Any) -> None:
        taken.append(chunk)
        time.sleep(0.001)

    steps.run_chunks(function, [], [], None, {})
    assert sorted(taken) == list(range(9))
