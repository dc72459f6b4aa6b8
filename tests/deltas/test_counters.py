"""`VersionCounters`: no two exchanges look alike to autograd, and afterwards the counters are what they were."""

from __future__ import annotations

import torch

from subnet_ft.deltas.counters import VersionCounters


def test_version_counters_are_marked_apart_from_writes_and_from_each_other_and_restored() -> None:
    weights = {"a": torch.ones(3), "b": torch.ones(2).add_(1)}
    before = [weight._version for weight in weights.values()]
    seen = set()
    for _ in range(3):
        counters = VersionCounters(weights)
        assert counters.written() == []
        counters.mark()
        assert counters.written() == []
        (version,) = {weight._version for weight in weights.values()}
        for _ in range(5):
            seen.add(weights["a"]._version)
            weights["a"].add_(1)
        assert counters.written() == ["a"]
        assert version in seen
        counters.restore()
        assert counters.written() == []
        assert [weight._version for weight in weights.values()] == before
    assert len(seen) == 15


def test_version_counters_pass_over_weights_that_have_none() -> None:
    with torch.inference_mode():
        weight = torch.ones(3)
    counters = VersionCounters({"a": weight, "b": torch.ones(2)})
    counters.mark()
    assert counters.written() == []
    counters.restore()
    VersionCounters({}).mark()
