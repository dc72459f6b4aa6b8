"""`export_shira`: PEFT makes the tuned weights out of the adapter bit for bit, or the delta is refused with numbers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from delta_checkpoints import DTYPES
from helpers import same_bits
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.cli import main
from subnet_ft.deltas import export_delta, export_shira
from subnet_ft.errors import DeltaError, DeltaMismatchError

SUFFIX = ".delta.safetensors"
RANK = 3
LAYER = "model.layers.0.self_attn.q_proj.weight"
"""Of 32 × 32: r = 3 are 192 of its 1,024 weights."""

Weights = dict[str, torch.Tensor]
Edit = Callable[[torch.Tensor], torch.Tensor]


def tuned_copy(base: Path, folder: Path, counts: dict[str, int], edit: Edit = lambda weights: weights * 1.25) -> Path:
    """Copy a checkpoint and change that many weights of some tensors, spread over each."""
    shutil.copytree(base, folder)
    stored = load_file(folder / "model.safetensors")
    for name, count in counts.items():
        flat = stored[name].view(-1)
        at = torch.linspace(0, flat.numel() - 1, count).long()
        assert len(set(at.tolist())) == count
        flat[at] = edit(flat[at])
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def linear_counts(base: Path, rank: int = RANK) -> dict[str, int]:
    """Return rank · (in + out) for the projections of the first layer, which have several shapes."""
    stored = load_file(base / "model.safetensors")
    return {
        name: rank * sum(w.shape) for name, w in stored.items() if ".layers.0." in name and name.endswith("proj.weight")
    }


def merged(base: Path, adapter: Path) -> Weights:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    weights: Weights = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return weights


def assert_merges_to(tuned: Path, base: Path, adapter: Path) -> None:
    found = merged(base, adapter)
    expected = load_file(tuned / "model.safetensors")
    assert expected
    for name, weight in expected.items():
        assert same_bits(found[name], weight), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_export_shira_makes_an_adapter_that_peft_merges_to_the_tuned_weights(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save_tiny("llama", tmp_path / "base", dtype=dtype)
    counts = linear_counts(base)
    assert len(set(counts.values())) > 2
    tuned = tuned_copy(base, tmp_path / "tuned", counts)
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    adapter = export_shira(base, delta, tmp_path / "adapter")
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    stored = load_file(adapter / "adapter_model.safetensors")
    assert {t.numel() for key, t in stored.items() if key.endswith("shira_weight")} == set(counts.values())
    assert_merges_to(tuned, base, adapter)


def test_export_shira_gives_the_tuned_forward_without_merging(tmp_path: Path) -> None:
    base = save_tiny("qwen2", tmp_path / "base")
    tuned = tuned_copy(base, tmp_path / "tuned", linear_counts(base))
    adapter = export_shira(base, export_delta(base, tuned, tmp_path / f"d{SUFFIX}"), tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    inputs = torch.arange(20).view(2, 10)
    before = model(inputs).logits
    after = PeftModel.from_pretrained(model, adapter)(inputs).logits
    assert same_bits(after, AutoModelForCausalLM.from_pretrained(tuned, dtype="auto")(inputs).logits)
    assert not torch.equal(after, before)


def test_export_shira_refuses_other_counts_with_both_numbers(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    tuned = tuned_copy(base, tmp_path / "tuned", {**linear_counts(base), LAYER: 150})
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    with pytest.raises(DeltaError, match=rf"in 1 of 7 layers; for r = 3: `{re.escape(LAYER)}` has 150, not 192"):
        export_shira(base, delta, tmp_path / "adapter")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", delta.path.name}


def test_export_shira_fills_up_with_weights_that_keep_their_bits(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    stored[LAYER].view(-1)[:64] = -0.0  # what a difference of 0.0 would change
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    tuned = tuned_copy(base, tmp_path / "tuned", {**linear_counts(base), LAYER: 130}, lambda weights: weights + 0.5)
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    assert_merges_to(tuned, base, export_shira(base, delta, tmp_path / "adapter", pad=True))


def test_export_shira_refuses_more_than_a_layer_holds(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    tuned = tuned_copy(base, tmp_path / "tuned", {LAYER: 1024})
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    assert_merges_to(tuned, base, export_shira(base, delta, tmp_path / "all"))
    key = "model.layers.1.self_attn.k_proj.weight"  # 16 x 32, of which r = 16 would be 768
    tuned = tuned_copy(base, tmp_path / "more", {LAYER: 1024, key: 48})
    delta = export_delta(base, tuned, tmp_path / f"e{SUFFIX}")
    with pytest.raises(DeltaError, match=r"r = 16, and no layer holds as many: .*48 and would need 768 of 512 weights"):
        export_shira(base, delta, tmp_path / "adapter", pad=True)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_export_shira_refuses_what_is_no_linear_layer(name: str, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    tuned = tuned_copy(base, tmp_path / "tuned", {LAYER: 192, name: 8})
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    with pytest.raises(DeltaMismatchError, match=f"linear layers only, and the delta also changes `{re.escape(name)}`"):
        export_shira(base, delta, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("dtype", "edit"),
    [(torch.bfloat16, lambda weights: torch.full_like(weights, -0.0)), (torch.float32, lambda weights: weights * 1e-5)],
)
def test_export_shira_counts_the_sums_that_do_not_round_to_the_tuned_weight(
    dtype: torch.dtype, edit: Edit, tmp_path: Path
) -> None:
    base = save_tiny("llama", tmp_path / "base", dtype=dtype)
    tuned = tuned_copy(base, tmp_path / "tuned", {LAYER: 192}, edit)
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    with pytest.raises(DeltaError, match=rf"of 192 new values are not what the sum rounds to: `{re.escape(LAYER)}`"):
        export_shira(base, delta, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_export_shira_refuses_another_base_a_used_folder_and_an_empty_delta(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    tuned = tuned_copy(base, tmp_path / "tuned", {LAYER: 192})
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    with pytest.raises(DeltaMismatchError, match="Apply it to that base"):
        export_shira(save_tiny("llama", tmp_path / "other", seed=3), delta, tmp_path / "adapter")
    with pytest.raises(DeltaError, match="is already there"):
        export_shira(base, delta, tuned)
    with pytest.raises(DeltaError, match="changes no weight"):
        export_shira(base, export_delta(base, base, tmp_path / f"e{SUFFIX}"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_to_shira_prints_how_to_load_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny("llama", tmp_path / "base")
    tuned = tuned_copy(base, tmp_path / "tuned", {LAYER: 150})
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    command = ["delta", "to-shira", str(base), str(delta.path), "-o", str(tmp_path / "adapter"), "-q"]
    assert main(command) == 2
    assert "has 150, not 192" in capsys.readouterr().err
    assert main([*command, "--pad"]) == 0
    assert "PeftModel.from_pretrained" in capsys.readouterr().out
    assert_merges_to(tuned, base, tmp_path / "adapter")
