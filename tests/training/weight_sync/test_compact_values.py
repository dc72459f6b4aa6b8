"""Compact values of a model, whole or sharded by FSDP2."""

from __future__ import annotations

from typing import Any

import torch
from helpers import same_bits
from training.weight_sync.small_syncs import FROZEN, mask_of, mixed_model, tensors_of

from subnet_ft.masks import format_fingerprint
from subnet_ft.training.weight_sync.compact_values import CompactValues, record_fingerprints
from subnet_kernels import fingerprint


def test_take_copies_the_values_of_trained_tensors() -> None:
    model = mixed_model()
    mask, tensors = mask_of(model), tensors_of(model)
    values = CompactValues(mask)
    for _ in range(2):
        found = values.take(tensors)
        assert FROZEN not in found
        assert all(same_bits(found[name], tensors[name][mask[name]]) for name in found)
        assert sum(tensor.numel() for tensor in found.values()) == mask.num_trainable
        with torch.no_grad():
            tensors["0.weight"].neg_()


def test_record_fingerprints_are_those_of_the_tensors() -> None:
    tensors = tensors_of(mixed_model())
    expected = {name: format_fingerprint(fingerprint(tensor)) for name, tensor in tensors.items()}
    assert record_fingerprints(tensors) == expected


def test_sharded_parameters_give_the_messages_of_whole_ones(ranks: list[dict[str, Any]]) -> None:
    """FSDP2 over two processes, a tensor of fewer rows than processes and uneven parts among them."""
    for rank in ranks:
        assert rank["sharded"] == rank["whole"]
    assert ranks[0]["whole"] == ranks[1]["whole"]


def test_sharded_parameters_are_never_gathered_dense(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["gathered"] < 0.5 * rank["dense"]
