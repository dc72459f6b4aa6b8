"""A free reference under DDP, two gloo processes: it asks the policy without its wrapper, and the bits are the same."""

from __future__ import annotations

import json
from pathlib import Path

from launching import torchrun


def test_free_reference_gives_the_run_of_a_second_model_under_ddp(tmp_path: Path) -> None:
    torchrun(Path(__file__).with_name("free_reference_worker.py"), tmp_path, processes=2)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert len(set(ranks[0]["second"]["losses"])) == 4
    for found in ranks:
        assert found["free"] == found["second"]
    assert ranks[0]["free"]["weights"] == ranks[1]["free"]["weights"]
