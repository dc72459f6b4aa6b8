"""Deltas on the tensors of a checkpoint: pieces of any size, chains, what changes them back, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from delta_checkpoints import DTYPES, change, random_case, record, save_pair
from helpers import same_bits
from safetensors.torch import load_file, save_file

import subnet_kernels
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.deltas import Delta, TensorDelta, export_delta
from subnet_ft.deltas.header import TensorEntry
from subnet_ft.deltas.patching import Patch, TensorPatch, added, joined
from subnet_ft.errors import DeltaError, DeltaMismatchError

SUFFIX = ".delta.safetensors"
NAME = "w"


def step(before: torch.Tensor, after: torch.Tensor) -> Delta:
    """Return the delta between two states of one tensor."""
    bits, _ = subnet_kernels.changed_bits(before.view(-1), after.view(-1))
    chosen = subnet_kernels.unpack_bits(bits, before.numel()).view(before.shape)
    tensor = TensorDelta.build(bits, after[chosen], tuple(before.shape))
    return Delta({NAME: tensor}, record({NAME: before}), record({NAME: after}).fingerprints)


def chain(shape: tuple[int, ...], dtype: torch.dtype, densities: tuple[float, ...]) -> list[torch.Tensor]:
    """Return a tensor and what becomes of it, one state after another."""
    generator = torch.Generator().manual_seed(len(shape))
    found = [change(torch.zeros(shape, dtype=dtype), 1.0, generator)]
    for density in densities:
        found.append(change(found[-1], density, generator))
    return found


def run(patch: TensorPatch, tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Apply a patch to a copy of a tensor, in pieces."""
    flat = tensor.clone().view(-1)
    for start in range(0, flat.numel(), size):
        patch.apply(flat[start : start + size], start)
    return flat.view(tensor.shape)


@pytest.mark.parametrize("size", [8, 24, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("densities", [(0.3,), (0.0,), (1.0,), (0.0, 0.2), (0.2, 0.0), (0.3, 0.1, 0.6), (0.0, 0.0)])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 13), (0, 3)])
def test_tensor_patch_gives_the_end_of_a_chain_and_what_changes_it_back(
    shape: tuple[int, ...], densities: tuple[float, ...], dtype: torch.dtype, size: int
) -> None:
    tensors = chain(shape, dtype, densities)
    deltas = [step(before, after) for before, after in itertools.pairwise(tensors)]
    patch = TensorPatch(NAME, deltas, keep=True)
    assert same_bits(run(patch, tensors[0], size), tensors[-1])
    assert patch.problem() is None
    entry, back = patch.replaced()
    assert (entry.base, entry.result) == (deltas[-1].result[NAME], deltas[0].base.fingerprints[NAME])
    assert (entry.shape, entry.dtype, entry.count) == (shape, deltas[0].base.dtypes[NAME], back.count)
    flat = tensors[-1].clone().view(-1)
    assert back.write(flat, 0, 0) == back.count
    assert same_bits(flat.view(shape), tensors[0])
    plain = TensorPatch(NAME, deltas)
    assert same_bits(run(plain, tensors[0], size), tensors[-1])
    assert plain.problem() is None


def test_tensor_patch_says_what_is_wrong_and_with_which_weights() -> None:
    before, after, last = chain((5, 13), torch.bfloat16, (0.3, 0.2))
    first, second = step(before, after), step(after, last)
    for position in (0, 31, 64):
        other = before.clone()
        other.view(torch.int16).view(-1)[position] ^= 1
        patch = TensorPatch(NAME, [first, second])
        run(patch, other, 16)
        problem = patch.problem()
        assert isinstance(problem, DeltaMismatchError)
        assert "are not those that the delta was made for (`a base`)" in str(problem)
        assert "Apply it to that base" in str(problem)
    patch = TensorPatch(NAME, [first])
    run(patch, after, 16)
    assert "it has been applied already" in str(patch.problem())
    damaged = replace(second, result={NAME: "0" * 32})
    for deltas in ([damaged], [replace(first, result={NAME: "0" * 32}), second]):
        patch = TensorPatch(NAME, deltas)
        run(patch, after if deltas[0] is damaged else before, 16)
        problem = patch.problem()
        assert type(problem) is DeltaError
        assert f"expected {'0' * 32}. It is damaged" in str(problem)


def test_added_is_the_fingerprint_of_both_parts() -> None:
    whole = torch.arange(100).bfloat16()
    parts = [subnet_kernels.fingerprint(whole[start : start + 40], offset=start) for start in (0, 40, 80)]
    assert added(added(parts[0], parts[1]), parts[2]) == subnet_kernels.fingerprint(whole)
    assert added((2**64 - 1, 5), (2, 2**64 - 5)) == (1, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_joined_gives_what_cat_gives(dtype: torch.dtype) -> None:
    whole = chain((17,), dtype, (1.0,))[1]
    for cuts in ((), (0,), (17,), (1,), (5, 5, 9), (0, 0, 17, 17)):
        parts = [whole[start:end] for start, end in zip((0, *cuts), (*cuts, 17), strict=True)]
        assert same_bits(joined(parts), whole)
    empty = [whole[:0], whole[:0]]
    for count in (1, 2):
        assert joined(empty[:count]).dtype == dtype
        assert joined(empty[:count]).shape == (0,)


def test_patch_refuses_other_models_and_broken_chains(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path)
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    back = export_delta(tuned, base, tmp_path / f"b{SUFFIX}")
    assert Patch(open_checkpoint(base), [delta, back, delta]).changed_files() == [base / "model.safetensors"]
    with pytest.raises(DeltaMismatchError, match="Delta 2 does not belong to the result of delta 1"):
        Patch(open_checkpoint(base), [delta, delta])
    for other, message in (
        (save_tiny("qwen2", tmp_path / "qwen2"), "different parameters"),
        (save_tiny("llama", tmp_path / "half", dtype=torch.float16), "is bfloat16 in the delta"),
    ):
        with pytest.raises(DeltaMismatchError, match=message):
            Patch(open_checkpoint(other), [delta])


def written(patch: Patch, replaced: dict[str, tuple[TensorEntry, TensorDelta]] | None = None) -> dict[str, bytes]:
    """Run a patch and return the bytes that it passes on, by name on disk; each byte is passed on once."""
    found: dict[str, bytearray] = {}

    def write(key: str, offset: int, data: torch.Tensor) -> None:
        assert data.dtype == torch.uint8
        kept = found.setdefault(key, bytearray())
        assert offset == len(kept)
        kept += data.numpy().tobytes()
        data.zero_()  # it is the reader's, and overwritten sooner or later

    def keep(name: str, entry: TensorEntry, tensor: TensorDelta) -> None:
        assert replaced is not None
        replaced[name] = (entry, tensor)

    patch.run(write, None if replaced is None else keep)
    return {key: bytes(data) for key, data in found.items()}


def stored(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor of a folder by its name on disk."""
    return {
        key: tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        for file in folder.glob("*.safetensors")
        for key, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox"])
def test_patch_passes_on_the_tuned_bytes_of_every_tensor_once(family: str, tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, family, shard="20KB")
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    replaced: dict[str, tuple[TensorEntry, TensorDelta]] = {}
    checkpoint = open_checkpoint(base)
    assert written(Patch(checkpoint, [delta]), replaced) == stored(tuned)
    assert list(replaced) == list(checkpoint.specs)
    tensors = {name: tensor for name, (_, tensor) in replaced.items()}
    undo = Delta(
        tensors,
        record(dict(open_checkpoint(tuned).tensors())),
        {name: entry.result for name, (entry, _) in replaced.items()},
    )
    assert written(Patch(open_checkpoint(tuned), [undo])) == stored(base)


def test_patch_changes_copies_of_tied_weights_and_names_their_files(tmp_path: Path) -> None:
    base, tuned = (
        save_tiny("llama", tmp_path / name, dtype=torch.bfloat16, seed=seed) for seed, name in enumerate("bt")
    )
    for folder in (base, tuned):
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
        embedding = {"model.embed_tokens.weight": weights.pop("model.embed_tokens.weight")}
        files = {"1.safetensors": weights, "2.safetensors": embedding, "3.safetensors": head}
        for name, tensors in files.items():
            save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map = {key: name for name, tensors in files.items() for key in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    assert "lm_head.weight" not in delta.entries
    assert written(Patch(open_checkpoint(base), [delta])) == stored(tuned)
    shutil.copy(base / "1.safetensors", tuned / "1.safetensors")
    embedding = export_delta(base, tuned, tmp_path / f"e{SUFFIX}")
    assert [name for name, entry in embedding.entries.items() if entry.count] == ["model.embed_tokens.weight"]
    changed = Patch(open_checkpoint(base), [embedding]).changed_files()
    assert changed == [base / "2.safetensors", base / "3.safetensors"]


def test_changed_files_are_those_with_new_values(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, density=0.0, shard="20KB")
    assert len(list(base.glob("*.safetensors"))) == 3
    nothing = export_delta(base, tuned, tmp_path / f"n{SUFFIX}")
    assert Patch(open_checkpoint(base), [nothing]).changed_files() == []
    file = sorted(tuned.glob("*.safetensors"))[1]
    weights = load_file(file)
    key = sorted(weights)[0]
    weights[key].view(-1)[3] += 1
    save_file(weights, file, metadata={"format": "pt"})
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    patch = Patch(open_checkpoint(base), [nothing, delta])
    assert patch.changed_files() == [base / file.name]


def test_patch_raises_for_the_first_tensor_of_another_base(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path)
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    other = save_pair(tmp_path / "2", seed=2)[1]
    with pytest.raises(DeltaMismatchError, match=r"The weights of `model\.embed_tokens\.weight` are not those"):
        written(Patch(open_checkpoint(other), [delta]))


def test_random_cases_are_patched_in_pieces_of_eight() -> None:
    changed = 0
    for seed in range(60):
        base, tuned, delta = random_case(seed)
        for name, weight in base.items():
            patch = TensorPatch(name, [delta], keep=True)
            assert same_bits(run(patch, weight, 8), tuned[name])
            assert patch.problem() is None
            changed += patch.replaced()[0].count
    assert changed > 500
