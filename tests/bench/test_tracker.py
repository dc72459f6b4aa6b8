"""The tracker of storages: what it counts, and when it stops."""

from __future__ import annotations

import torch

from subnet_ft.bench.tracker import StorageTracker

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
    assert tracker.peak == 8 * SIZE
    assert tracker.at_peak == {"zeros": 4 * SIZE, "add": 4 * SIZE}


def test_tracker_counts_only_what_has_an_owner() -> None:
    tracker = StorageTracker(by_op)
    with tracker:
        kept = torch.zeros(SIZE - 1)
    assert (tracker.peak, tracker.highest) == (0, {})
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
    assert tracker.peak >= 4 * SIZE
