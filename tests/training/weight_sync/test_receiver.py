"""The receiver: all of an update or nothing of it, and never other weights than the trainer's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
from helpers import random_mask, same_bits, small_model
from training.weight_sync.small_syncs import FROZEN, Pair, mask_of, mixed_model, tensors_of, train

from subnet_ft.errors import WeightSyncError
from subnet_ft.masks import ModelRecord
from subnet_ft.training.weight_sync import Opening, ValuesReceiver, ValuesSender, ValuesUpdate

Tensors = Mapping[str, torch.Tensor]
LAST = "2.weight"
"""The last trained tensor: all others are in place when it is verified."""


class Engine:
    """An engine with tensors of its own, loaded by name; the calls that are told to fail do."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self.loads: list[list[str]] = []
        self.failures = 0

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.loads.append([])
        for name, tensor in weights:
            self.tensors[name].copy_(tensor)
            self.loads[-1].append(name)
            if self.failures:
                self.failures -= 1
                raise RuntimeError(f"out of memory at {name}")


def same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not same_bits(found[name], expected[name])] == []


def with_engine() -> tuple[Pair, Engine]:
    engine = Engine(tensors_of(mixed_model()))
    return Pair(load=engine.load), engine


def test_update_gives_the_policy_bit_for_bit() -> None:
    pair = Pair()
    start = tensors_of(pair.model)
    for step in range(3):
        pair.train(step)
        pair.sender.push(pair.receiver)
        same(pair.receiver.tensors, tensors_of(pair.model))
    for name, tensor in pair.receiver.tensors.items():
        assert same_bits(tensor[~pair.mask[name]], start[name][~pair.mask[name]])


def test_update_writes_into_the_tensors_that_it_was_given() -> None:
    model, engine = mixed_model(), mixed_model()
    sender = ValuesSender(model, mask_of(model))
    train(model, mask_of(model))
    sender.push(ValuesReceiver(dict(engine.named_parameters())))
    same(tensors_of(engine), tensors_of(model))


def test_one_update_serves_several_receivers() -> None:
    pair = Pair()
    other = ValuesReceiver(tensors_of(pair.model))
    other.open(pair.sender.open())
    pair.sender.acknowledge(other.open(Opening(pair.sender.mask)))
    pair.train()
    update = pair.sender.update()
    pair.receiver.update(update)
    other.update(update)
    same(other.tensors, pair.receiver.tensors)


def broken(update: ValuesUpdate, name: str, values: torch.Tensor) -> ValuesUpdate:
    return dataclasses.replace(update, values={**update.values, name: values})


def entry(update: ValuesUpdate, name: str, **fields: object) -> ValuesUpdate:
    changed = dataclasses.replace(update.entries[name], **fields)  # type: ignore[arg-type]
    return dataclasses.replace(update, entries={**update.entries, name: changed})


def without(update: ValuesUpdate, name: str) -> ValuesUpdate:
    return dataclasses.replace(update, values={n: v for n, v in update.values.items() if n != name})


WRONG: dict[str, tuple[Callable[[ValuesUpdate], ValuesUpdate], str]] = {
    "another stream": (lambda u: dataclasses.replace(u, stream="other"), "belongs to stream `other`"),
    "another mask": (lambda u: dataclasses.replace(u, mask="0" * 64), "was made under mask 0000000000000000"),
    "an old version": (lambda u: dataclasses.replace(u, version=1, follows=0), "Version 1, which follows 0, does not"),
    "a version that was not seen": (
        lambda u: dataclasses.replace(u, version=9, follows=8),
        "does not follow version 1",
    ),
    "one value of a tensor": (lambda u: broken(u, LAST, u.values[LAST].flip(0)), f"`{LAST}` has fingerprint"),
    "too few values": (lambda u: broken(u, LAST, u.values[LAST][1:]), f"for `{LAST}`, expected torch.bfloat16"),
    "another dtype": (lambda u: broken(u, LAST, u.values[LAST].float()), f"torch.float32 .* for `{LAST}`"),
    "a tensor that is missing": (lambda u: without(u, LAST), f"differ in the tensor `{LAST}`"),
    "a tensor that is not trained": (
        lambda u: broken(u, FROZEN, torch.zeros(1, dtype=torch.bfloat16)),
        f"differ in the tensor `{FROZEN}`",
    ),
    "another base": (lambda u: entry(u, FROZEN, base="0" * 32), f"The update says of `{FROZEN}`"),
    "another count": (lambda u: entry(u, LAST, count=1), f"The update says of `{LAST}`"),
    "another shape": (lambda u: entry(u, LAST, shape=(85,)), f"The update says of `{LAST}`"),
    "another result": (lambda u: entry(u, LAST, result="0" * 32), f"`{LAST}` has fingerprint"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_update_refuses_and_changes_nothing(wrong: str) -> None:
    pair, engine = with_engine()
    pair.train(0)
    pair.sender.push(pair.receiver)
    before, loads = tensors_of(pair.model), len(engine.loads)
    pair.train(1)
    update = pair.sender.update()
    damage, said = WRONG[wrong]
    with pytest.raises(WeightSyncError, match=said):
        pair.receiver.update(damage(update))
    same(pair.receiver.tensors, before)
    same(engine.tensors, before)
    assert (pair.receiver.version, len(engine.loads)) == (1, loads)
    pair.sender.acknowledge(pair.receiver.update(update))
    same(engine.tensors, tensors_of(pair.model))


def test_update_refuses_weights_that_differ_outside_the_mask() -> None:
    pair = Pair()
    name = "0.weight"
    with torch.no_grad():
        pair.receiver.tensors[name][~pair.mask[name]] *= 2
    before = {n: t.clone() for n, t in pair.receiver.tensors.items()}
    pair.train()
    with pytest.raises(WeightSyncError, match=f"`{name}` has fingerprint"):
        pair.sender.push(pair.receiver)
    same(pair.receiver.tensors, before)
    assert pair.sender.version == 0


def test_update_refuses_a_policy_that_changed_outside_the_mask() -> None:
    pair = Pair()
    with torch.no_grad():
        pair.model.get_parameter("0.weight").mul_(2)
    with pytest.raises(WeightSyncError, match="weights outside the mask differ from the trainer's"):
        pair.sender.push(pair.receiver)


def test_update_needs_an_opening() -> None:
    pair = Pair()
    with pytest.raises(WeightSyncError, match="was not opened"):
        ValuesReceiver(tensors_of(pair.model)).update(pair.sender.update())


def test_open_refuses_another_base_and_changes_nothing() -> None:
    pair = Pair()
    other = tensors_of(pair.model)
    other[FROZEN][0] += 1
    receiver = ValuesReceiver(other)
    with pytest.raises(WeightSyncError, match=f"weights of `{FROZEN}` are not those that the trainer starts from"):
        receiver.open(pair.sender.open())
    assert receiver.version is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {name: w for name, w in t.items() if name != FROZEN}, f"{FROZEN}.* only in the trainer"),
        (lambda t: {**t, "head.weight": torch.zeros(2)}, "head.weight.* only in the engine"),
        (lambda t: {**t, LAST: t[LAST].T.contiguous()}, rf"`{LAST}` is bfloat16 \(17, 5\) in the engine"),
        (lambda t: {**t, LAST: t[LAST].float()}, rf"`{LAST}` is float32 \(5, 17\) in the engine but bfloat16"),
    ],
)
def test_open_refuses_another_model(change: Callable[[Tensors], Tensors], said: str) -> None:
    pair = Pair()
    with pytest.raises(WeightSyncError, match=said):
        ValuesReceiver(change(tensors_of(pair.model))).open(pair.sender.open())


def test_receiver_refuses_tensors_that_are_not_contiguous() -> None:
    with pytest.raises(WeightSyncError, match="`a` is not contiguous"):
        ValuesReceiver({"a": torch.zeros(3, 2).T})


def test_open_takes_back_what_an_earlier_stream_left() -> None:
    pair, engine = with_engine()
    base = tensors_of(mixed_model())
    pair.train()
    pair.sender.push(pair.receiver)
    # Another run starts from the base under another mask.
    model = mixed_model()
    mask = random_mask(model, 0.2, seed=9)
    sender = ValuesSender(model, mask)
    sender.acknowledge(pair.receiver.open(sender.open()))
    same(pair.receiver.tensors, base)
    same(engine.tensors, base)
    train(model, mask)
    sender.push(pair.receiver)
    same(engine.tensors, tensors_of(model))
    with pytest.raises(WeightSyncError, match="the receiver was opened by"):
        pair.sender.push(pair.receiver)


def test_open_of_another_base_leaves_the_version_that_stands() -> None:
    pair = Pair()
    pair.train()
    pair.sender.push(pair.receiver)
    other = ValuesSender(small_model(torch.bfloat16), pair.mask)  # norms in another dtype
    with pytest.raises(WeightSyncError):
        pair.receiver.open(other.open())
    opening = pair.sender.open()
    record = dataclasses.replace(opening.base, fingerprints={**opening.base.fingerprints, FROZEN: "0" * 32})
    assert isinstance(record, ModelRecord)
    opening.mask.provenance.base.fingerprints[FROZEN] = "0" * 32  # type: ignore[union-attr]
    with pytest.raises(WeightSyncError, match=f"`{FROZEN}` are not those"):
        pair.receiver.open(opening)
    assert pair.receiver.version == 1
    same(pair.receiver.tensors, tensors_of(pair.model))


def test_update_hands_the_trained_tensors_whole_to_the_engine() -> None:
    pair, engine = with_engine()
    pair.train()
    pair.sender.push(pair.receiver)
    assert engine.loads == [[name for name in pair.mask.names if name != FROZEN]]
    assert engine.loads[0] == pair.receiver.trained_names
    pair.receiver.reload()
    assert engine.loads[1] == pair.mask.names


def test_update_loads_the_old_weights_back_where_the_engine_fails() -> None:
    pair, engine = with_engine()
    pair.train(0)
    pair.sender.push(pair.receiver)
    before = tensors_of(pair.model)
    pair.train(1)
    engine.failures = 1
    with pytest.raises(WeightSyncError, match=r"could not load version 2: out of memory at 0.weight\. Version 1 was"):
        pair.sender.push(pair.receiver)
    same(engine.tensors, before)
    same(pair.receiver.tensors, before)
    assert pair.sender.version == pair.receiver.version == 1
    pair.sender.push(pair.receiver)
    same(engine.tensors, tensors_of(pair.model))


def test_a_receiver_whose_engine_has_unknown_weights_takes_nothing_but_an_opening() -> None:
    pair, engine = with_engine()
    pair.train(0)
    pair.sender.push(pair.receiver)
    pair.train(1)
    engine.failures = 2
    with pytest.raises(WeightSyncError, match="Nor could it load version 1 back"):
        pair.sender.push(pair.receiver)
    with pytest.raises(WeightSyncError, match="neither the last update nor the weights before it"):
        pair.sender.push(pair.receiver)
    pair.sender.version = None  # so that `push` opens
    pair.sender.push(pair.receiver)
    same(engine.tensors, tensors_of(pair.model))
