"""Masks from weights need the memory of a few tensors, however many the model has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from anonymous_memory import measure

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.masks import BASE_KINDS, CONTROLS

_MAKE = """
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.masks import BASE_KINDS, CONTROLS, base_mask, control_mask
base = open_checkpoint(sys.argv[1])
peaks, mask = {}, base_mask(base, "uniform", density=0.1, dtype="float16")
for kind in BASE_KINDS:
    with Peak() as peak:
        base_mask(base, kind, density=0.1, dtype="float16")
    peaks[kind] = peak.megabytes
for kind in CONTROLS:
    with Peak() as peak:
        control_mask(mask, kind, seed=0, weights=base.tensors())
    peaks[f"control-{kind}"] = peak.megabytes
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_masks_from_weights_hold_a_few_tensors_at_a_time(tmp_path: Path) -> None:
    # 18 matrices of 4 MB: all in float16 are 75 MB, their mask 5 MB; one as float32 keys and their sorted copy 16.
    sizes = {"hidden_size": 256, "intermediate_size": 8192, "num_hidden_layers": 6}
    tiny_model("llama", **sizes).save_pretrained(tmp_path)
    peaks = measure(_MAKE, str(tmp_path))
    assert set(peaks) == {*BASE_KINDS, *(f"control-{kind}" for kind in CONTROLS)}
    assert {kind: peak for kind, peak in peaks.items() if peak > 65} == {}
