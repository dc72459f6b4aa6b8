"""Weights that transformers keeps in float32 get the dtype back that they are stored in, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import same_bits
from transformers import AutoModelForCausalLM

from subnet_ft.checkpoints import open_checkpoint, undo_upcasts
from subnet_ft.checkpoints.tiny import save_tiny, tiny_model

ROUTER = "model.layers.1.mlp.gate.weight"


def widened(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, torch.Tensor]:
    """Build a model whose router is kept in float32, as transformers 5.24 does; returns the router as stored, too."""
    model: Any = tiny_model("deepseek_v3", dtype=dtype)
    router = model.get_parameter(ROUTER)
    stored = router.detach().clone()
    router.data = router.data.float()
    return model, stored


def test_undo_upcasts_gives_the_model_as_it_is_stored(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny("deepseek_v3", tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    undo_upcasts(model, dtype="bfloat16")
    loaded = dict(model.named_parameters())
    for name, tensor in checkpoint.tensors():
        assert same_bits(loaded[name].detach(), tensor), name
    assert all(same_bits(model.get_buffer(name), buffer) for name, buffer in buffers.items())
    assert all(parameter.requires_grad for parameter in loaded.values())


def test_undo_upcasts_restores_the_bits_of_a_widened_weight() -> None:
    for name in ("bfloat16", "float16"):
        model, stored = widened(getattr(torch, name))
        undo_upcasts(model, dtype=name)
        assert same_bits(model.get_parameter(ROUTER).detach(), stored)


def test_undo_upcasts_leaves_a_weight_alone_that_would_be_rounded() -> None:
    model, _ = widened()
    router = model.get_parameter(ROUTER)
    with torch.no_grad():
        router[0, 0] = 1.0 + 2.0**-20
    before = router.detach().clone()
    undo_upcasts(model, dtype="bfloat16")
    assert same_bits(model.get_parameter(ROUTER).detach(), before)


def test_undo_upcasts_changes_no_output() -> None:
    model, _ = widened()
    tokens = torch.arange(2, 12).reshape(2, 5)
    with torch.no_grad():
        before = model(tokens).logits
        undo_upcasts(model, dtype="bfloat16")
        assert same_bits(model(tokens).logits, before)


def test_undo_upcasts_widens_nothing() -> None:
    model = tiny_model("llama")
    undo_upcasts(model, dtype="float32")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
