from __future__ import annotations

import pytest
import torch
from helpers import random_mask

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import MaskMismatchError, MethodError
from subnet_ft.masks import SubnetMask
from subnet_ft.methods.adapters import attach
from subnet_ft.plan.shapes import read_shapes
from subnet_ft.plan.trained import PlannedTensor, adapted, fully, of_density, of_mask, with_value_head


def test_fully_trains_every_weight_once() -> None:
    trained = fully(read_shapes("tiny:llama", dtype="bfloat16"))
    model = tiny_model("llama")
    assert trained.num_trainable == trained.num_parameters == sum(p.numel() for p in model.parameters())


def test_of_mask_counts_what_a_mask_trains_in_every_tensor() -> None:
    mask = random_mask(tiny_model("llama"), 0.3)
    trained = of_mask(read_shapes("tiny:llama", dtype="bfloat16"), mask)
    assert {t.name: t.count for t in trained.tensors} == {name: t.count for name, t in mask.tensors.items()}
    frozen = {name for name, tensor in mask.tensors.items() if not tensor.count}
    assert {name for name, p in trained.build().named_parameters() if not p.requires_grad} == frozen


def test_of_mask_refuses_the_mask_of_another_model() -> None:
    mask = SubnetMask.full({"a": (2, 2)})
    with pytest.raises(MaskMismatchError):
        of_mask(read_shapes("tiny:llama", dtype="bfloat16"), mask)


def test_of_density_takes_the_same_share_of_every_tensor() -> None:
    trained = of_density(read_shapes("tiny:llama", dtype="bfloat16"), 0.25)
    assert {tensor.count / tensor.num_elements for tensor in trained.tensors} == {0.25}


@pytest.mark.parametrize(("method", "config"), [("lora", {"r": 4}), ("dora", {}), ("ia3", {})])
def test_adapted_holds_what_peft_adds(method: str, config: dict[str, int]) -> None:
    from subnet_ft.checkpoints.tiny import tiny_tokenizer

    trained = adapted(read_shapes("tiny:llama", dtype="bfloat16"), method, config)
    model = attach(tiny_model("llama"), tiny_tokenizer(), method, config, seed=0)
    expected = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    assert [(t.name, t.shape, t.dtype, t.count > 0) for t in trained.tensors] == expected


def test_adapted_keeps_two_configs_apart() -> None:
    shapes = read_shapes("tiny:llama", dtype="bfloat16")
    assert adapted(shapes, "lora", {"r": 8}).num_trainable == 2 * adapted(shapes, "lora", {"r": 4}).num_trainable


def test_adapted_passes_on_what_peft_refuses() -> None:
    with pytest.raises(MethodError, match="lora"):
        adapted(read_shapes("tiny:llama", dtype="bfloat16"), "lora", {"target_modules": ["nowhere"]})


def test_with_value_head_replaces_an_output_embedding_of_its_own() -> None:
    shapes = read_shapes("tiny:qwen2", dtype="bfloat16")
    names = {tensor.name for tensor in with_value_head(fully(shapes), shapes).tensors}
    assert names == (shapes.parameters.keys() - {"lm_head.weight"}) | {"score.weight", "score.bias"}


def test_shard_is_the_largest_part_of_uneven_rows() -> None:
    tensor = PlannedTensor("a", (10, 4), torch.bfloat16, 20)
    shard = tensor.shard(4)
    assert (shard.shape, shard.count) == ((3, 4), 6)
    assert tensor.shard(1) is tensor
