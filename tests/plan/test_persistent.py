from __future__ import annotations

import pytest
import torch
from helpers import random_mask

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW, MaskedSGD, memory_ledger
from subnet_ft.plan.persistent import ledger, mask_bytes, reference_bytes
from subnet_ft.plan.shapes import read_shapes
from subnet_ft.plan.trained import adapted, fully, of_mask
from subnet_ft.recipe.schema import OptimizerSpec
from subnet_kernels import BitMask

WIDTHS = {"hidden_size": 64, "intermediate_size": 256}


def measured(mask: SubnetMask, *, dtype: torch.dtype, optimizer: str, master: str) -> dict[str, int]:
    """Count what a model of `mask` holds after a step."""
    model = tiny_model("llama", dtype=dtype)
    if optimizer == "adamw":
        built: MaskedAdamW | MaskedSGD = MaskedAdamW(
            model.named_parameters(), mask, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=None, master=master
        )
    else:
        built = MaskedSGD(model.named_parameters(), mask, lr=1e-3, max_grad_norm=None, master=master)
    model(input_ids=torch.arange(8).view(1, 8)).logits.float().sum().backward()
    built.step()
    return memory_ledger(model, built)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("master", ["fp32", "remainder", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_ledger_counts_what_a_step_leaves(optimizer: str, master: str, dtype: torch.dtype, density: float) -> None:
    mask = random_mask(tiny_model("llama"), density)
    found = measured(mask, dtype=dtype, optimizer=optimizer, master=master)
    shapes = read_shapes("tiny:llama", dtype=str(dtype).removeprefix("torch."))
    spec = OptimizerSpec(name=optimizer, master=master)  # type: ignore[arg-type]
    planned = ledger(of_mask(shapes, mask).tensors, spec, device="cpu")
    # How a kernel cuts the work among threads is a few hundred bytes.
    table = found.pop("mask") - planned.pop("mask")
    assert planned == found
    assert 0 <= table <= 2048


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 70000])
def test_mask_bytes_is_what_a_mask_holds(size: int) -> None:
    held = BitMask.from_bits(torch.zeros((size + 7) // 8, dtype=torch.uint8), size).nbytes
    assert mask_bytes(size, device="cpu") == held


def test_mask_bytes_is_an_eighth_and_little_more_on_large_tensors() -> None:
    assert mask_bytes(10**9, device="cpu") / 1e9 == pytest.approx(0.129, abs=5e-4)
    assert mask_bytes(10**9, device="cuda") / 1e9 == pytest.approx(0.129, abs=5e-4)


def test_ledger_of_eight_bit_moments_counts_values_scales_and_small_tensors() -> None:
    pytest.importorskip("bitsandbytes")
    tensors = fully(read_shapes("tiny:llama", dtype="bfloat16")).tensors
    planned = ledger(tensors, OptimizerSpec(name="adamw_8bit"), device="cpu")
    # All tensors of the tiny model but the embedding are smaller than 4,096 weights, and so have moments in float32.
    assert planned["moments"] == sum(8 * tensor.count for tensor in tensors if tensor.count < 4096) + sum(
        2 * (tensor.count + 4 * -(-tensor.count // 256)) + 2048 for tensor in tensors if tensor.count >= 4096
    )
    assert planned["masters"] == sum(4 * tensor.count for tensor in tensors)


def test_reference_bytes_is_a_model_or_the_values_of_the_mask_or_nothing() -> None:
    shapes = read_shapes("tiny:llama", dtype="bfloat16")
    subnet = of_mask(shapes, random_mask(tiny_model("llama"), 0.25))

    def count(trained: object, source: str, quantization: str | None = None) -> int:
        return reference_bytes(
            trained,  # type: ignore[arg-type]
            trained.tensors,  # type: ignore[attr-defined]
            source=source,
            quantization=quantization,
            linears=shapes.linears,
            device="cpu",
        )

    whole = 2 * subnet.num_parameters
    assert count(subnet, "model") == whole
    masks = sum(mask_bytes(tensor.num_elements, device="cpu") for tensor in subnet.tensors if tensor.count)
    assert count(subnet, "policy") == 2 * subnet.num_trainable + masks
    assert count(fully(shapes), "policy") == whole
    assert count(adapted(shapes, "lora", {}), "model") == 0
    assert count(subnet, "model", "nf4") < count(subnet, "model", "int8") < whole
