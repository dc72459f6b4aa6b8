"""Masks by rule train exactly what the rule says, and belong to their base like an extracted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.models import load_model, save_with_reward_head
from subnet_ft.checkpoints.tiny import FAMILIES, save_tiny
from subnet_ft.errors import MaskMismatchError, MethodError
from subnet_ft.masks import SubnetMask, extract
from subnet_ft.methods.masks import method_mask


def trained(mask: SubnetMask) -> set[str]:
    """Return the tensors that a mask trains; of a mask by rule, each whole."""
    found = {name for name, tensor in mask.tensors.items() if tensor.count}
    assert all(mask.tensors[name].count == mask.tensors[name].num_elements for name in found)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_last_layers_are_those_of_the_last_layer_alone(family: str) -> None:
    base = open_checkpoint(f"tiny:{family}")
    mask = method_mask("last_layers", base, {"num_layers": 1})
    assert mask.names == list(base.specs)
    assert trained(mask) == {name for name in base.specs if ".layers.1." in name}
    assert mask.provenance.source == {"kind": "last_layers", "num_layers": 1, "final_norm_and_head": False}


def test_last_layers_may_train_what_comes_after_them() -> None:
    tied, untied = (
        trained(method_mask("last_layers", open_checkpoint(f"tiny:{family}"), {"final_norm_and_head": True}))
        for family in ("llama", "mistral")
    )
    assert {name for name in untied if ".layers." not in name} == {"model.norm.weight", "lm_head.weight"}
    assert {name for name in tied if ".layers." not in name} == {"model.norm.weight"}


def test_last_layers_refuses_more_than_the_model_has() -> None:
    with pytest.raises(MethodError, match=r"`tiny:llama` has 2 decoder layers, and .* asks for 3.*at most 2"):
        method_mask("last_layers", open_checkpoint("tiny:llama"), {"num_layers": 3})


def test_bitfit_trains_the_biases() -> None:
    base = open_checkpoint("tiny:gpt_neox")
    biases = {name for name in base.specs if name.endswith(".bias")}
    norms = {name for name in base.specs if name.endswith("norm.weight")}
    assert trained(method_mask("bitfit", base)) == biases
    assert trained(method_mask("bitfit", base, {"terms": "bias_and_norm"})) == biases | norms
    assert biases
    assert norms


def test_bitfit_trains_biases_that_are_named_after_their_weights(tmp_path: Path) -> None:
    """As in stacked experts, which are one module of several weights."""
    config = GptOssConfig(
        vocab_size=83, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    found = trained(method_mask("bitfit", open_checkpoint(tmp_path)))
    in_layers = {name.split(".", 3)[3] for name in found}
    assert in_layers == {
        *(f"self_attn.{kind}_proj.bias" for kind in "qkvo"),
        "mlp.router.bias", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias",
    }  # fmt: skip
    assert len(found) == 2 * len(in_layers)


def test_bitfit_says_when_a_model_has_no_bias() -> None:
    base = open_checkpoint("tiny:llama")
    with pytest.raises(MethodError, match=r"no bias.* norms have 5 weight vectors.*terms: bias_and_norm"):
        method_mask("bitfit", base)
    assert trained(method_mask("bitfit", base, {"terms": "bias_and_norm"})) == {
        name for name in base.specs if name.endswith("norm.weight")
    }


def test_bitfit_trains_the_head_of_a_reward_model_too(tmp_path: Path) -> None:
    for family, terms in (("gpt_neox", "bias"), ("llama", "bias_and_norm")):
        save_with_reward_head(open_checkpoint(f"tiny:{family}").folder, tmp_path / family, dtype="bfloat16", seed=0)
        of_writer = trained(method_mask("bitfit", open_checkpoint(f"tiny:{family}"), {"terms": terms}))
        mask = method_mask("bitfit", open_checkpoint(tmp_path / family), {"terms": terms})
        assert trained(mask) == of_writer | {"score.weight"}
    with pytest.raises(MethodError, match="no bias"):
        method_mask("bitfit", open_checkpoint(tmp_path / "llama"))


def test_method_mask_records_its_base_as_extraction_does(tmp_path: Path) -> None:
    folder, other = save_tiny("llama", tmp_path / "base"), save_tiny("llama", tmp_path / "other", seed=1)
    base = open_checkpoint(folder)
    mask = method_mask("last_layers", base)
    assert mask.provenance.base == extract(folder, other).provenance.base
    path = mask.save(tmp_path / "mask.subnet.safetensors")
    loaded = SubnetMask.load(path, base=folder)
    assert (loaded, loaded.provenance) == (mask, mask.provenance)
    mask.check(load_model(folder, dtype="bfloat16")[0])
    with pytest.raises(MaskMismatchError, match="are not those that the mask was made for"):
        mask.check_base(other)


def test_method_mask_belongs_to_the_base_as_it_is_trained(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base", dtype=torch.float32)
    mask = method_mask("last_layers", open_checkpoint(folder), dtype="bfloat16")
    assert mask.provenance.compare_dtype == "bfloat16"
    mask.check(load_model(folder, dtype="bfloat16")[0])
    mask.check_base(folder)
