"""Whether deltas and models fit each other, by their headers: names, shapes, dtypes, chains, one base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from delta_checkpoints import random_case, record, save_pair, unchanged

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.deltas import Delta, DeltaFile, TensorDelta, apply_delta, export_delta, verify_delta
from subnet_ft.deltas.checks import (
    base_digest,
    check_chain,
    check_fits,
    check_one_base,
    model_digest,
    open_deltas,
    result_digest,
)
from subnet_ft.errors import DeltaError, DeltaMismatchError

SUFFIX = ".delta.safetensors"


def step(before: torch.Tensor, after: torch.Tensor, name: str = "w") -> Delta:
    """Return the delta that gives every weight of one tensor a new value."""
    bits = torch.full(((before.numel() + 7) // 8,), 255, dtype=torch.uint8)
    tensor = TensorDelta(bits, after.view(-1), tuple(before.shape))
    return Delta({name: tensor}, record({name: before}), record({name: after}).fingerprints)


A, B, C = (torch.full((8,), float(value)) for value in range(3))


def test_check_chain_takes_the_order_in_which_deltas_were_made_and_no_other() -> None:
    check_chain([step(A, B), step(B, C), step(C, A)])
    check_chain([step(A, B)])
    for chain, which in (
        ([step(B, C), step(A, B)], "Delta 2 does not belong to the result of delta 1"),
        ([step(A, B), step(A, C)], "Delta 2 does not"),
        ([step(A, B), step(A, B)], "Delta 2 does not"),
        ([step(A, B), step(B, C), step(B, A)], "Delta 3 does not belong to the result of delta 2"),
    ):
        with pytest.raises(DeltaMismatchError, match=which):
            check_chain(chain)
    with pytest.raises(DeltaMismatchError, match=r"`w` has shape \(8,\) in delta 1 and \(2, 4\) in delta 2"):
        check_chain([step(A, B), step(B.view(2, 4), C.view(2, 4))])
    with pytest.raises(DeltaMismatchError, match="`w` only in the former, `v` only in the latter"):
        check_chain([step(A, B), step(B, C, "v")])
    with pytest.raises(DeltaMismatchError, match="is float32 in delta 1 and bfloat16 in delta 2"):
        check_chain([step(A, B), step(B.bfloat16(), C.bfloat16())])


def test_check_one_base_compares_every_fingerprint() -> None:
    check_one_base(step(A, B), step(A, C))
    with pytest.raises(DeltaMismatchError, match=r"different bases.*Only deltas of one base"):
        check_one_base(step(A, B), step(B, C))


def test_digests_name_the_weights_whatever_their_order() -> None:
    assert base_digest(step(A, B)) == base_digest(step(A, C)) == result_digest(step(B, A))
    assert base_digest(step(A, B)) != base_digest(step(B, A))
    assert model_digest({"a": "0", "b": "1"}) == model_digest({"b": "1", "a": "0"})
    assert len({model_digest(names) for names in ({"a": "0", "b": "1"}, {"a": "1", "b": "0"}, {"a": "0"}, {})}) == 4
    assert model_digest({"\ud800": "0"}) != model_digest({"\ud801": "0"})


def test_open_deltas_takes_one_or_several_and_not_none(tmp_path: Path) -> None:
    delta = random_case(1)[2]
    path = delta.save(tmp_path / f"d{SUFFIX}")
    with unchanged(tmp_path):
        assert open_deltas(delta) == [delta]
        assert [type(found) for found in open_deltas([path, str(path), delta])] == [DeltaFile, DeltaFile, Delta]
        with pytest.raises(DeltaError, match="No delta was given"):
            open_deltas([])


def test_check_fits_names_the_first_difference(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path)
    delta = Delta.load(export_delta(base, tuned, tmp_path / f"d{SUFFIX}").path)
    check_fits(delta, open_checkpoint(base))
    for other, message in (
        (save_tiny("qwen2", tmp_path / "qwen2"), "have different parameters"),
        (save_tiny("llama", tmp_path / "half", dtype=torch.float16), "is bfloat16 in the delta and float16 in"),
    ):
        with unchanged(tmp_path), pytest.raises(DeltaMismatchError, match=message):
            check_fits(delta, open_checkpoint(other))


def test_chains_on_disk_in_the_wrong_order_or_on_the_wrong_base_write_nothing(tmp_path: Path) -> None:
    first, second = save_pair(tmp_path / "1", seed=1)
    third = save_pair(tmp_path / "2", seed=2)[1]
    one, two = (tmp_path / f"{number}{SUFFIX}" for number in (1, 2))
    export_delta(first, second, one)
    export_delta(second, third, two)
    assert verify_delta(first, [one, two], third).is_fine
    with unchanged(tmp_path):
        for base, chain, message in (
            (first, [two, one], "does not belong to the result"),
            (first, [one, one], "does not belong to the result"),
            (first, [two], "not those that the delta was made for"),
            (second, [one, two], "it has been applied already"),
            (third, [one, two], "not those that the delta was made for"),
        ):
            for settings in ({"output": tmp_path / "out"}, {"in_place": True}):
                with pytest.raises(DeltaMismatchError, match=message):
                    apply_delta(base, chain, **settings)


def test_a_delta_whose_names_are_paths_fits_no_checkpoint_and_writes_nothing(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path)
    delta = Delta.load(export_delta(base, tuned, tmp_path / f"d{SUFFIX}").path)
    renamed = {name: f"../../{name}" if name == "model.norm.weight" else name for name in delta.tensors}
    hostile = Delta(
        {renamed[name]: tensor for name, tensor in delta.tensors.items()},
        replace(
            delta.base,
            dtypes={renamed[name]: value for name, value in delta.base.dtypes.items()},
            fingerprints={renamed[name]: value for name, value in delta.base.fingerprints.items()},
        ),
        {renamed[name]: value for name, value in delta.result.items()},
    )
    path = hostile.save(tmp_path / f"h{SUFFIX}")
    for settings in ({"output": tmp_path / "a" / "out"}, {"in_place": True}):
        with unchanged(tmp_path), pytest.raises(DeltaMismatchError, match=r"`\.\./\.\./model\.norm\.weight` only in"):
            apply_delta(base, path, **settings)


def test_open_deltas_gives_each_file_the_mask_that_it_refers_to(tmp_path: Path) -> None:
    cases = [random_case(seed)[2] for seed in range(60)]
    one, two, own = [case for case in cases if case.num_values > 3][:3]
    paths = [
        one.save(tmp_path / f"1{SUFFIX}", mask=one.mask),
        own.save(tmp_path / f"3{SUFFIX}"),
        two.save(tmp_path / f"2{SUFFIX}", mask=two.mask),
    ]
    opened = open_deltas(paths, [two.mask, one.mask])
    for found, expected in zip(opened, (one, own, two), strict=True):
        assert isinstance(found, DeltaFile)
        assert found.delta().mask == expected.mask
    waiting = DeltaFile(paths[0])
    (found,) = open_deltas(waiting, one.mask)
    assert isinstance(found, DeltaFile)
    assert found.has_positions
    assert not waiting.has_positions
    assert open_deltas([found, own], None) == [found, own]
    assert open_deltas([found, own], one.mask) == [found, own]  # it has the mask already
    for deltas, masks, message in (
        (paths, [one.mask], f"needs the mask with the fingerprint {two.mask.fingerprint}"),
        (paths[0], [two.mask], f"needs the mask with the fingerprint {one.mask.fingerprint}"),
        (paths[:2], [two.mask, one.mask], f"No delta refers to the mask with the fingerprint {two.mask.fingerprint}"),
        (paths[1], one.mask, "has its own positions. Leave out the mask"),
        (own, one.mask, "has its own positions. Leave out the mask"),
    ):
        with pytest.raises(DeltaMismatchError, match=message):
            open_deltas(deltas, masks)
