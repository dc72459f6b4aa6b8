"""Control masks: the counts they promise, what they choose, and that they belong to the base."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from helpers import random_bits

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.models import load_model
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.errors import MaskError, MaskMismatchError
from subnet_ft.masks import CONTROLS, Provenance, SubnetMask, control_mask, extract


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


def reordered() -> list[tuple[str, torch.Tensor]]:
    """The weights in another order than the mask's: sources of weights need not know it."""
    return list(reversed(weights().items()))


@pytest.mark.parametrize("kind", CONTROLS)
def test_control_mask_has_the_count_of_every_tensor(kind: str) -> None:
    mask = small_weights_mask()
    if kind == "inverted":
        mask = SubnetMask.from_dense({name: mask[name] for name in mask.names if name != "all"})
    control = control_mask(mask, kind, seed=3, weights=reordered() if kind != "inverted" else None)
    assert {n: t.count for n, t in control.tensors.items()} == {n: t.count for n, t in mask.tensors.items()}
    assert {n: t.shape for n, t in control.tensors.items()} == {n: t.shape for n, t in mask.tensors.items()}
    assert control.names == mask.names
    assert control != mask
    rank = {"rank_share": 1 / 32} if "principal" in kind else {}
    assert control.provenance.source == {"kind": kind, "seed": 3, "of": mask.fingerprint, **rank}


@pytest.mark.parametrize("kind", [kind for kind in CONTROLS if "principal" not in kind])
def test_control_mask_is_reproducible_and_depends_on_the_seed(kind: str) -> None:
    # 40 layers of equal weights: where nothing ranks them, the seed decides.
    dense = {f"layers.{layer}.w": random_bits(100, 0.3, layer) for layer in range(40)}
    mask = SubnetMask.from_dense(dense)
    equal = {name: torch.ones(100, dtype=torch.bfloat16) for name in dense}
    draws = [control_mask(mask, kind, seed=seed, weights=equal.items()).fingerprint for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_controls_of_one_seed_are_drawn_independently() -> None:
    """Controls that share an order of draws would overlap beyond chance, and their runs would look alike."""
    mask = SubnetMask.from_dense({"w": random_bits(100_000, 0.1, 5)})
    equal = {"w": torch.ones(100_000, dtype=torch.bfloat16)}
    drawn = {kind: control_mask(mask, kind, seed=0, weights=equal.items()) for kind in CONTROLS}
    for first, second in itertools.combinations(CONTROLS, 2):
        overlap = (drawn[first] & drawn[second]).num_trainable / mask.num_trainable
        assert overlap == pytest.approx(0.1, abs=0.015), (first, second)


def test_inverted_control_is_outside_the_mask() -> None:
    mask = SubnetMask.from_dense({"a": random_bits(1000, 0.3), "b": random_bits(77, 0.4).view(7, 11)})
    assert mask.tensors["a"].count < 500
    control = control_mask(mask, "inverted", seed=0)
    assert (control & mask).num_trainable == 0
    assert control.num_trainable == mask.num_trainable
    with pytest.raises(MaskError, match=r"612 of the 1,000 weights of `a`, so there are only 388 outside"):
        control_mask(mask | control, "inverted", seed=0)


def test_low_magnitude_control_has_the_smallest_weights() -> None:
    mask = small_weights_mask()
    control = control_mask(mask, "low_magnitude", seed=0, weights=reordered())
    for name, weight in weights().items():
        magnitudes = weight.float().abs().flatten()
        expected = magnitudes.sort().values[: mask.tensors[name].count]
        assert torch.equal(magnitudes[control[name].flatten()].sort().values, expected)


@pytest.mark.parametrize("rank", [None, 3])
def test_principal_controls_have_the_ends_of_the_low_rank_approximation(rank: int | None) -> None:
    mask = small_weights_mask()
    largest = control_mask(mask, "principal", seed=0, weights=reordered(), rank=rank)
    smallest = control_mask(mask, "non_principal", seed=0, weights=reordered(), rank=rank)
    u, s, vh = torch.linalg.svd(weights()["a"].double(), full_matrices=False)
    kept = rank or 1  # 40 / 32
    approximation = ((u[:, :kept] * s[:kept]) @ vh[:kept]).abs().flatten()
    order = approximation.argsort()
    count = mask.tensors["a"].count
    assert set(order[-count:].tolist()) == set(largest["a"].flatten().nonzero().flatten().tolist())
    assert set(order[:count].tolist()) == set(smallest["a"].flatten().nonzero().flatten().tolist())
    vector = weights()["b"].float().abs()
    assert vector[largest["b"]].min() >= vector[~largest["b"]].max()
    source = largest.provenance.source
    assert source.get("rank") == rank
    assert ("rank_share" in source) == (rank is None)


def test_controls_look_at_the_weights_as_the_mask_was_compared(tmp_path: Path) -> None:
    """In float32 the smallest weights differ, in bfloat16 many are equal: the mask belongs to those."""
    generator = torch.Generator().manual_seed(0)
    stored = {"w": 1 + torch.rand(4000, generator=generator)}
    mask = SubnetMask.from_dense(
        {"w": random_bits(4000, 0.1)}, Provenance(compare_dtype="bfloat16", source={"kind": "test"})
    )
    for kind in ("low_magnitude", "magnitude_matched"):
        cast = control_mask(mask, kind, seed=0, weights=[("w", stored["w"].bfloat16())])
        assert control_mask(mask, kind, seed=0, weights=stored.items()) == cast
    draws = {control_mask(mask, "low_magnitude", seed=seed, weights=stored.items()) for seed in (0, 1)}
    assert len(draws) == 2


@pytest.mark.parametrize("kind", CONTROLS)
def test_control_mask_fits_the_base_of_a_mask_that_was_compared_after_a_cast(kind: str, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", dtype=torch.float32)
    model, _ = load_model(base, dtype="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.flatten()[::3] *= 2
    model.save_pretrained(tmp_path / "tuned")
    mask = extract(base, tmp_path / "tuned", dtype="bfloat16")
    control = control_mask(mask, kind, seed=0, weights=open_checkpoint(base).tensors())
    control.check_base(base)
    path = control.save(tmp_path / "control.subnet.safetensors")
    loaded = SubnetMask.load(path, base=base)
    assert (loaded, loaded.provenance) == (control, control.provenance)
    (~control).check_base(base)


def test_control_mask_names_a_bad_kind_and_missing_or_foreign_weights() -> None:
    mask = small_weights_mask()
    with pytest.raises(MaskError, match="`unifrom` is not a control"):
        control_mask(mask, "unifrom", seed=0)
    for kind in ("magnitude_matched", "low_magnitude", "principal", "non_principal"):
        with pytest.raises(MaskError, match=f"`{kind}` needs the base model's weights"):
            control_mask(mask, kind, seed=0)
    with pytest.raises(MaskError, match="No weights were given for `b`"):
        control_mask(mask, "magnitude_matched", seed=0, weights=[("a", weights()["a"])])
    with pytest.raises(MaskMismatchError, match=r"`a` have shape \(20000,\), but the tensor is of shape \(40, 500\)"):
        control_mask(mask, "low_magnitude", seed=0, weights=[("a", weights()["a"].flatten())])
    with pytest.raises(MaskMismatchError, match=r"`c` have shape .* not in the mask"):
        control_mask(mask, "low_magnitude", seed=0, weights=[("c", weights()["a"])])
    with pytest.raises(MaskError, match="`uniform` has no `rank`"):
        control_mask(mask, "uniform", seed=0, rank=3)
    with pytest.raises(MaskError, match="`rank` must be >= 1, got 0"):
        control_mask(mask, "principal", seed=0, weights=weights().items(), rank=0)
    with pytest.raises(MaskError, match="`seed` must be >= 0, got -1"):
        control_mask(mask, "uniform", seed=-1)
