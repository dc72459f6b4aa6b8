"""The rows of the extraction benchmark, on a tiny pair."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from subnet_ft.bench import extraction
from subnet_ft.bench.extraction import LOAD_WIDENED, METHODS, OURS, measure_extraction, perturbed_copy
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.masks import extract


def test_perturbed_copy_moves_that_share_to_neighbours(tmp_path: Path) -> None:
    base = open_checkpoint("tiny:llama")
    copy = open_checkpoint(perturbed_copy(base.folder, tmp_path / "tuned", 0.25))
    assert extract(base, copy).density == pytest.approx(0.25, abs=0.02)
    for (_, old), (_, new) in zip(base.tensors(), copy.tensors(), strict=True):
        steps = new.view(torch.int16).int() - old.view(torch.int16).int()
        assert steps.abs().max() == 1


@pytest.mark.parametrize("method", METHODS[1:])
def test_measure_shows_no_speed_for_another_density(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def one_weight_less(name: str, arguments: list[str]) -> dict[str, Any]:
        changed = 999_999 if name == method else 1_000_000
        return {"method": name, "density": changed / 134_515_008, "median_ms": 2.0, "fastest_ms": 1.0}

    monkeypatch.setattr(extraction, "_in_a_fresh_process", one_weight_less)
    ours, *others = extraction.measure(Path("base"), Path("tuned"), 1)
    assert (ours["median_ms"], ours["fastest_ms"]) == (None, None)
    assert f"`{method}` one of 0.00743" in ours["refused"]
    assert all(row["median_ms"] == 2.0 and "refused" not in row for row in others)


def test_measure_extraction_gives_a_row_per_method() -> None:
    rows = measure_extraction("tiny:llama", repeats=2, refused={"compare": "`compare` is wrong"}, density=0.5)
    assert [row["method"] for row in rows] == list(METHODS)
    # A subnormal or zero that turned into its neighbour counts for all, so all find the very same weights.
    assert len({row["density"] for row in rows}) == 1
    assert rows[0]["density"] == pytest.approx(0.5, abs=0.02)
    ours = rows[0]
    assert (ours["method"], ours["median_ms"], ours["refused"]) == (OURS, None, "`compare` is wrong")
    assert all(row["median_ms"] >= row["fastest_ms"] > 0 for row in rows[1:])
    assert rows[-1]["method"] == LOAD_WIDENED
    if sys.platform == "linux":
        assert all(row["peak_bytes"] >= 0 for row in rows)
