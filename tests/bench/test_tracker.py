"""The tracker of storages: what it counts, and when it stops."""

from __future__ import annotations

import torch

from subnet_ft.bench.tracker import Peak, StorageTracker

SIZE = 1000


def by_op(op: str, tensor: torch.Tensor) -> str | None:
    return op.partition(".")[2].partition(".")[0] if tensor.numel() == SIZE else None


def test_tracker_counts_a_storage_once_and_until_it_is_freed() -> None:
    tracker = StorageTracker(by_op)
    with tracker:
        one = torch.zeros(SIZE)
        view = one.view(10, 100)
        two = one + 1.0
        assert tracker.live == {"zeros": 4 * SIZE, "add": 4 * SIZE}
        del two
        assert tracker.live == {"zeros": 4 * SIZE, "add": 0}
        one.add_(1.0)  # in place: nothing is allocated
        del one
        assert tracker.live["zeros"] == 4 * SIZE  # the view keeps it
        del view
        assert sum(tracker.live.values()) == 0
    (peak,) = tracker.peaks()
    assert peak.total == 8 * SIZE
    assert peak.parts == peak.highest == {"zeros": 4 * SIZE, "add": 4 * SIZE}


def test_tracker_counts_only_what_has_an_owner() -> None:
    tracker = StorageTracker(by_op)
    with tracker:
        kept = torch.zeros(SIZE - 1)
    assert tracker.peaks() == [Peak()]
    assert kept.numel() == SIZE - 1


def test_tracker_sees_what_backward_allocates() -> None:
    weight = torch.nn.Parameter(torch.ones(SIZE))
    freed: list[int] = []

    def free(parameter: torch.Tensor) -> None:
        freed.append(sum(tracker.live.values()))
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(free)
    tracker = StorageTracker(by_op)
    with tracker:
        (weight * 2.0).sum().backward()
        assert sum(tracker.live.values()) == 0
    assert freed
    assert freed[0] >= 4 * SIZE
    assert tracker.peaks()[0].total >= 4 * SIZE


def test_tracker_counts_a_storage_that_only_a_view_gives_away() -> None:
    tracker = StorageTracker(by_op)
    before = torch.zeros(2 * SIZE)
    with tracker:
        wide = torch.zeros(2 * SIZE)
        assert tracker.live == {}
        narrow = wide[:SIZE]
        older = before[:SIZE]  # of a storage that was there before
    assert tracker.live == {"slice": 8 * SIZE}
    assert narrow.numel() == older.numel()


def test_peaks_are_those_of_a_section_without_what_persists() -> None:
    tracker = StorageTracker(by_op)
    with tracker:
        persistent = torch.zeros(SIZE)
        kept = torch.ones(SIZE, dtype=torch.int64)
        tracker.mark()
        torch.full((SIZE,), 1.0)
    assert [peak.total for peak in tracker.peaks()] == [12 * SIZE, 16 * SIZE]
    first, second = tracker.peaks(without=[persistent.view(10, 100)])
    assert first == Peak(8 * SIZE, {"ones": 8 * SIZE}, {"ones": 8 * SIZE})
    assert second.parts == {"ones": 8 * SIZE, "full": 4 * SIZE}
    assert kept.numel() == SIZE
