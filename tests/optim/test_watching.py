"""A watched step: its counts against full copies, and the bits of a step that nobody watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits, set_gradients, small_model
from masked_optimizers import masked_adamw, masked_sgd

from subnet_ft.masks import SubnetMask
from subnet_ft.optim import watching
from subnet_ft.optim.fused import FusedBase
from subnet_ft.optim.watching import StepWatch
from subnet_kernels import bits_view, join_master, round_to_weights

KINDS: dict[str, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, "fp32"),
    "bfloat16, masters": (torch.bfloat16, "fp32"),
    "bfloat16, remainders": (torch.bfloat16, "remainder"),
    "bfloat16, forgotten": (torch.bfloat16, "none"),
    "float16": (torch.float16, "fp32"),
}
OPTIMIZERS = {
    "AdamW": masked_adamw,
    "SGD": masked_sgd,
    "plain SGD": lambda *args, **options: masked_sgd(*args, **{**options, "momentum": 0.0}),
}
STEPS = 3


def build(
    optimizer: str, kind: str, *, density: float = 0.3, lr: float = 2e-3, **options: Any
) -> tuple[torch.nn.Module, Any]:
    dtype, master = KINDS[kind]
    model = small_model(dtype)
    mask = random_mask(model, density)
    if density == 1.0:
        mask = SubnetMask.full({name: tuple(p.shape) for name, p in model.named_parameters()})
    # A third of the updates of these weights is below their spacing in bfloat16.
    return model, OPTIMIZERS[optimizer](model.named_parameters(), mask, master=master, lr=lr, **options)


def copies(model: torch.nn.Module, optimizer: FusedBase) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return of every tensor the masked weights and their float32 values."""
    found = {}
    for name, parameter in model.named_parameters():
        stored = parameter.detach()[optimizer.mask[name]].clone()
        master = (optimizer.state.get(parameter) or {}).get("master")
        if master is None:
            exact = stored.float()
        else:
            exact = join_master(stored, master) if master.dtype == torch.int16 else master.clone()
        found[name] = (stored, exact)
    return found


def differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return bits_view(a) != bits_view(b)


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("compact_grads", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_watch_counts_what_full_copies_show_and_changes_no_bit(
    optimizer: str, kind: str, compact_grads: bool, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "SLICE", 64)  # the matrix of 221 weights is cut in four
    model, watched = build(optimizer, kind, density=density, compact_grads=compact_grads)
    other, unwatched = build(optimizer, kind, density=density, compact_grads=compact_grads)
    forgets = KINDS[kind][1] == "none"
    kept_back = 0
    for step in range(STEPS):
        watched.watch = StepWatch()
        before = copies(model, watched)
        for each, one in ((model, watched), (other, unwatched)):
            set_gradients(each, step)
            one.step()
        after = copies(model, watched)
        assert all(same_bits(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
        expected = [0, 0, 0, 0]
        for name, (stored, exact) in before.items():
            now, moved_to = after[name]
            changed = differ(stored, now)
            if forgets:  # what moved is known no more
                expected[1] += int(changed.sum())
                continue
            moved = differ(exact, moved_to)
            plain = differ(stored, round_to_weights(stored.float() + (moved_to - exact), stored.dtype))
            for place, which in enumerate((moved, changed, moved & ~changed, moved & ~plain)):
                expected[place] += int(which.sum())
        seen = watched.watch
        found = [seen.num_updates, seen.num_changed, seen.num_kept_back, seen.num_rounded_away]
        if forgets:
            # Every weight is its own float32 value before the step, so that both ways of counting are one.
            assert found[1] == expected[1]
            assert found[0] - found[1] == found[2] == found[3]
        else:
            assert found == expected
        kept_back += seen.num_kept_back
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in (watched.state.get(parameter) or {}).items():
            assert same_bits(value, unwatched.state[twin][key]), key
    assert (kept_back > 0) == (kind != "float32")


def test_step_watch_holds_a_slice_and_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 9 copies of a slice's weights, each at most 4 bytes, whatever the tensor's size."""
    monkeypatch.setattr(watching, "SLICE", 1 << 12)
    model = torch.nn.Linear(512, 512, bias=False).to(torch.bfloat16)
    mask = SubnetMask.full({"weight": (512, 512)})
    optimizer: Any = masked_adamw(model.named_parameters(), mask)
    optimizer.watch = StepWatch()
    set_gradients(model, 0)
    optimizer.step()
    assert optimizer.watch.num_updates > 0.9 * 512 * 512
    assert 0 < optimizer.watch.peak_bytes <= 9 * 4 * (1 << 12) < model.weight.nbytes


def test_a_step_without_masters_loses_what_is_said_to_round_away() -> None:
    """From one start, what masters keep back in a first step is what training without them loses for good."""
    counts = []
    for kind in ("bfloat16, masters", "bfloat16, remainders", "bfloat16, forgotten"):
        model, optimizer = build("AdamW", kind, density=1.0, lr=5e-4)
        optimizer.watch = StepWatch()
        before = [p.detach().clone() for p in model.parameters()]
        set_gradients(model, 0)
        optimizer.step()
        same = sum(int((~differ(p.detach(), b)).sum()) for p, b in zip(model.parameters(), before, strict=True))
        off_mask = optimizer.mask.num_parameters - optimizer.mask.num_trainable
        assert optimizer.watch.num_rounded_away == same - off_mask
        counts.append((optimizer.watch.num_kept_back, optimizer.watch.num_rounded_away))
    assert counts[0][0] > 10
    assert len(set(counts)) == 1


def test_small_updates_add_up_in_a_master_and_each_is_lost_without() -> None:
    """bfloat16 has 255/256 below 1, so ten updates of 1/1000 pass three of its values, and none gets half way there."""
    model = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    model.weight.data.fill_(1.0)
    mask = SubnetMask.full({"weight": (1, 1)})
    optimizer: Any = masked_sgd(model.named_parameters(), mask, lr=1e-3, momentum=0.0, weight_decay=0.0)
    kept_back, rounded_away = [], []
    for _ in range(10):
        optimizer.watch = StepWatch()
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        assert optimizer.watch.num_updates == 1
        kept_back.append(optimizer.watch.num_kept_back)
        rounded_away.append(optimizer.watch.num_rounded_away)
    assert sum(rounded_away) == 10
    assert sum(kept_back) == 7
    assert model.weight.item() == 1 - 3 / 256


def test_step_watch_refuses_stochastic_rounding() -> None:
    model = small_model(torch.bfloat16)
    optimizer: Any = masked_adamw(model.named_parameters(), random_mask(model, 0.3), master="stochastic")
    optimizer.watch = StepWatch()
    set_gradients(model, 0)
    with pytest.raises(ValueError, match="rounded stochastically has no float32 value"):
        optimizer.step()
