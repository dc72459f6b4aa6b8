"""A range of compact values is saved at its offset and loaded into other ranges."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from subnet_ft.optim.compact_shard import CompactShard


def test_compact_shard_shares_the_storage_and_computes_as_a_plain_tensor() -> None:
    values = torch.arange(3.0)
    shard = CompactShard.of(values, 2, 7)
    assert shard.size() == torch.Size([7])
    assert (shard.start, shard.count, shard.numel()) == (2, 7, 3)
    shard.values.add_(1)
    assert values.tolist() == [1, 2, 3]
    assert type(shard + 1) is torch.Tensor
    assert type(shard.values) is torch.Tensor
    assert repr(shard) == "CompactShard(3 of 7 values from 2 on)"


def test_compact_shard_is_written_at_its_offset_and_not_at_all_where_it_is_empty() -> None:
    (item,) = CompactShard.of(torch.arange(3.0), 2, 7).__create_write_items__("a", None)
    assert item.tensor_data is not None
    assert item.tensor_data.size == torch.Size([7])
    assert item.tensor_data.chunk.offsets == torch.Size([2])
    assert CompactShard.of(torch.empty(0), 5, 7).__create_write_items__("a", None) == []
    with pytest.raises(ValueError, match="`a` begins at 2 in this process"):
        CompactShard.of(torch.arange(3.0), 2, 7).__get_tensor_shard__(MetadataIndex("a", torch.Size([3])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bfloat16])
def test_compact_shards_of_other_ranges_read_what_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = torch.arange(7).to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        writer = HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
        save({"a": CompactShard.of(whole.clone(), 0, 7)}, storage_writer=writer, no_dist=True)
        part = CompactShard.of(torch.zeros(3, dtype=dtype), 3, 7)
        load({"a": part}, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
        assert torch.equal(part.values, whole[3:6])
        other = CompactShard.of(torch.zeros(3, dtype=dtype), 3, 8)
        with pytest.raises(CheckpointException, match="Size mismatch"):
            load({"a": other}, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
