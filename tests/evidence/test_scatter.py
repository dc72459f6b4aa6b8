"""Histograms of changes against counts by hand, whatever the pieces in which weights are read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from memory_checkpoint import MemoryCheckpoint

from subnet_ft.errors import CheckpointMismatchError, MaskMismatchError
from subnet_ft.evidence import scatter
from subnet_ft.evidence.scatter import RunScatter, Scatter, weight_scatter
from subnet_ft.evidence.weights import RunWeights
from subnet_ft.masks import SubnetMask

BINS = 21


def drawn(seed: int, *, size: tuple[int, int] = (30, 41)) -> torch.Tensor:
    return 1e-3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def checkpoints(
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[MemoryCheckpoint, MemoryCheckpoint, dict[str, RunWeights]]:
    """Return a base, a full run and two runs: one that moved like it, one that moved anyhow."""
    base = {
        name: 0.05 * torch.randn(30, 41, generator=torch.Generator().manual_seed(seed))
        for seed, name in enumerate("ab")
    }

    def moved(like: float, seed: int) -> dict[str, torch.Tensor]:
        return {
            name: (value + like * drawn(index) + (1 - like) * drawn(seed + index)).to(dtype)
            for index, (name, value) in enumerate(base.items(), 10)
        }

    stored = {name: value.to(dtype) for name, value in base.items()}
    full = moved(1.0, 0)
    mask = SubnetMask.from_dense(
        {name: torch.rand(30, 41, generator=torch.Generator().manual_seed(9)) < 0.6 for name in base}
    )
    runs = {
        "near": RunWeights(MemoryCheckpoint("near", moved(0.8, 20)), mask),
        "far": RunWeights(MemoryCheckpoint("far", moved(0.0, 30)), mask),
    }
    return MemoryCheckpoint("base", stored), MemoryCheckpoint("full", full), runs


def measured(**options: Any) -> Scatter:
    base, full, runs = checkpoints()
    found = weight_scatter(base, full, runs, num_bins=BINS, **options)
    assert found is not None
    return found


def by_hand(run: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (K,) changes of the full run and of the run over the mask, and whether each moved."""
    base, full, runs = checkpoints()
    mask = runs[run].mask
    assert mask is not None
    chosen = torch.cat([mask[name].reshape(-1) for name in base.values])

    def flat(checkpoint: Any) -> torch.Tensor:
        return torch.cat([value.reshape(-1) for value in checkpoint.values.values()])[chosen]

    start, x, y = flat(base), flat(full), flat(runs[run].checkpoint)
    changes = [(value.float() - start.float()).double().numpy() for value in (x, y)]
    return changes[0], changes[1], (x != start).numpy(), (y != start).numpy()


@pytest.mark.parametrize("run", ["near", "far"])
def test_weight_scatter_counts_as_numpy_does(run: str) -> None:
    found = measured()
    x, y, moved_full, moved_run = by_hand(run)
    edges = np.linspace(-found.limit, found.limit, BINS + 1)
    # Nudged off the edges: there numpy's bins and bins around a centre may differ.
    inside = (abs(x) <= found.limit) & (abs(y) <= found.limit)
    expected, _, _ = np.histogram2d(y[inside], x[inside], bins=[edges, edges])
    counted = found.runs[run]
    assert np.array(counted.counts).sum() + counted.outside == counted.num_weights == len(x)
    assert np.abs(np.array(counted.counts) - expected).sum() <= 4
    assert counted.outside == int((~inside).sum()) > 0
    assert (counted.moved_full, counted.moved_run) == (int(moved_full.sum()), int(moved_run.sum()))
    assert counted.moved_both == int((moved_full & moved_run).sum())
    both = moved_full & moved_run
    assert counted.same_direction == pytest.approx(float((np.sign(x[both]) == np.sign(y[both])).mean()))
    assert counted.cosine == pytest.approx(float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)), abs=1e-9)


def test_weight_scatter_tells_a_run_that_moved_alike_from_one_that_did_not() -> None:
    near, far = (measured().runs[name] for name in ("near", "far"))
    assert near.same_direction is not None
    assert near.cosine is not None
    assert far.same_direction is not None
    assert far.cosine is not None
    assert near.same_direction > 0.9 > 0.6 > far.same_direction > 0.4
    assert near.cosine > 0.9 > 0.1 > abs(far.cosine)


def test_weight_scatter_puts_the_base_in_the_middle() -> None:
    base, full, runs = checkpoints()
    still = {"still": RunWeights(base, runs["near"].mask)}
    found = weight_scatter(base, full, still, num_bins=BINS)
    assert found is not None
    counts = np.array(found.runs["still"].counts)
    assert counts[BINS // 2].sum() == counts.sum() > 0
    assert found.runs["still"].moved_run == 0
    assert found.runs["still"].cosine is None
    assert found.runs["still"].same_direction is None


def test_weight_scatter_axes_hold_almost_all_that_the_full_run_changed() -> None:
    base, full, _ = checkpoints()
    changes = torch.cat([(full.values[name].float() - base.values[name].float()).reshape(-1) for name in "ab"]).abs()
    changes = changes[changes > 0]
    limit = measured().limit
    assert float((changes <= limit).double().mean()) >= 0.995
    assert float((changes <= limit * 0.98).double().mean()) < 0.9951


def test_weight_scatter_is_the_same_in_any_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured()
    monkeypatch.setattr(scatter, "_CHUNK", 64)
    pieces = measured()
    assert pieces.limit == whole.limit
    for name, run in whole.runs.items():
        assert pieces.runs[name].counts == run.counts
        assert pieces.runs[name].cosine == pytest.approx(run.cosine, abs=1e-12)


def test_weight_scatter_reads_runs_once_and_base_and_full_run_twice() -> None:
    base, full, runs = checkpoints()
    weight_scatter(base, full, runs)
    assert base.reads == full.reads == {"a": 2, "b": 2}
    assert all(run.checkpoint.reads == {"a": 1, "b": 1} for run in runs.values())


def test_weight_scatter_casts_first_where_asked() -> None:
    base, full, runs = checkpoints(torch.float32)
    found = weight_scatter(base, full, runs, dtype="bfloat16", num_bins=BINS)
    assert found is not None
    assert found.runs["near"].moved_full < found.runs["near"].num_weights
    exact = weight_scatter(base, full, runs, num_bins=BINS)
    assert exact is not None
    assert exact.runs["near"].moved_full == exact.runs["near"].num_weights


def test_weight_scatter_survives_what_is_not_finite() -> None:
    base, full, runs = checkpoints()
    broken = {name: value.clone() for name, value in runs["near"].checkpoint.values.items()}
    broken["a"][:] = math.nan
    found = weight_scatter(base, full, {"near": RunWeights(MemoryCheckpoint("x", broken), runs["near"].mask)})
    assert found is not None
    run: RunScatter = found.runs["near"]
    assert run.cosine is None
    assert np.array(run.counts).sum() + run.outside == run.num_weights


def test_weight_scatter_gives_nothing_where_the_full_run_changed_nothing() -> None:
    base, _, runs = checkpoints()
    assert weight_scatter(base, base, runs) is None


def test_weight_scatter_refuses_what_cannot_be_compared() -> None:
    base, full, runs = checkpoints()
    with pytest.raises(ValueError, match="`near` has no mask"):
        weight_scatter(base, full, {"near": RunWeights(runs["near"].checkpoint)})
    with pytest.raises(ValueError, match="must be odd"):
        weight_scatter(base, full, runs, num_bins=20)
    with pytest.raises(CheckpointMismatchError, match="`b` is missing"):
        weight_scatter(base, MemoryCheckpoint("full", {"a": full.values["a"]}), runs)
    other = SubnetMask.from_dense({"a": torch.ones(3, 41, dtype=torch.bool)})
    with pytest.raises(MaskMismatchError):
        weight_scatter(base, full, {"near": RunWeights(runs["near"].checkpoint, other)})
