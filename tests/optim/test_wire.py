"""Bytes that two processes hand to their process group per step, at density 0.1 and in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, torchrun

SCRIPT = ROOT / "scripts" / "measure_reduction.py"
BFLOAT16 = "torch.bfloat16"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What either process counted."""
    folder: Path = tmp_path_factory.mktemp("wire")
    torchrun(SCRIPT, "--tiny", "--steps", 2, "--output", folder, processes=2)
    return [json.loads((folder / f"reduction-{rank}.json").read_text()) for rank in (0, 1)]


def test_plain_ddp_sends_every_gradient_in_bfloat16(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["plain DDP"]
        assert found["parameters"] > 10_000
        reduced = [size for operation, size, dtype in found["sent"] if (operation, dtype) == ("allreduce", BFLOAT16)]
        assert sum(reduced) == 2 * found["parameters"]
        assert found["bytes"] == 2 * found["parameters"] + found["buffer_bytes"]


def test_compact_gradients_send_four_bytes_per_trained_weight_and_a_flag_per_tensor(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        found = rank["compact"]
        assert found["trainable"] / found["parameters"] == pytest.approx(0.1, rel=0.1)
        flat = 4 * (found["trainable"] + found["tensors"])
        reduced = [(size, dtype) for operation, size, dtype in found["sent"] if operation == "allreduce"]
        assert sorted(reduced) == sorted([(flat, "torch.float32"), (found["kept_bytes"], BFLOAT16)])
        assert found["bytes"] == flat + found["kept_bytes"] + found["buffer_bytes"]


def test_compact_gradients_send_a_quarter_of_plain_ddp_at_most(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["compact"]["bytes"] <= 0.25 * rank["plain DDP"]["bytes"]
        assert rank["ratio"] == rank["compact"]["bytes"] / rank["plain DDP"]["bytes"]
