"""Bitmaps by step: compared piece by piece, written whole, counted at the memory of one of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from anonymous_memory import measure
from memory_checkpoint import MemoryCheckpoint

from subnet_ft.errors import TrainerError
from subnet_ft.masks import SubnetMask, TensorMask
from subnet_ft.training import snapshots
from subnet_ft.training.snapshots import Counts, Snapshots, Taken, changed_weights, digest_of

Weights = dict[str, torch.Tensor]


def weights(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (9, 13), "vector": (5,), "stack": (2, 3, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def base_of(values: Weights) -> Any:
    return MemoryCheckpoint("a base", values)


def moved(values: Weights, places: dict[str, list[int]]) -> Weights:
    found = {name: value.clone() for name, value in values.items()}
    for name, numbers in places.items():
        found[name].view(-1)[numbers] += 1.0
    return found


def taken(step: int, **changes: Any) -> Taken:
    known: dict[str, Any] = dict.fromkeys(Taken.__dataclass_fields__, 0)
    return Taken(**{**known, "step": step, "every": 1, "base": "", **changes})


def dense(changed: dict[str, TensorMask], name: str) -> list[int]:
    return [int(n) for n in SubnetMask(changed)[name].view(-1).nonzero()]


@pytest.mark.parametrize("piece", [8, 16, 1 << 20])
def test_changed_weights_are_those_with_other_bits(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "_PIECE", piece)
    base = weights()
    base["vector"][0] = 0.0
    live = moved(base, {"matrix": [0, 7, 8, 116], "stack": [23]})
    live["vector"][0] = -0.0
    changed = changed_weights(base_of(base), live)
    assert {name: dense(changed, name) for name in base} == {"matrix": [0, 7, 8, 116], "vector": [0], "stack": [23]}


def test_changed_weights_are_compared_in_the_dtype_of_the_model() -> None:
    stored = weights(dtype=torch.float32)
    live = {name: value.to(torch.bfloat16) for name, value in stored.items()}
    assert sum(tensor.count for tensor in changed_weights(base_of(stored), live).values()) == 0
    assert digest_of(base_of(stored), live) == digest_of(base_of(live), live)


@pytest.mark.parametrize("piece", [8, 1 << 20])
def test_digest_of_tells_bases_apart_and_names_what_differs(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digest_of(base_of(weights()), weights())
    monkeypatch.setattr(snapshots, "_PIECE", piece)
    base = weights()
    digest, other = digest_of(base_of(base), base)
    assert (digest, other) == whole
    assert other is None
    # What the model has become does not count.
    assert digest_of(base_of(base), moved(base, {"vector": [4]})) == (digest, "vector")
    tuned = moved(base, {"stack": [11]})
    assert digest_of(base_of(tuned), tuned)[0] != digest
    as_float = {name: value.float() for name, value in base.items()}
    assert digest_of(base_of(as_float), as_float)[0] != digest


def test_digest_of_refuses_a_base_with_other_tensors() -> None:
    base = weights()
    with pytest.raises(TrainerError, match=r"`a base` is not that of this model: `more` of shape \(2,\) is missing"):
        digest_of(base_of(base), {**base, "more": torch.zeros(2)})
    with pytest.raises(TrainerError, match=r"`vector` of shape \(6,\) is of shape \(5,\) there"):
        digest_of(base_of(base), {**base, "vector": torch.zeros(6)})


def write_all(folder: Path, places: dict[int, dict[str, list[int]]]) -> Snapshots:
    base = weights()
    found = Snapshots(folder)
    for step, changes in places.items():
        found.write(taken(step), changed_weights(base_of(base), moved(base, changes)))
    return found


def test_walk_counts_against_the_snapshot_before_and_the_last_one(tmp_path: Path) -> None:
    found = write_all(
        tmp_path / "new",
        {
            3: {},
            20: {"matrix": [1, 2, 3], "vector": [0]},
            100: {"matrix": [3, 4]},
            101: {"matrix": [1, 3, 9], "stack": [5]},
        },
    )
    assert found.steps() == [3, 20, 100, 101]
    walked = list(found.walk())
    assert [each.step for each, _ in walked] == [3, 20, 100, 101]
    assert [counts for _, counts in walked] == [
        Counts(now=0, now_and_before=0, now_or_before=0, now_and_final=0, ever=0, final=4),
        Counts(now=4, now_and_before=0, now_or_before=4, now_and_final=2, ever=4, final=4),
        Counts(now=2, now_and_before=1, now_or_before=5, now_and_final=1, ever=5, final=4),
        Counts(now=4, now_and_before=1, now_or_before=5, now_and_final=4, ever=7, final=4),
    ]


def test_a_snapshot_comes_back_and_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    found = write_all(tmp_path, {2: {"vector": [1]}})
    found.write(taken(2, num_updates=None, seconds=0.25, base="abc"), changed_weights(base_of(weights()), weights()))
    assert found.taken(2) == taken(2, num_updates=None, seconds=0.25, base="abc")
    assert [counts.now for _, counts in found.walk()] == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002.safetensors"]


def test_keep_removes_other_steps_and_halves(tmp_path: Path) -> None:
    found = write_all(tmp_path, {step: {} for step in (1, 2, 3)})
    (tmp_path / "step-00000002.unfinished").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    found.keep({1, 3, 7})
    assert found.steps() == [1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt", "step-00000001.safetensors", "step-00000003.safetensors",
    ]  # fmt: skip
    found.remove()
    assert not tmp_path.exists()
    assert found.steps() == []
    found.remove()


_COMPARE = """
from pathlib import Path
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.training.snapshots import Snapshots, Taken, changed_weights, digest_of
from safetensors.torch import load_file
base = open_checkpoint(sys.argv[1])
live = load_file(sys.argv[1] + "/model.safetensors")
live["model.embed_tokens.weight"][::100] += 1.0
# What is compiled on first use, and its libraries, do not count.
small = {name: value for name, value in live.items() if value.numel() < 1 << 16}
changed_weights(base, small)
digest_of(base, small)
found = Snapshots(Path(sys.argv[2]))
zeros = {name: 0 for name in Taken.__dataclass_fields__}
with Peak() as peak:
    digest_of(base, live)
    for step in (1, 2, 3):
        changed = changed_weights(base, live)
        found.write(Taken(**{**zeros, "step": step}), changed)
    walked = list(found.walk())
model = sum(value.nbytes for value in live.values()) / 2**20
print(json.dumps({"peak_mb": peak.megabytes, "model_mb": model, "final": walked[0][1].final}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_snapshots_hold_bits_and_no_copy_of_the_model(tmp_path: Path) -> None:
    # 67 million embedding weights are 128 MB in bfloat16, and their bits 8 MB.
    from safetensors.torch import load_file, save_file

    from subnet_ft.checkpoints.tiny import tiny_model

    tiny_model("llama").save_pretrained(tmp_path / "base")
    rows = 1 << 21
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    file = tmp_path / "base" / "model.safetensors"
    embedding = torch.ones(rows, 32, dtype=torch.bfloat16)
    save_file({**load_file(file), "model.embed_tokens.weight": embedding}, file, metadata={"format": "pt"})
    measured = measure(_COMPARE, str(tmp_path / "base"), str(tmp_path / "snapshots"))
    assert measured["final"] == 32 * len(range(0, rows, 100))
    assert measured["model_mb"] > 128
    # Bits of one tensor are joined, written and counted beside those that are held; a piece is 12 MB at most.
    assert measured["peak_mb"] < 60
