"""MaskedAdamW on a GPU against the CPU."""

from __future__ import annotations

import pytest
import torch
from helpers import random_bits, same_bits

from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW

STEPS = 10
# A GPU fuses multiplications with additions and sums the norm in another order, which moves the last bits of the clip
# coefficient and of each update. The absolute part is for values that cancel: about one ulp of the largest.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}
DEVICES = ("cpu", "cuda")
DTYPES_AND_MASTERS = [
    (torch.float32, "fp32"),
    (torch.bfloat16, "fp32"),
    (torch.bfloat16, "remainder"),
    (torch.float16, "fp32"),
]


def trained(device: str, dtype: torch.dtype, master: str) -> tuple[torch.nn.Module, MaskedAdamW]:
    """Train a small model with gradients that do not depend on the device, NaN off the mask."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(13, 17), torch.nn.LayerNorm(17), torch.nn.Linear(17, 5))
    model.to(device=device, dtype=dtype)
    mask = SubnetMask.from_dense(
        {n: random_bits(p.numel(), 0.4, seed).view(p.shape) for seed, (n, p) in enumerate(model.named_parameters())}
    )
    optimizer = MaskedAdamW(model.named_parameters(), mask, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0, master=master)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for name, parameter in model.named_parameters():
            grad = torch.randn(parameter.shape, generator=generator).masked_fill(~mask[name], float("nan"))
            parameter.grad = grad.to(device=device, dtype=dtype)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def masters(model: torch.nn.Module, optimizer: MaskedAdamW) -> list[torch.Tensor]:
    """Return the float32 masters (K,) of every tensor, on the CPU."""
    found = []
    for name, parameter in model.named_parameters():
        chosen = parameter.detach().cpu()[optimizer.mask[name]]
        master = optimizer.state[parameter].get("master", chosen).cpu()
        if master.dtype == torch.int16:
            upper = chosen.view(torch.int16).to(torch.int32) << 16
            master = (upper + master.to(torch.int32)).view(torch.float32)
        found.append(master)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "master"), DTYPES_AND_MASTERS)
def test_masked_adamw_on_a_gpu_equals_the_cpu(dtype: torch.dtype, master: str) -> None:
    (model, optimizer), (other, other_optimizer) = (trained(device, dtype, master) for device in DEVICES)
    pairs = zip(masters(model, optimizer), masters(other, other_optimizer), strict=True)
    for (name, parameter), theirs, (ours, on_gpu) in zip(
        model.named_parameters(), other.parameters(), pairs, strict=True
    ):
        assert theirs.device.type == "cuda"
        torch.testing.assert_close(on_gpu, ours, **CLOSE)
        state, other_state = optimizer.state[parameter], other_optimizer.state[theirs]
        assert other_state["exp_avg"].device.type == "cuda"
        torch.testing.assert_close(other_state["exp_avg"].cpu(), state["exp_avg"], **CLOSE)
        torch.testing.assert_close(other_state["exp_avg_sq"].cpu(), state["exp_avg_sq"], rtol=1e-5, atol=0.0)
        assert int(other_state["step"]) == int(state["step"]) == STEPS
        assert same_bits(theirs.detach().cpu()[~optimizer.mask[name]], parameter.detach()[~optimizer.mask[name]])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "master"), DTYPES_AND_MASTERS)
def test_masked_adamw_on_a_gpu_leaves_off_mask_bits_alone(dtype: torch.dtype, master: str) -> None:
    torch.manual_seed(0)
    start = torch.nn.Sequential(torch.nn.Linear(13, 17), torch.nn.LayerNorm(17), torch.nn.Linear(17, 5)).to(dtype)
    model, optimizer = trained("cuda", dtype, master)
    for (name, parameter), before in zip(model.named_parameters(), start.parameters(), strict=True):
        chosen, after = optimizer.mask[name], parameter.detach().cpu()
        assert same_bits(after[~chosen], before.detach()[~chosen])
        assert after[chosen].isfinite().all()
        assert (after[chosen] != before.detach()[chosen]).float().mean() > 0.5


@pytest.mark.gpu
def test_masked_adamw_keeps_its_step_count_off_the_gpu_when_it_resumes() -> None:
    _, optimizer = trained("cuda", torch.bfloat16, "fp32")
    saved = optimizer.state_dict()
    saved["state"] = {name: {k: v.cuda() for k, v in values.items()} for name, values in saved["state"].items()}
    optimizer.load_state_dict(saved)
    assert {values["step"].device.type for values in optimizer.state.values()} == {"cpu"}
    assert {values["master"].device.type for values in optimizer.state.values()} == {"cuda"}
