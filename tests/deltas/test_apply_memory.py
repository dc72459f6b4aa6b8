"""`apply_delta` on shards of which one is a single large tensor: memory is bounded by the delta of that tensor."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from anonymous_memory import measure
from delta_checkpoints import change
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from subnet_ft.deltas import export_delta

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
    pytest.mark.slow,
]

DENSITY = 0.17
LARGEST = 131072 * 1024
"""Weights of the embedding, more than half of the model."""
_APPLY = """
from subnet_ft.deltas import apply_delta
with Peak() as peak:
    apply_delta(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None, in_place=len(sys.argv) == 3)
print(json.dumps({"mb": peak.megabytes, "seconds": peak.seconds}))
"""


def test_apply_holds_the_delta_of_the_largest_tensor_and_pieces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned, delta = tmp_path / "base", tmp_path / "tuned", tmp_path / "big.delta.safetensors"
    config = LlamaConfig(
        vocab_size=131072,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_hidden_layers=6,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for folder in (base, tuned):
        model.save_pretrained(folder, max_shard_size="60MB")
    generator = torch.Generator().manual_seed(0)
    for file in tuned.glob("*.safetensors"):
        tensors = {name: change(tensor, DENSITY, generator) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    assert len(json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]) > 50
    assert len(list(base.glob("*.safetensors"))) > 3
    export_delta(base, tuned, delta)

    apart = measure(_APPLY, str(base), str(delta), str(tmp_path / "out"))
    in_place = measure(_APPLY, str(base), str(delta))
    with capsys.disabled():
        for name, found in (("apply -o", apart), ("apply --in-place", in_place)):
            print(f"\n  {name}: {found['mb']:.0f} MiB, {found['seconds']:.1f} s", end="")

    one_delta = LARGEST * (1 / 8 + 2 * DENSITY) / 2**20  # bits and new values; the tensor itself is 256 MiB
    assert apart["mb"] < one_delta + 60
    assert in_place["mb"] < 2 * LARGEST / 2**20 + 60
