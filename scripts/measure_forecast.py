#!/usr/bin/env python3
"""Measure how much of a finished run's mask could have been known before: the table in docs/masks.md, "Forecast".

Usage: scripts/measure_forecast.py BASE FINAL CHECKPOINT... [--total-steps 40] [--dtype bfloat16]

BASE is the model before training, FINAL the tuned one of a full run, and every CHECKPOINT a `checkpoint-STEP` folder of
that run with the optimizer's state (`keep_checkpoints: true`). `--total-steps` is for checkpoints of a run that was
stopped early. Recall is given at 1.0, 1.3 and 1.5 times the density of the final mask; where weights tie, as if a
random part of them was taken.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.masks import SubnetMask, control_mask, early_mask, extract
from subnet_ft.masks.forecast import change_probability
from subnet_ft.masks.moments import Moments
from subnet_ft.masks.selection import magnitude_keys
from subnet_ft.masks.spacing import reach_keys
from subnet_ft.training.moments import read_moments

MULTIPLES = (1.0, 1.3, 1.5)
WANTED = 0.9
_COARSE = 11  # trailing bits of a score that are left out

Score = Callable[[str, torch.Tensor], torch.Tensor]
"""Takes a tensor's name and its (N,) weights; returns (N,) float32 >= 0."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("final")
    parser.add_argument("checkpoints", nargs="*")
    parser.add_argument("--total-steps", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    base = open_checkpoint(args.base)
    final = extract(base, args.final, dtype=args.dtype)
    print(f"final mask: {final.num_trainable} weights, density {final.density:.4f}\n")
    print("| source | " + " | ".join(f"recall at {m:.1f}x" for m in MULTIPLES) + f" | {WANTED:.0%} at |")
    print("|---|" + "---|" * (len(MULTIPLES) + 1))
    show("lowest abs(w), one threshold", base, final, args.dtype, lambda _, weight: 1 / weight.float().abs())
    counts = covered(control_mask(final, "low_magnitude", seed=0, weights=base.tensors()), final)
    print(f"| lowest abs(w), count per tensor of the final mask | {counts:.1%} | | | |")
    show("predicted (spacing)", base, final, args.dtype, by_spacing)
    for folder in args.checkpoints:
        saved = read_moments(folder)
        early = early_mask(base, folder, dtype=args.dtype)
        kept, precise = covered(early, final), covered(final, early)
        multiple = early.num_trainable / final.num_trainable
        print(f"| early, step {saved.step} | {kept:.1%} at {multiple:.2f}x, precision {precise:.1%} | | | |")
        remaining = (args.total_steps or saved.total_steps) - saved.step
        moments = dict(saved)
        score = by_forecast(moments, remaining)
        show(f"forecast, step {saved.step}", base, final, args.dtype, score)


def covered(mask: SubnetMask, final: SubnetMask) -> float:
    """Return which share of `final` a mask has."""
    return (mask & final).num_trainable / max(final.num_trainable, 1)


def by_spacing(_: str, weight: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.from_numpy(reach_keys(weight)).float())


def by_forecast(moments: dict[str, Moments], remaining: int) -> Score:
    def score(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in moments:
            return torch.zeros(weight.numel())
        return change_probability(weight, moments[name], remaining=remaining)

    return score


def show(label: str, base: Checkpoint, final: SubnetMask, dtype: str, score: Score) -> None:
    """Print a row: recall when the highest scores of the whole model are taken."""
    recalls, multiple = recall_at(base, final, dtype, score)
    cells = [f"{recall:.1%}" for recall in recalls]
    print(f"| {label} | " + " | ".join(cells) + f" | {multiple:.2f}x |", flush=True)


def recall_at(base: Checkpoint, final: SubnetMask, dtype: str, score: Score) -> tuple[list[float], float]:
    """Return the recall at every multiple of the final density, and the multiple at which it is `WANTED`."""
    everywhere, inside = (np.zeros(1 << (31 - _COARSE)) for _ in range(2))
    for name, stored in base.tensors():
        keys = magnitude_keys(score(name, stored.to(getattr(torch, dtype)).view(-1)), largest_first=True) >> _COARSE
        everywhere += np.bincount(keys, minlength=everywhere.size)
        inside += np.bincount(keys[final[name].view(-1).numpy()], minlength=inside.size)
    taken, hit = np.cumsum(everywhere) / final.num_trainable, np.cumsum(inside) / final.num_trainable
    return [float(np.interp(m, taken, hit)) for m in MULTIPLES], float(np.interp(WANTED, hit, taken))


if __name__ == "__main__":
    main()
