"""Every adapter computes on a base in 8 or 4 bits what it computes on dense weights of the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from subnet_ft.checkpoints.models import load_model
from subnet_ft.checkpoints.quantized import Quantization, import_bitsandbytes, quantized_layers
from subnet_ft.checkpoints.tiny import save_tiny, tiny_model
from subnet_ft.methods.adapters import adapter_parameters, attach
from subnet_ft.methods.saved import load_adapter, load_trained, save_adapter
from subnet_ft.recipe.methods import METHODS

ADAPTERS = [name for name, method in METHODS.items() if method.trains == "adapter"]
CONFIGS: dict[str, dict[str, Any]] = {name: {"r": 4} for name in ("eva", "shira")}
STORED = {"int8": torch.int8, "nf4": torch.uint8}
IDS = torch.arange(2, 34).view(2, 16)
# Of what the adapter changes: activations are rounded to 8 bits, or sums to bfloat16; without the adapter it is 1.
ROUNDING = 0.2


def saved_adapter(name: str, family: str, folder: Path) -> tuple[Path, Path]:
    """Save a tiny base and an adapter of it that changes much."""
    base = save_tiny(family, folder / "base")
    model, tokenizer = load_model(base, dtype="bfloat16")
    adapted = attach(model, tokenizer, name, CONFIGS.get(name), seed=0, texts=["What is 2 + 3?"] * 8)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(adapted).values():
        noise = torch.randn(parameter.shape, generator=generator) * (0.5 if name in ("ia3", "adaption_prompt") else 0.1)
        parameter.data += noise.to(parameter.dtype)
    save_adapter(adapted, tokenizer, folder / name, method=name, base=base, base_name="tiny")
    return folder / name, base


def dense_copy(model: Any) -> Any:
    """Return a dense model whose weights are the values that a quantized one holds."""
    functional = import_bitsandbytes().functional
    dense: Any = tiny_model(model.config.model_type)
    dense.load_state_dict({name: p for name, p in model.state_dict().items() if p.is_floating_point()}, strict=False)
    for name, layer in quantized_layers(model).items():
        weight: Any = layer.weight
        if hasattr(layer, "state"):
            values = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            values = functional.dequantize_4bit(weight.data, weight.quant_state)
        dense.get_submodule(name).weight.data = values.to(torch.bfloat16)
    return dense


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits.float()[:, -IDS.shape[1] :]
    return logits


@pytest.mark.parametrize("kind", get_args(Quantization))
@pytest.mark.parametrize(
    ("name", "family"), [*((name, "llama") for name in ADAPTERS), ("ia3", "qwen2"), ("shira", "qwen2")]
)
def test_load_trained_computes_on_quantized_layers(name: str, family: str, kind: Quantization, tmp_path: Path) -> None:
    """The second family has biases."""
    folder, base = saved_adapter(name, family, tmp_path)
    quantized, _ = load_model(base, dtype="bfloat16", quantization=kind)
    dense = dense_copy(quantized)
    without = logits_of(dense)
    expected = logits_of(load_adapter(dense, folder))
    loaded: Any = load_trained(folder, base, dtype="bfloat16", quantization=kind)[0]
    assert {layer.weight.dtype for layer in quantized_layers(loaded).values()} == {STORED[kind]}
    assert (logits_of(loaded) - expected).norm() < ROUNDING * (without - expected).norm()
    # What a call leaves behind, the next one meets.
    assert torch.equal(logits_of(loaded), logits_of(loaded))
    assert loaded.generate(input_ids=IDS, max_new_tokens=2, do_sample=False).shape == (2, 18)
