"""Bottleneck adapters: after both blocks of every layer, by the paper's formula, and as a method of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from peft import PeftConfig

from subnet_ft.checkpoints.tiny import FAMILIES, tiny_model, tiny_tokenizer
from subnet_ft.errors import MethodError
from subnet_ft.methods.adapters import adapter_parameters, attach
from subnet_ft.methods.bottleneck import BottleneckConfig, BottleneckLayer, blocks_of

IDS = torch.arange(2, 34).view(2, 16)


def attached(family: str = "llama", *, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Any:
    return attach(tiny_model(family, dtype=dtype), tiny_tokenizer(), "adapters", config, seed=0)


def moved(model: Any) -> Any:
    """Give every adapter weight a value that shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model).values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_start_as_the_base_in_every_family_and_switch_off(family: str) -> None:
    model = attached(family)
    layers = [module for module in model.modules() if isinstance(module, BottleneckLayer)]
    with torch.no_grad():
        base = tiny_model(family)(IDS).logits
        assert len(layers) == 4
        assert torch.equal(model(IDS).logits, base)
        assert not torch.equal(moved(model)(IDS).logits, base)
        with model.disable_adapter():
            assert same_bits(model(IDS).logits, base)


def test_adapters_follow_the_formula() -> None:
    model = moved(attached(bottleneck_size=3, activation="relu", dtype=torch.float32))
    layer = model.base_model.model.model.layers[0].mlp
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    inner = layer.base_layer(hidden)
    expected = inner + (inner @ down.weight.T + down.bias).clamp(min=0) @ up.weight.T + up.bias
    torch.testing.assert_close(layer(hidden), expected)
    assert down.weight.shape == (3, 32)


def test_adapters_add_up_to_the_count_of_the_paper() -> None:
    """A layer has two adapters of 2·d·m + d + m weights (section 2.1 of arXiv 1902.00751)."""
    model = attached(bottleneck_size=5)
    assert sum(p.numel() for p in adapter_parameters(model).values()) == 2 * 2 * (2 * 32 * 5 + 32 + 5)
    down = adapter_parameters(attached(reduction_factor=4.0))
    assert {p.shape for name, p in down.items() if name.endswith("down.default.weight")} == {(8, 32)}


def test_adapters_take_a_second_one_beside_the_first() -> None:
    """TRL adds one as its reference, and it must be able to go again."""
    model = attached()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.add_adapter("ref", model.peft_config["default"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapter_parameters(attached()))
    model.delete_adapter("ref")
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(same_bits(after[name].detach(), before[name]) for name in before)


def test_blocks_of_finds_the_two_blocks_of_a_layer_by_structure() -> None:
    model = tiny_model("llama")
    assert blocks_of(model) == [f"model.layers.{n}.{name}" for n in (0, 1) for name in ("self_attn", "mlp")]
    layer: Any = model.model.layers[0]
    layer.up, layer.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)
    del layer.mlp
    assert blocks_of(model)[:2] == ["model.layers.0.self_attn", "model.layers.0.down"]
    layer.third = torch.nn.Linear(32, 32)
    with pytest.raises(MethodError, match=r"Layer 0 of `LlamaForCausalLM` has 3 blocks .self_attn, down, third."):
        attach(model, tiny_tokenizer(), "adapters", seed=0)


def test_config_is_read_back_by_its_name(tmp_path: Path) -> None:
    model = attached(bottleneck_size=3)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, BottleneckConfig)
    assert (config.peft_type, config.bottleneck_size, config.activation) == ("BOTTLENECK", 3, "gelu")


@pytest.mark.parametrize("field", ["bottleneck_size", "reduction_factor", "init_std"])
def test_config_refuses(field: str) -> None:
    fields: dict[str, Any] = {field: 0}
    with pytest.raises(ValueError, match=rf"`{field}` must be .*, got 0"):
        BottleneckConfig(**fields)
