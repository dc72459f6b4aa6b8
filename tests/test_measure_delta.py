"""scripts/measure_delta.py puts the deltas of a finished run beside what people keep instead."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from subnet_ft.masks import SubnetMask
from subnet_ft.pipeline import Pipeline, load_checked_recipe

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "measure_delta.py"


def test_measure_delta_prints_the_sizes_of_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ["training.max_steps=2", "subnet.source={kind: low_magnitude, density: 0.3}", "controls=[]"]
    small = ["evaluation.enabled=false", "task.pairs.num_prompts=40", "task.num_train=40"]
    Pipeline(load_checked_recipe("tiny/dpo", [*options, *small, f"output={run}"])).run()
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--run", str(run)])
    capsys.readouterr()
    runpy.run_path(str(SCRIPT), run_name="__main__")
    full, subnet = capsys.readouterr().out.split(f"{run / 'subnet'}")
    assert str(run / "full") in full
    mask = SubnetMask.load(run / "mask.subnet.safetensors")
    assert f"a value for {mask.density:.4f} of {mask.num_parameters:,} weights" in subnet
    rows = [
        {what: int(nbytes.replace(",", "")) for what, nbytes in re.findall(r"^\| ([^|]+?) \| ([\d,]+) \|", part, re.M)}
        for part in (full, subnet)
    ]
    for sizes, stage in zip(rows, ("full", "subnet"), strict=True):
        by_mask = ["delta --mask-reference"] if stage == "subnet" else []
        assert list(sizes) == [
            "dense checkpoint", "delta", "delta --zstd", *by_mask, "bound (2 d + 0.13 in bfloat16)",
            "zstd of the XOR of the weights", "zstd of the tuned weights", "LoRA r 16 on every linear layer, bfloat16",
        ]  # fmt: skip
        assert sizes["dense checkpoint"] == (run / stage / "model.safetensors").stat().st_size
    assert rows[1]["delta"] == (run / "subnet.delta.safetensors").stat().st_size
    referring = rows[1]["delta --mask-reference"]
    assert 2 * mask.num_trainable < referring < rows[1]["delta"] - mask.num_parameters // 8 + 200
    assert rows[1]["bound (2 d + 0.13 in bfloat16)"] == round(2 * mask.num_trainable + 0.13 * mask.num_parameters)
