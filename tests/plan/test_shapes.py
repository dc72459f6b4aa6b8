from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from subnet_ft.checkpoints.tiny import FAMILIES, save_tiny, tiny_config, tiny_model
from subnet_ft.errors import CheckpointError
from subnet_ft.plan.shapes import read_shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_read_shapes_gives_the_parameters_of_the_model_in_memory(family: str) -> None:
    model = tiny_model(family)
    shapes = read_shapes(f"tiny:{family}", dtype="bfloat16")
    assert shapes.parameters == {name: tuple(p.shape) for name, p in model.named_parameters()}
    head = model.get_output_embeddings().weight
    assert shapes.is_tied == (head is model.get_input_embeddings().weight)
    assert shapes.head is not None
    assert dict(model.named_parameters())[shapes.head] is head
    assert shapes.vocabulary == head.shape[0]
    assert len(shapes.layers) == 2
    assert all(parameter.is_meta for parameter in shapes.build().parameters())


def test_read_shapes_needs_nothing_but_config_json(tmp_path: Path) -> None:
    folder = save_tiny("qwen2", tmp_path / "whole")
    only = tmp_path / "only"
    only.mkdir()
    (only / "config.json").write_text((folder / "config.json").read_text())
    shapes = read_shapes(str(only), dtype="bfloat16")
    assert shapes.parameters == read_shapes("tiny:qwen2", dtype="bfloat16").parameters


def test_read_shapes_reads_a_reward_model_of_a_language_models_config() -> None:
    shapes = read_shapes("tiny:llama", dtype="float32", kind="reward_model")
    assert shapes.parameters["score.weight"] == (1, 32)
    assert shapes.head is None
    assert shapes.vocabulary == 0
    assert shapes.dtype == torch.float32


def test_read_shapes_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        read_shapes(str(tmp_path / "nothing"), dtype="bfloat16")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_shapes(str(tmp_path), dtype="bfloat16")


def test_read_shapes_offline_names_the_hub_model_and_another_way() -> None:
    with pytest.raises(CheckpointError, match=r"`nobody/nothing` cannot be read.*folder with its config\.json"):
        read_shapes("nobody/nothing", dtype="bfloat16")


def test_read_shapes_refuses_a_quantized_model(tmp_path: Path) -> None:
    config = {**tiny_config("llama").to_dict(), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gptq"):
        read_shapes(str(tmp_path), dtype="bfloat16")
