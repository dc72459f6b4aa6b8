"""Messages of a weight sync: files of the project's formats, of the promised size, that a reader can refuse."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits
from training.weight_sync.small_syncs import FROZEN, Pair

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.deltas.file import DeltaFile
from subnet_ft.errors import WeightSyncError
from subnet_ft.masks import SubnetMask
from subnet_ft.training.weight_sync import Acknowledgement, Opening, ValuesSender, ValuesUpdate
from subnet_ft.training.weight_sync.message import digest


@pytest.fixture
def update() -> ValuesUpdate:
    pair = Pair()
    pair.train()
    with torch.no_grad():
        pair.model.get_parameter("0.weight")[pair.mask["0.weight"]] = torch.tensor([float("nan")], dtype=torch.bfloat16)
    return pair.sender.update()


@pytest.mark.parametrize(
    "way", [lambda u: ValuesUpdate.from_bytes(u.to_bytes()), lambda u: ValuesUpdate.unpack(*u.pack())]
)
def test_update_comes_back_bit_for_bit(way: Callable[[ValuesUpdate], ValuesUpdate], update: ValuesUpdate) -> None:
    found = way(update)
    assert dataclasses.replace(found, values={}) == dataclasses.replace(update, values={})
    assert found.values.keys() == update.values.keys()
    assert all(same_bits(found.values[name], values) for name, values in update.values.items())
    assert {values.dtype for values in found.values.values()} == {torch.bfloat16, torch.float32}


def test_update_is_a_delta_file_that_refers_to_the_mask(tmp_path: Path) -> None:
    pair = Pair()
    pair.train()
    update = pair.sender.update()
    path = tmp_path / "update.delta.safetensors"
    path.write_bytes(update.to_bytes())
    delta = DeltaFile(path, pair.mask).delta()
    assert delta.source == {"kind": "weight_sync", "stream": pair.sender.stream, "version": 1, "follows": 0}
    assert delta.mask == pair.mask
    assert delta.result == {name: entry.result for name, entry in update.entries.items()}
    assert all(same_bits(delta.tensors[name].values, values) for name, values in update.values.items())


def test_opening_is_a_mask_file_that_names_its_stream(tmp_path: Path) -> None:
    pair = Pair()
    opening = pair.sender.open()
    path = tmp_path / "opening.subnet.safetensors"
    path.write_bytes(opening.to_bytes())
    assert SubnetMask.load(path) == pair.mask
    found = Opening.from_bytes(opening.to_bytes())
    assert (found.stream, found.base, found.mask) == (pair.sender.stream, opening.base, pair.mask)


def test_opening_needs_a_stream_and_a_base() -> None:
    pair = Pair()
    with pytest.raises(WeightSyncError, match="records no base"):
        Opening(pair.mask)
    stream = dataclasses.replace(pair.sender.mask.provenance, source={})
    with pytest.raises(WeightSyncError, match="records no stream"):
        Opening(SubnetMask(pair.mask.tensors, stream))


def test_update_takes_two_bytes_per_trained_weight_and_a_header() -> None:
    model = tiny_model("llama")
    mask = random_mask(model, 0.1)
    sender = ValuesSender(model, mask)
    sender.acknowledge(Acknowledgement(sender.open().stream, 0))
    size = len(sender.update().to_bytes())
    header = 400 * len(mask.names) + 1000
    assert 2 * mask.num_trainable < size < 2 * mask.num_trainable + header


def test_update_without_trained_weights_is_whole() -> None:
    model = tiny_model("llama")
    empty = SubnetMask.from_dense(
        {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    )
    sender = ValuesSender(model, empty)
    sender.acknowledge(Acknowledgement(sender.open().stream, 0))
    assert ValuesUpdate.from_bytes(sender.update().to_bytes()).values == {}


def test_update_from_bytes_refuses_every_cut(update: ValuesUpdate) -> None:
    data = update.to_bytes()
    for length in [*range(0, 64), *range(64, len(data), 37), len(data) - 1]:
        with pytest.raises(WeightSyncError):
            ValuesUpdate.from_bytes(data[:length])


def test_update_from_bytes_refuses_flipped_bits(update: ValuesUpdate) -> None:
    data = update.to_bytes()
    draw = random.Random(0)
    for place in draw.sample(range(len(data)), 400):
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        with pytest.raises(WeightSyncError):
            ValuesUpdate.from_bytes(bytes(damaged))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"kind":"weight_sync"', '"kind":"extraction!"', "a delta of kind 'extraction!'"),
        ('"version":1,"follows":0', '"version":-,"follows":0', "not valid JSON"),
        ('"follows":0', '"follows":[]', r"`follows` is \[\]"),
        ('"encoding":"raw"', '"encoding":"zip"', "encoding 'zip'"),
    ],
)
def test_update_unpack_names_what_is_wrong(old: str, new: str, said: str, update: ValuesUpdate) -> None:
    start, payload = update.pack()
    text = start[8:].decode()
    source = old.replace('"', '\\"')
    assert text.count(source) + text.count(old) == 1
    text = text.replace(source, new.replace('"', '\\"')).replace(old, new)
    with pytest.raises(WeightSyncError, match=said):
        ValuesUpdate.unpack(len(text).to_bytes(8, "little") + text.encode(), payload)


def test_opening_from_bytes_refuses_what_is_no_mask_file() -> None:
    data = Pair().sender.open().to_bytes()
    for wrong in (b"", data[:100], b"x" * 100):
        with pytest.raises(WeightSyncError, match="The opening cannot be read"):
            Opening.from_bytes(wrong)


def test_acknowledgement_comes_back_and_refuses_other_fields() -> None:
    answer = Acknowledgement("abc", 7, digest({"a": "0"}))
    assert Acknowledgement.from_fields(answer.to_fields()) == answer
    wrong: list[dict[str, Any]] = [{}, {"version": "7"}, {"version": True}, {"version": -1}]
    for fields in wrong:
        with pytest.raises(WeightSyncError, match="`version` is"):
            Acknowledgement.from_fields(fields)


def test_digest_depends_on_names_and_fingerprints() -> None:
    known = {"a": "0", "b": "1"}
    assert digest(known) == digest(dict(reversed(known.items())))
    assert len({digest(known), digest({"a": "1", "b": "0"}), digest({"a": "0"}), digest({})}) == 4


def test_update_has_an_entry_of_every_tensor(update: ValuesUpdate) -> None:
    assert update.entries[FROZEN].count == 0
    assert FROZEN not in update.values
    assert update.num_values == sum(entry.count for entry in update.entries.values())
