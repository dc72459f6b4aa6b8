"""Checkpoints of 7B models: extraction, overlap and structure in memory that does not grow with a tensor.

One layer and the embedding of Qwen2.5-7B in their true sizes, 778 million weights: 1.6 GB a checkpoint.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from anonymous_memory import measure
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
    pytest.mark.slow,
]

PIECE = 1 << 24
MASK_MB = 778e6 / 8 / 2**20
"""One bit for every weight: what a mask holds in memory."""
EMBEDDING_MB = 152064 * 3584 / 8 / 2**20
"""One bit for every weight of the largest tensor."""


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Write config.json of a Qwen2.5-7B with one layer and tied embeddings; return its parameters."""
    config = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_attention_heads=28,
        num_key_value_heads=4,
        num_hidden_layers=1,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def pieces_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from (tensor[start : start + PIECE] for start in range(0, tensor.numel(), PIECE))


def write_pair(base: Path, tuned: Path) -> int:
    """Write two checkpoints in two shards each; return how many weights differ: one in ten, by one step of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    num_changed = 0
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes(base).items():
        shards.setdefault("embedding" if "embed" in name else "layers", {})[name] = shape
    shapes(tuned)
    index: dict[str, str] = {}
    for shard, members in shards.items():
        tensors = {name: torch.empty(math.prod(shape), dtype=torch.bfloat16) for name, shape in members.items()}
        for tensor in tensors.values():
            for piece in pieces_of(tensor):
                piece.copy_(0.02 * torch.randn(piece.numel(), generator=generator))
        index |= dict.fromkeys(members, f"{shard}.safetensors")
        for folder in (base, tuned):
            if folder == tuned:
                for tensor in tensors.values():
                    for piece in pieces_of(tensor.view(torch.int16)):
                        moved = torch.rand(piece.numel(), generator=generator) < 0.1
                        piece += moved
                        num_changed += int(moved.sum())
            stored = {name: tensor.view(members[name]) for name, tensor in tensors.items()}
            save_file(stored, folder / f"{shard}.safetensors", metadata={"format": "pt"})
            description = json.dumps({"metadata": {}, "weight_map": index})
            (folder / "model.safetensors.index.json").write_text(description)
    return num_changed


_EXTRACT = """
from subnet_ft.masks import extract
counts = []
with Peak() as peak:
    mask = extract(*sys.argv[1:3])
counts.append(mask.num_trainable)
mask.save(sys.argv[3])
# A second mask, part of the first: large steps only, so large weights.
mask = extract(*sys.argv[1:3], criterion="absolute", tolerance=5e-5)
counts.append(mask.num_trainable)
mask.save(sys.argv[4])
print(json.dumps({"mb": peak.megabytes, "seconds": peak.seconds, "counts": counts}))
"""
_OVERLAP = """
from dataclasses import asdict
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.evidence.overlap import mask_overlap
from subnet_ft.masks import SubnetMask
with Peak() as peak:
    masks = [SubnetMask.load(path) for path in sys.argv[2:]]
    overlap = mask_overlap(*masks, base=open_checkpoint(sys.argv[1])).overall
print(json.dumps({"mb": peak.megabytes, "seconds": peak.seconds, "overlap": asdict(overlap)}))
"""
_STRUCTURE = """
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.evidence.structure import mask_structure
from subnet_ft.masks import SubnetMask
with Peak() as peak:
    masks = [SubnetMask.load(path) for path in sys.argv[2:]]
    structure = mask_structure(masks[0], config=open_checkpoint(sys.argv[1]).config, control=masks[1])
kind = structure.by_kind["self_attn.q_proj.weight"]
ratios = [kind.rows.variance_ratio, kind.columns.variance_ratio]
print(json.dumps({"mb": peak.megabytes, "seconds": peak.seconds, "heads": kind.heads.num_groups, "ratios": ratios}))
"""


def test_evidence_on_a_7b_layer_stays_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    base.mkdir()
    tuned.mkdir()
    num_changed = write_pair(base, tuned)
    masks = [str(tmp_path / f"{name}.subnet.safetensors") for name in ("exact", "coarse")]

    extraction = measure(_EXTRACT, str(base), str(tuned), *masks)
    overlap = measure(_OVERLAP, str(base), *masks)
    structure = measure(_STRUCTURE, str(base), *masks)
    with capsys.disabled():
        for name, found in (("extract", extraction), ("overlap", overlap), ("structure", structure)):
            print(f"\n  {name}: {found['mb']:.0f} MiB, {found['seconds']:.1f} s", end="")

    assert extraction["counts"][0] == num_changed
    assert overlap["overlap"]["count_first"] == num_changed
    assert overlap["overlap"]["count_both"] == overlap["overlap"]["count_second"] == extraction["counts"][1]
    # Which weights move is random; which of these moves are large is decided by their bins alone.
    assert overlap["overlap"]["magnitude_o2"] == pytest.approx(0.1, abs=1e-3)
    assert structure["heads"] == 28
    assert structure["ratios"] == pytest.approx([1, 1], abs=0.15)

    # The masks at hand, the bits of one tensor while a file is read, and a few pieces; the embedding is 1,040 MiB.
    assert extraction["mb"] < MASK_MB + 60
    assert overlap["mb"] < 2 * MASK_MB + EMBEDDING_MB + 40
    assert structure["mb"] < 2 * MASK_MB + EMBEDDING_MB + 40
