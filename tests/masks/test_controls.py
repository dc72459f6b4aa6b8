"""Control masks: the counts they promise, and that they are random."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_bits

import subnet_ft.masks.controls as controls
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.errors import MaskError
from subnet_ft.masks import CONTROLS, SubnetMask, control_mask, extract


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(40, 500, generator=generator).bfloat16(),
        "b": torch.randn(333, generator=generator).bfloat16(),
        "none": torch.randn(10, generator=generator).bfloat16(),
        "all": torch.randn(10, generator=generator).bfloat16(),
    }


def small_weights_mask() -> SubnetMask:
    """A mask as bf16 training leaves it: mostly small weights."""
    dense = {
        name: (w.float().abs() < 0.3) & random_bits(w.numel(), 0.7, 5).view(w.shape) for name, w in weights().items()
    }
    dense["none"][:] = False
    dense["all"][:] = True
    return SubnetMask.from_dense(dense)


def bins(weight: torch.Tensor) -> torch.Tensor:
    return (weight.float().view(torch.int32) & 0x7FFFFFFF) >> 20


@pytest.mark.parametrize("kind", ["uniform", "magnitude_matched"])
@pytest.mark.parametrize("tile", [1 << 20, 1000])
def test_control_mask_has_the_count_of_every_tensor(kind: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "_TILE", tile)
    mask = small_weights_mask()
    control = control_mask(mask, kind, seed=3, weights=weights().items())
    assert {n: t.count for n, t in control.tensors.items()} == {n: t.count for n, t in mask.tensors.items()}
    assert control.names == mask.names
    assert control != mask
    assert control.provenance.source == {"kind": kind, "seed": 3, "of": mask.fingerprint}


@pytest.mark.parametrize("tile", [1 << 20, 1000])
def test_magnitude_matched_has_the_count_of_every_bin(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "_TILE", tile)
    mask = small_weights_mask()
    control = control_mask(mask, "magnitude_matched", seed=3, weights=weights().items())
    uniform = control_mask(mask, "uniform", seed=3)
    for name, weight in weights().items():
        counts = [torch.bincount(bins(weight)[m[name]], minlength=2048) for m in (mask, control, uniform)]
        assert torch.equal(counts[0], counts[1])
    assert not torch.equal(counts[0], counts[2]) or mask.tensors[name].count in (0, 10)
    spread = bins(weights()["a"])
    assert not torch.equal(torch.bincount(spread[mask["a"]]), torch.bincount(spread[uniform["a"]]))


def test_control_mask_is_reproducible_and_depends_on_the_seed() -> None:
    mask = small_weights_mask()
    draws = [control_mask(mask, "uniform", seed=seed).fingerprint for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_uniform_control_reaches_every_weight_equally_often() -> None:
    mask = SubnetMask.from_dense({"w": torch.arange(30) < 6})
    hits = torch.zeros(30)
    for seed in range(2000):
        hits += control_mask(mask, "uniform", seed=seed)["w"]
    # Each of 30 counts is binomial(2000, 0.2): standard deviation 17.9; 5 of them is one false alarm in 60,000 runs.
    assert (hits - 400).abs().max() < 5 * 17.9


def test_uniform_control_over_several_tiles_is_not_stratified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "_TILE", 10)
    mask = SubnetMask.from_dense({"w": torch.arange(30) < 6})
    in_first_tile = [int(control_mask(mask, "uniform", seed=seed)["w"][:10].sum()) for seed in range(300)]
    assert {0, 1, 2, 3, 4} <= set(in_first_tile)
    assert abs(sum(in_first_tile) / 300 - 2.0) < 5 * (1.05 / 300**0.5)


@pytest.mark.parametrize("kind", CONTROLS)
def test_control_mask_fits_the_base_of_a_mask_that_was_compared_after_a_cast(kind: str, tmp_path: Path) -> None:
    base, tuned = (save_tiny("llama", tmp_path / str(seed), seed=seed, dtype=torch.float32) for seed in (0, 1))
    mask = extract(base, tuned, dtype="bfloat16")
    control = control_mask(mask, kind, seed=0, weights=open_checkpoint(base).tensors())
    control.check_base(base)
    path = control.save(tmp_path / "control.subnet.safetensors")
    assert SubnetMask.load(path, base=base).provenance == control.provenance
    (~control).check_base(base)


def test_control_mask_names_a_bad_kind_and_missing_weights() -> None:
    mask = small_weights_mask()
    with pytest.raises(MaskError, match="`unifrom` is not a control"):
        control_mask(mask, "unifrom", seed=0)
    with pytest.raises(MaskError, match="needs the base model's weights"):
        control_mask(mask, "magnitude_matched", seed=0)
    with pytest.raises(MaskError, match="No weights were given for `b`"):
        control_mask(mask, "magnitude_matched", seed=0, weights=[("a", weights()["a"])])
