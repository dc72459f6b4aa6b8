"""The layer stack of every family is found by its structure."""

from __future__ import annotations

import pytest
import torch

from subnet_ft.checkpoints.tiny import FAMILIES, tiny_model
from subnet_ft.errors import MethodError
from subnet_ft.methods.layers import decoder_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_finds_them_in_every_family(family: str) -> None:
    model = tiny_model(family)
    name, layers = decoder_layers(model)
    assert name.endswith(".layers")
    assert layers == list(model.get_submodule(name))
    assert len(layers) == 2


def test_decoder_layers_passes_over_experts_and_smaller_lists() -> None:
    """A layer may hold as many modules in a list as the model has layers, and so may another part of the model."""
    model = tiny_model("llama")
    _, layers = decoder_layers(model)
    layers[0].experts = torch.nn.ModuleList([torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)])
    model.other = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    assert decoder_layers(model)[1] == layers


def test_decoder_layers_says_when_there_are_none() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 3
    with pytest.raises(MethodError, match=r"`LlamaForCausalLM` has no list of 3 decoder layers"):
        decoder_layers(model)
