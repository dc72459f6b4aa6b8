"""Masks of large gradients: planted moments, exact counts, one threshold or one per tensor."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.errors import MaskError, MaskMismatchError
from subnet_ft.masks import SubnetMask
from subnet_ft.masks.gradients import GRADIENT_KINDS, gradient_mask
from subnet_ft.masks.moments import Moments

Planted = list[tuple[str, Moments]]


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return open_checkpoint("tiny:llama")


@pytest.fixture(scope="module")
def moments(base: Checkpoint) -> Planted:
    """Gradients whose size differs by tensor; large means and large squares lie in different weights."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number, (name, spec) in enumerate(base.specs.items()):
        size = math.prod(spec.shape)
        mean, square = ((1 + number) * torch.randn(size, generator=generator) for _ in range(2))
        # No masters: these masks need none. The steps differ, and so do the corrections.
        step = 1 + number % 3
        found.append((name, Moments(mean, square**2, None, step, beta1=0.9, beta2=0.999, eps=1e-8, lr=0.0)))
    return found


def sizes(kind: str, of_tensor: Moments) -> torch.Tensor:
    if kind == "gradient":
        return of_tensor.exp_avg.abs() / (1 - 0.9**of_tensor.step)
    return of_tensor.exp_avg_sq / (1 - 0.999**of_tensor.step)


@pytest.mark.parametrize("kind", GRADIENT_KINDS)
def test_gradient_mask_takes_the_largest_of_every_tensor(kind: str, base: Checkpoint, moments: Planted) -> None:
    mask = gradient_mask(base, moments, kind, density=0.2)
    for name, of_tensor in moments:
        size = sizes(kind, of_tensor)
        count = round(0.2 * size.numel())
        assert mask.tensors[name].count == count
        assert set(mask[name].view(-1).nonzero().view(-1).tolist()) == set(size.topk(count).indices.tolist())


@pytest.mark.parametrize("kind", GRADIENT_KINDS)
def test_gradient_mask_takes_the_largest_of_the_model(kind: str, base: Checkpoint, moments: Planted) -> None:
    mask = gradient_mask(base, moments, kind, density=0.2, scope="global")
    flat = torch.cat([sizes(kind, of_tensor) for _, of_tensor in moments])
    chosen = torch.cat([mask[name].view(-1) for name, _ in moments])
    assert int(chosen.sum()) == round(0.2 * flat.numel())
    torch.testing.assert_close(flat[chosen].sort().values, flat.sort().values[-int(chosen.sum()) :])
    assert mask.tensors[moments[-1][0]].count / mask.tensors[moments[-1][0]].num_elements > 0.3


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_gradient_mask_is_made_again_from_its_source(
    scope: str, base: Checkpoint, moments: Planted, tmp_path: Path
) -> None:
    tied = [
        (name, Moments(torch.ones_like(m.exp_avg), m.exp_avg_sq, None, 1, 0.9, 0.999, 1e-8, 0.0)) for name, m in moments
    ]
    mask = gradient_mask(base, tied, "gradient", density=0.2, scope=scope, dtype="bfloat16", seed=5)
    loaded = SubnetMask.load(mask.save(tmp_path / "mask.subnet.safetensors"), base=base)
    source = dict(loaded.provenance.source)
    assert source.pop("step") == 1
    assert gradient_mask(base, tied, source.pop("kind"), dtype="bfloat16", **source) == mask
    assert gradient_mask(base, tied, "gradient", density=0.2, scope=scope, seed=6) != mask
    assert mask.provenance.compare_dtype == "bfloat16"


def test_gradient_mask_takes_nothing_of_a_tensor_without_gradient(base: Checkpoint, moments: Planted) -> None:
    for scope in ("tensor", "global"):
        mask = gradient_mask(base, moments[1:], "fisher", density=0.2, scope=scope)
        assert mask.names == list(base.specs)
        assert mask.tensors[moments[0][0]].count == 0
        assert mask.num_trainable > 0


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("hessian", {}, "choose one of gradient, fisher"),
        ("fisher", {"density": 0.0}, "`density` must be"),
        ("fisher", {"density": 1.5}, "`density` must be"),
        ("fisher", {"scope": "layer"}, "`scope` must be"),
        ("fisher", {"dtype": "int8"}, "`dtype` must be"),
        ("fisher", {"seed": -1}, "`seed` must be"),
    ],
)
def test_gradient_mask_refuses_what_is_out_of_range(
    kind: str, options: dict[str, object], said: str, base: Checkpoint, moments: Planted
) -> None:
    with pytest.raises(MaskError, match=said):
        gradient_mask(base, moments, kind, **{"density": 0.2, **options})


def test_gradient_mask_refuses_moments_of_another_model(base: Checkpoint, moments: Planted) -> None:
    with pytest.raises(MaskMismatchError, match=r"no `other`"):
        gradient_mask(base, [("other", moments[0][1])], "fisher", density=0.2)
    with pytest.raises(MaskMismatchError, match=r"the checkpoint's tensor is"):
        gradient_mask(base, [(moments[0][0], moments[1][1])], "fisher", density=0.2)
