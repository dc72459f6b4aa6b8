"""`export_delta` from two checkpoints, and `masked_delta` from weights in memory: nothing is left out in silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from delta_checkpoints import contents, save_pair, unchanged
from delta_checkpoints import weights as weights_in
from deltas.random_deltas import Weights, record_of, tuned_weights, weights_of
from helpers import random_mask, same_bits, small_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import subnet_kernels
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.deltas import Delta, apply_delta, export_delta, masked_delta, verify_delta
from subnet_ft.deltas.applied import applied
from subnet_ft.deltas.journal import Journal, write_journal
from subnet_ft.errors import CheckpointError, DeltaError, DeltaFileError, DeltaMismatchError, MaskMismatchError
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


def test_masked_delta_refuses_fingerprints_that_are_missing_or_of_another_base() -> None:
    model, mask, frozen = masked_run()
    tuned = tuned_weights(model, mask, 3)
    less = {name: sums for name, sums in frozen.items() if name != "0.bias"}
    with pytest.raises(DeltaMismatchError, match=r"`frozen` has no fingerprint of `0\.bias`, so"):
        masked_delta(tuned.items(), mask, frozen=less)
    base = mask.provenance.base
    assert base is not None
    for field, what in (("fingerprints", "fingerprint"), ("dtypes", "dtype")):
        known = {name: value for name, value in getattr(base, field).items() if name != "2.bias"}
        partly = SubnetMask(mask.tensors, Provenance(base=replace(base, **{field: known})))
        with pytest.raises(DeltaMismatchError, match=rf"mask's base has no {what} of `2\.bias`, so"):
            masked_delta(tuned.items(), partly, frozen=frozen)
    other = dict(weights_of(model)) | {"2.bias": torch.ones(5).bfloat16()}
    assert not mask.tensors["2.bias"].count
    with pytest.raises(DeltaMismatchError, match=r"`2\.bias` is not that of the mask's base"):
        masked_delta(other.items(), mask, frozen=frozen_of(other, mask))


def rewritten(folder: Path, change: Callable[[Weights], Weights]) -> Path:
    """Save the weights of a folder again, changed; one file."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_export_takes_other_shards_and_a_copy_of_a_tied_weight(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
    tuned, same = (save_tiny("llama", tmp_path / name, dtype=torch.bfloat16, seed=1) for name in ("tuned", "same"))
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors").unlink()
    rewritten(same, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    first = export_delta(base, tuned, tmp_path / f"1{SUFFIX}")
    second = export_delta(base, same, tmp_path / f"2{SUFFIX}")
    assert {name: entry.result for name, entry in first.entries.items()} == {
        name: entry.result for name, entry in second.entries.items()
    }
    assert verify_delta(base, second, apply_delta(base, second, tmp_path / "out")).is_fine
    assert verify_delta(base, second, tuned).is_fine
    assert verify_delta(base, second, same).is_fine
    back = export_delta(same, base, tmp_path / f"3{SUFFIX}")
    assert verify_delta(same, back, base).is_fine
    out = apply_delta(same, back, tmp_path / "back")
    found = load_file(out / "model.safetensors")
    assert same_bits(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_export_of_a_merged_lora_is_the_delta_of_a_full_run(tmp_path: Path) -> None:
    base = save_tiny("qwen2", tmp_path / "base", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    delta = export_delta(base, tmp_path / "merged", tmp_path / f"d{SUFFIX}")
    changed = {name for name, entry in delta.entries.items() if entry.count}
    assert changed == {name for name in delta.entries if "q_proj.weight" in name or "down_proj.weight" in name}
    assert weights_in(apply_delta(base, delta, tmp_path / "out")) == weights_in(tmp_path / "merged")


def test_export_keeps_the_payload_of_nan_and_the_sign_of_zero(tmp_path: Path) -> None:
    base, tuned = (save_tiny("llama", tmp_path / name, dtype=torch.bfloat16) for name in ("base", "tuned"))
    key = "model.norm.weight"
    patterns = torch.tensor([0x7FC0, 0x7FC1, 0x7F81, 0x0000, 0x7F80], dtype=torch.int16).view(torch.bfloat16)

    def put(tensors: Weights, values: torch.Tensor) -> Weights:
        tensors[key][: values.numel()] = values
        return tensors

    other = torch.tensor([0x7FC1, -0x0040, -0x007F, -0x8000, -0x0080], dtype=torch.int16).view(torch.bfloat16)
    rewritten(base, lambda tensors: put(tensors, patterns))
    rewritten(tuned, lambda tensors: put(tensors, other))
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    assert {name: entry.count for name, entry in delta.entries.items() if entry.count} == {key: 5}
    assert weights_in(apply_delta(base, delta, tmp_path / "out")) == weights_in(tuned)


def test_export_refuses_a_buffer_that_would_be_lost(tmp_path: Path) -> None:
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    base, tuned = (save_tiny("deepseek_v3", tmp_path / name) for name in ("base", "tuned"))
    path = tmp_path / f"d{SUFFIX}"
    assert export_delta(base, tuned, path).entries  # equal buffers, and none
    rewritten(tuned, lambda tensors: tensors | {key: tensors[key] + 1})
    for left, right in ((base, tuned), (tuned, base)):
        with (
            unchanged(tmp_path),
            pytest.raises(DeltaMismatchError, match=f"`{key}`, a buffer, differs between the base"),
        ):
            export_delta(left, right, path)
    rewritten(base, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key})
    with (
        unchanged(tmp_path),
        pytest.raises(DeltaMismatchError, match=rf"`{key}`, a buffer, is in .* and not in the base"),
    ):
        export_delta(base, tuned, path)
    assert export_delta(tuned, base, path).entries  # `apply` keeps the base's


def test_export_compares_leftovers_of_any_dtype(tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    base, tuned = (save_tiny("llama", tmp_path / name) for name in ("base", "tuned"))
    for folder in (base, tuned):
        rewritten(folder, lambda tensors: tensors | {key: torch.arange(4)})
    path = tmp_path / f"d{SUFFIX}"
    assert export_delta(base, tuned, path).entries
    rewritten(tuned, lambda tensors: tensors | {key: torch.arange(1, 5)})
    with pytest.raises(DeltaMismatchError, match="not used by this architecture, differs"):
        export_delta(base, tuned, path)
    rewritten(base, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key})
    assert export_delta(base, tuned, path).entries  # what old releases wrote and new ones drop


def test_export_refuses_a_folder_that_is_half_changed(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path)
    journal = Journal("apply", "replacing", "", f".undo-001{SUFFIX}", [])
    write_journal(tuned, journal)
    for left, right in ((base, tuned), (tuned, base)):
        with pytest.raises(CheckpointError, match="some of its weights are old"):
            export_delta(left, right, tmp_path / f"d{SUFFIX}")
    write_journal(tuned, replace(journal, phase="preparing"))
    assert export_delta(base, tuned, tmp_path / f"d{SUFFIX}").entries


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
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(tmp_path / "bigger")
    path = tmp_path / f"d{SUFFIX}"
    with unchanged(tmp_path):
        for left, right, message in (
            (base, other, "different parameters"),
            (base, half, r"is bfloat16 in the base .* dtype=torch.bfloat16\)`, save it"),
            (base, tmp_path / "bigger", r"has shape \(\d+, \d+\) in the base .* and \(\d+, \d+\) in"),
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
