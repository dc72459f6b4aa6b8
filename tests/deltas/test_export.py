"""`export_delta` from two checkpoints, and `masked_delta` from weights in memory: nothing is left out in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from delta_checkpoints import contents, save_pair, unchanged
from delta_checkpoints import weights as weights_in
from deltas.random_deltas import Weights, record_of, tuned_weights, weights_of
from helpers import random_mask, same_bits, small_model

import subnet_kernels
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.deltas import Delta, apply_delta, export_delta, masked_delta
from subnet_ft.deltas.applied import applied
from subnet_ft.errors import DeltaError, DeltaFileError, DeltaMismatchError, MaskMismatchError
from subnet_ft.masks import Provenance, SubnetMask, extract
from subnet_kernels import BitMask

SUFFIX = ".delta.safetensors"
Frozen = dict[str, tuple[int, int]]


def masked_run(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.nn.Module, SubnetMask, Frozen]:
    """Return a model, a mask that belongs to it, and the fingerprints outside the mask at the start of a run."""
    model = small_model(dtype)
    drawn = random_mask(model, 0.3)
    dense = {name: drawn[name] for name in drawn.names} | {"2.bias": torch.zeros(5, dtype=torch.bool)}
    mask = SubnetMask.from_dense(dense)
    mask = SubnetMask(mask.tensors, Provenance(base=record_of(weights_of(model)), source={"kind": "test"}))
    return model, mask, frozen_of(weights_of(model), mask)


def frozen_of(weights: Weights, mask: SubnetMask) -> Frozen:
    """Return the fingerprints of what lies outside the mask."""
    bits = {name: BitMask.from_bits(tensor.full_bits(), tensor.num_elements) for name, tensor in mask.tensors.items()}
    return {name: subnet_kernels.fingerprint(w.view(-1), outside=bits[name]) for name, w in weights.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_masked_delta_takes_exactly_the_mask_and_gives_the_tuned_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model, mask, frozen = masked_run(dtype)
    tuned = tuned_weights(model, mask, 3)
    delta = masked_delta(tuned.items(), mask, frozen=frozen)
    assert delta.mask == mask
    assert delta.tensors["2.bias"].count == 0
    loaded = Delta.load(delta.save(tmp_path / f"d{SUFFIX}", mask=mask), mask)
    with applied(model, loaded):
        assert all(same_bits(weight, tuned[name]) for name, weight in weights_of(model).items())


def test_masked_delta_refuses_a_weight_that_changed_outside_the_mask() -> None:
    model, mask, frozen = masked_run()
    for name in mask.names:
        outside = (~mask[name]).view(-1).nonzero().view(-1)
        assert outside.numel()
        for position in (outside[0], outside[-1]):
            tuned = tuned_weights(model, mask, 3)
            tuned[name].view(torch.int16).view(-1)[position] ^= 1  # the last bit of one weight
            with pytest.raises(DeltaMismatchError, match=f"Weights of `{name}` outside the mask changed"):
                masked_delta(tuned.items(), mask, frozen=frozen)


def test_masked_delta_refuses_other_weights_dtypes_and_masks_without_a_base() -> None:
    model, mask, frozen = masked_run()
    tuned = tuned_weights(model, mask, 3)
    with pytest.raises(MaskMismatchError, match=r"`0\.bias` only in the mask"):
        masked_delta([(name, weight) for name, weight in tuned.items() if name != "0.bias"], mask, frozen=frozen)
    with pytest.raises(MaskMismatchError, match="`extra` only in the model"):
        masked_delta([*tuned.items(), ("extra", torch.zeros(1))], mask, frozen=frozen)
    with pytest.raises(MaskMismatchError, match="has shape"):
        masked_delta((tuned | {"0.bias": torch.zeros(18).bfloat16()}).items(), mask, frozen=frozen)
    in_float = {name: weight.float() for name, weight in weights_of(model).items()}
    with pytest.raises(DeltaError, match=r"`0\.weight` are float32 but its base is bfloat16"):
        masked_delta(in_float.items(), mask, frozen=frozen_of(in_float, mask))
    with pytest.raises(DeltaError, match="does not record its base"):
        masked_delta(tuned.items(), SubnetMask(mask.tensors), frozen=frozen)


def test_export_gives_the_sum_of_what_changed_and_the_tuned_checkpoint_back(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "qwen2", shard="20KB")
    with unchanged(base), unchanged(tuned):
        delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    mask = extract(base, tuned)
    assert delta.delta().mask == mask
    assert sum(entry.count for entry in delta.entries.values()) == mask.num_trainable
    assert weights_in(apply_delta(base, delta, tmp_path / "out")) == weights_in(tuned)
    back = export_delta(tuned, base, tmp_path / f"back{SUFFIX}")
    assert contents(apply_delta(tuned, back, tmp_path / "again")) == contents(base)


def test_export_with_a_mask_stores_all_of_it_and_refuses_what_it_leaves_out(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path)
    mask = extract(base, tuned)
    wider = mask | extract(base, save_pair(tmp_path / "2", seed=2)[1])
    assert wider.num_trainable > mask.num_trainable
    delta = export_delta(base, tuned, tmp_path / f"w{SUFFIX}", mask=wider, mask_reference=True)
    assert sum(entry.count for entry in delta.entries.values()) == wider.num_trainable
    assert weights_in(apply_delta(base, delta, tmp_path / "out")) == weights_in(tuned)
    dense = {name: mask[name].clone() for name in mask.names}
    name = next(name for name in mask.names if mask.tensors[name].count)
    dense[name].view(-1)[int(dense[name].view(-1).nonzero()[0])] = False
    narrower = SubnetMask.from_dense(dense, provenance=mask.provenance)
    with (
        unchanged(tmp_path),
        pytest.raises(DeltaMismatchError, match=rf"1 weights of `{name}` changed outside the mask"),
    ):
        export_delta(base, tuned, tmp_path / f"n{SUFFIX}", mask=narrower)


def test_export_refuses_pairs_that_are_no_base_and_tuned_and_writes_nothing(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path)
    other = save_tiny("qwen2", tmp_path / "qwen2")
    half = save_tiny("llama", tmp_path / "half", dtype=torch.float16)
    path = tmp_path / f"d{SUFFIX}"
    with unchanged(tmp_path):
        for left, right, message in (
            (base, other, "different parameters"),
            (base, half, "is bfloat16 in the base"),
        ):
            with pytest.raises(DeltaMismatchError, match=message):
                export_delta(left, right, path)
        with pytest.raises(DeltaError, match="needs that mask"):
            export_delta(base, tuned, path, mask_reference=True)
        with pytest.raises(DeltaFileError, match="does not end in"):
            export_delta(base, tuned, tmp_path / "d.safetensors")
        with pytest.raises(MaskMismatchError, match="different parameters"):
            export_delta(base, tuned, path, mask=extract(other, other))
        with pytest.raises(MaskMismatchError):
            export_delta(tuned, base, path, mask=extract(base, tuned))
