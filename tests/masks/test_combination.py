"""Several masks as one, against dense booleans."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_bits

import subnet_ft.masks.combination as combination
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.errors import MaskError, MaskMismatchError
from subnet_ft.masks import RULES, ModelRecord, Provenance, SubnetMask, combine, extract

SHAPES = {"a": (40, 51), "b": (7,), "none": (9,), "all": (3, 3)}


def make(seed: int, provenance: Provenance | None = None) -> SubnetMask:
    dense = {name: random_bits(torch.Size(shape).numel(), 0.5, seed).view(shape) for name, shape in SHAPES.items()}
    dense["none"][:] = False
    dense["all"][:] = True
    return SubnetMask.from_dense(dense, provenance)


@pytest.mark.parametrize("number", [2, 3, 4, 7])
@pytest.mark.parametrize("tile", [1 << 17, 8])
def test_combine_is_counting(number: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combination, "_TILE", tile)
    masks = [make(seed) for seed in range(number)]
    results = {rule: combine(masks, rule) for rule in RULES}
    for name in SHAPES:
        votes = torch.stack([mask[name] for mask in masks]).sum(dim=0)
        assert torch.equal(results["union"][name], votes > 0)
        assert torch.equal(results["intersection"][name], votes == number)
        assert torch.equal(results["majority"][name], votes > number / 2)
        assert torch.equal(results["difference"][name], masks[0][name] & (votes == 1))
        for at_least in range(1, number + 1):
            assert torch.equal(combine(masks, "majority", at_least=at_least)[name], votes >= at_least)


def test_combine_says_what_it_was_made_of() -> None:
    masks = [make(seed, Provenance(source={"kind": "uniform", "seed": seed})) for seed in range(3)]
    assert combine(masks, "majority").provenance.source == {
        "kind": "majority",
        "of": [mask.fingerprint for mask in masks],
        "sources": [{"kind": "uniform", "seed": seed} for seed in range(3)],
        "at_least": 2,
    }
    assert "at_least" not in combine(masks, "union").provenance.source


def test_combine_keeps_the_base_and_refuses_another(tmp_path: Path) -> None:
    folders = [save_tiny("llama", tmp_path / str(seed), seed=seed, dtype=torch.float32) for seed in range(4)]
    masks = [extract(folders[0], tuned, dtype="bfloat16") for tuned in folders[1:3]]
    foreign = extract(folders[3], folders[1], dtype="bfloat16")
    without = SubnetMask(masks[0].tensors, Provenance(source={"kind": "test"}))
    combined = combine([without, *masks], "majority")
    assert combined.provenance.base == masks[0].provenance.base
    path = combined.save(tmp_path / "mask.subnet.safetensors")
    loaded = SubnetMask.load(path, base=folders[0])
    assert (loaded, loaded.provenance) == (combined, combined.provenance)
    for rule in RULES:
        with pytest.raises(MaskMismatchError, match="made for different bases"):
            combine([without, masks[0], foreign], rule)
    other_dtype = extract(folders[0], folders[1])
    with pytest.raises(MaskMismatchError, match="compared in"):
        combine([masks[0], other_dtype], "union")


def test_combine_refuses_masks_of_different_tensors_and_bad_arguments() -> None:
    masks = [make(0), make(1)]
    for other in (SubnetMask.from_dense({"a": random_bits(5, 0.5)}), SubnetMask.full({**SHAPES, "b": (8,)})):
        with pytest.raises(MaskMismatchError):
            combine([*masks, other], "union")
    for rule, at_least, count, message in (
        ("most", None, 2, "`most` is not a rule .* union, intersection, majority, difference"),
        ("union", None, 1, "at least 2 masks, got 1"),
        ("union", 2, 2, "`at_least` is for the rule `majority`, got 2 with `union`"),
        ("majority", 0, 2, "from 1 to the number of masks, 2, got 0"),
        ("majority", 3, 2, "from 1 to the number of masks, 2, got 3"),
    ):
        with pytest.raises(MaskError, match=message):
            combine(masks[:count], rule, at_least=at_least)


def test_combine_needs_the_base_of_one_mask_only() -> None:
    record = ModelRecord("base", None, dict.fromkeys(SHAPES, "bfloat16"), dict.fromkeys(SHAPES, "0" * 32))
    masks = [make(0), make(1, Provenance(base=record, compare_dtype="bfloat16")), make(2)]
    combined = combine(masks, "union")
    assert (combined.provenance.base, combined.provenance.compare_dtype) == (record, "bfloat16")
