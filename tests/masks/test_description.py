"""A mask in lines of text: its size, and where it comes from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from subnet_ft.masks import Provenance, SubnetMask, combine, control_mask
from subnet_ft.masks.description import mask_figures, mask_lines


def make(source: dict[str, Any]) -> SubnetMask:
    return SubnetMask.from_dense({"layers.0.w": torch.arange(10) < 3}, Provenance(source=source))


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ({"kind": "extract"}, "extract"),
        ({"kind": "early", "step": 5}, "early, step 5"),
        ({"kind": "principal", "seed": 0, "rank_share": 1 / 32, "density": 0.2},
         "principal, seed 0, rank_share 0.03125, density 0.2"),
        ({"of": 7}, "unknown, of 7"),
    ],
)  # fmt: skip
def test_mask_lines_name_the_source(source: dict[str, Any], line: str) -> None:
    assert f"  source     {line}" in mask_lines(make(source))


def test_mask_lines_shorten_the_masks_that_a_mask_was_made_of() -> None:
    mask = make({"kind": "extract"})
    control = control_mask(mask, "uniform", seed=1)
    assert f"  source     uniform, seed 1, of {mask.fingerprint[:12]}" in mask_lines(control)
    both = combine([mask, control, mask], "majority")
    assert "  source     majority, of 3 masks, at_least 2" in mask_lines(both)
    assert mask_figures(both)["source"]["of"] == [mask.fingerprint, control.fingerprint, mask.fingerprint]


def test_mask_lines_of_a_mask_without_a_source_have_none() -> None:
    lines = mask_lines(make({}))
    assert lines[0] == "3 of 10 weights, density 0.3000 (update sparsity 70.0%)"
    assert not any("source" in line for line in lines)
