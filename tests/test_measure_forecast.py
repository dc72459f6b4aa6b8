"""The script behind the table in docs/masks.md runs on any full run that kept its checkpoints."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from small_runs import SAVES, restricted

from subnet_ft.checkpoints.tiny import save_tiny, tiny_model
from subnet_ft.masks import SubnetMask, extract

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "measure_forecast.py"


def test_measure_forecast_prints_a_row_for_every_way_to_know_the_mask_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny("llama", tmp_path / "base")
    full = SubnetMask.full({name: tuple(p.shape) for name, p in tiny_model("llama").named_parameters()})
    restricted(tmp_path / "run", mask=full, learning_rate=1e-4, weight_decay=0.0, **SAVES).train()
    final = tmp_path / "run" / "checkpoint-4"
    arguments = [str(base), str(final), str(tmp_path / "run" / "checkpoint-2")]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *arguments])
    capsys.readouterr()
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    changed = extract(base, final)
    assert f"final mask: {changed.num_trainable} weights" in printed
    recalls = {
        label: float(recall) for label, recall in re.findall(r"^\| ([^|]+?) \| ([\d.]+)%", printed, flags=re.MULTILINE)
    }
    assert recalls.keys() == {
        "lowest abs(w), one threshold", "lowest abs(w), count per tensor of the final mask", "predicted (spacing)",
        "early, step 2", "forecast, step 2",
    }  # fmt: skip
    assert recalls["forecast, step 2"] > recalls["predicted (spacing)"] > 100 * changed.density
