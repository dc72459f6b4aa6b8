"""The record of a base names every tensor with its dtype and the fingerprint of its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import subnet_kernels
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.masks import format_fingerprint, record_base


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_record_base_has_every_tensor(dtype: str | None, tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("llama", tmp_path / "base", dtype=torch.float32))
    record = record_base(base, dtype=dtype)
    assert record.name == str(tmp_path / "base")
    assert list(record.dtypes) == list(record.fingerprints) == list(base.specs)
    assert set(record.dtypes.values()) == {dtype or "float32"}
    for name, tensor in base.tensors():
        held = tensor if dtype is None else tensor.to(torch.bfloat16)
        assert record.fingerprints[name] == format_fingerprint(subnet_kernels.fingerprint(held))
