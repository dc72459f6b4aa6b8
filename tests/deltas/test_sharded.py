"""Deltas in a model that FSDP2 shards over two gloo processes."""

from __future__ import annotations

import json
from pathlib import Path

from launching import torchrun


def test_applied_and_hot_swap_exchange_each_process_s_part(tmp_path: Path) -> None:
    torchrun(Path(__file__).with_name("sharded_worker.py"), tmp_path, processes=2)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["parts"] != ranks[1]["parts"], "rows that do not divide"
    for found in ranks:
        assert "`0.weight` are not those of `a base`" in found.pop("other base")
        del found["parts"]
        assert found == dict.fromkeys(found, True)
        assert len(found) == 8
