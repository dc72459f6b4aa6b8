"""The early mask is an extraction that knows its step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.errors import MaskError
from subnet_ft.masks import early_mask, extract


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    tuned = save_tiny("llama", tmp_path / "checkpoint-7", seed=1)
    (tuned / "trainer_state.json").write_text(json.dumps({"global_step": 7}), encoding="utf-8")
    return save_tiny("llama", tmp_path / "base"), tuned


def test_early_mask_records_the_step_of_its_checkpoint(pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    how = {"criterion": "absolute", "tolerance": 0.1, "dtype": "float32"}
    mask, extracted = early_mask(base, open_checkpoint(tuned), **how), extract(base, tuned, **how)
    assert mask == extracted
    assert mask.provenance.source == {"kind": "early", "step": 7}
    assert mask.provenance.base == extracted.provenance.base
    assert (mask.provenance.criterion, mask.provenance.tolerance) == ("absolute", 0.1)


@pytest.mark.parametrize("state", [None, "{", "{}", "[]", '{"global_step": 0}', '{"global_step": "7"}'])
def test_early_mask_needs_the_step(pair: tuple[Path, Path], state: str | None) -> None:
    path = pair[1] / "trainer_state.json"
    path.unlink()
    if state is not None:
        path.write_text(state, encoding="utf-8")
    with pytest.raises(MaskError, match=r"global_step"):
        early_mask(*pair)
