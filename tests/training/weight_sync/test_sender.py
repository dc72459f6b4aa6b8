"""The sender: K values at a time, and a version that nothing but the receiver moves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import random_mask, same_bits, small_model
from training.weight_sync.small_syncs import FROZEN, Pair, mask_of, mixed_model, train

from subnet_ft.errors import MaskMismatchError, WeightSyncError
from subnet_ft.masks import ModelRecord, Provenance, SubnetMask, format_fingerprint
from subnet_ft.training.weight_sync import Acknowledgement, Opening, ValuesSender, ValuesUpdate
from subnet_ft.training.weight_sync.sender import check_covers
from subnet_kernels import fingerprint


class Lossy:
    """A channel that refuses, or loses the answer to, what it is told to."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.refuses = self.loses = False
        self.openings = 0

    def open(self, opening: Opening) -> Acknowledgement:
        self.openings += 1
        return self.pair.receiver.open(opening)

    def update(self, update: ValuesUpdate) -> Acknowledgement:
        if self.refuses:
            raise WeightSyncError("refused")
        answer = self.pair.receiver.update(update)
        if self.loses:
            raise WeightSyncError("no answer")
        return answer


def test_update_holds_the_values_on_the_mask_in_the_stored_dtype() -> None:
    pair = Pair()
    pair.train()
    update = pair.sender.update()
    for name, parameter in pair.model.named_parameters():
        weights = parameter.detach()
        assert update.entries[name].result == format_fingerprint(fingerprint(weights))
        if name != FROZEN:
            assert same_bits(update.values[name], weights[pair.mask[name]])
    assert update.num_values == pair.mask.num_trainable


def test_update_is_a_copy_that_later_steps_leave_alone() -> None:
    pair = Pair()
    update = pair.sender.update()
    before = update.values["0.weight"].clone()
    pair.train()
    assert same_bits(update.values["0.weight"], before)


def test_version_moves_with_acknowledgements_only() -> None:
    pair = Pair()
    versions = []
    for step in range(3):
        pair.train(step)
        update = pair.sender.update()
        versions.append((update.follows, update.version, pair.sender.version))
        pair.sender.acknowledge(pair.receiver.update(update))
    assert versions == [(0, 1, 0), (1, 2, 1), (2, 3, 2)]
    assert pair.sender.version == 3


def test_push_after_a_refusal_follows_what_the_receiver_has() -> None:
    pair = Pair()
    channel = Lossy(pair)
    pair.sender.push(channel)
    channel.refuses = True
    for step in range(2):
        pair.train(step)
        with pytest.raises(WeightSyncError, match="refused"):
            pair.sender.push(channel)
        assert pair.sender.version == pair.receiver.version == 1
    channel.refuses = False
    assert pair.sender.push(channel).version == pair.sender.version == pair.receiver.version == 4
    assert channel.openings == 0, "the receiver was opened before"


def test_push_after_a_lost_answer_makes_it_good() -> None:
    pair = Pair()
    channel = Lossy(pair)
    channel.loses = True
    pair.train(0)
    with pytest.raises(WeightSyncError, match="no answer"):
        pair.sender.push(channel)
    assert (pair.sender.version, pair.receiver.version) == (0, 1)
    channel.loses = False
    pair.train(1)
    pair.sender.push(channel)
    assert pair.sender.version == pair.receiver.version == 2
    for name, parameter in pair.model.named_parameters():
        assert same_bits(pair.receiver.tensors[name], parameter.detach())


def test_acknowledge_takes_a_late_answer_but_none_from_before() -> None:
    pair = Pair()
    first = pair.sender.update()
    pair.train()
    late = pair.receiver.update(first)
    second = pair.sender.update()
    pair.sender.acknowledge(late)
    assert pair.sender.version == 1
    pair.sender.acknowledge(pair.receiver.update(second))
    with pytest.raises(WeightSyncError, match="acknowledges version 1"):
        pair.sender.acknowledge(late)
    assert pair.sender.version == 2


def test_acknowledge_refuses_other_streams_versions_and_weights() -> None:
    pair = Pair()
    pair.train()
    answer = pair.receiver.update(pair.sender.update())
    for wrong, said in (
        (dataclasses.replace(answer, stream="other"), "of stream `other`"),
        (dataclasses.replace(answer, version=2), "acknowledges version 2"),
        (dataclasses.replace(answer, weights="0" * 64), "with other weights than were sent"),
    ):
        with pytest.raises(WeightSyncError, match=said):
            pair.sender.acknowledge(wrong)
        assert pair.sender.version == 0


def test_update_needs_an_opened_receiver() -> None:
    model = mixed_model()
    with pytest.raises(WeightSyncError, match="was not opened"):
        ValuesSender(model, mask_of(model)).update()


def test_base_is_what_the_mask_records() -> None:
    model = small_model(torch.bfloat16)
    sums = {name: format_fingerprint(fingerprint(p.detach())) for name, p in model.named_parameters()}
    record = ModelRecord("my/base", "abc", dict.fromkeys(sums, "bfloat16"), sums)
    mask = SubnetMask(mask_of(model).tensors, Provenance(base=record))
    train(model, mask)  # as when a run goes on from a checkpoint
    assert ValuesSender(model, mask).open().base == record
    with pytest.raises(MaskMismatchError, match="is float32 but the mask was compared in bfloat16"):
        ValuesSender(model.to(torch.float32), mask)


def test_sender_refuses_the_mask_of_another_model() -> None:
    with pytest.raises(MaskMismatchError, match="different parameters"):
        ValuesSender(torch.nn.Linear(3, 3), mask_of(mixed_model()))


def test_check_covers_names_a_tensor_of_a_mask_that_grew() -> None:
    model = mixed_model()
    mask = mask_of(model)
    other = random_mask(model, 0.3, seed=5)
    check_covers(mask | other, other)
    check_covers(mask, mask)
    check_covers(mask, mask & other)
    with pytest.raises(WeightSyncError, match=r"weights of `0\.weight` that the engine was never told of"):
        check_covers(mask, other)
