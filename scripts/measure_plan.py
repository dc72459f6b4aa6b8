#!/usr/bin/env python3
"""Train two steps of a recipe, count what they hold, and print it beside the plan: the table in docs/plan.md.

Usage: scripts/measure_plan.py RECIPE [key=value ...] [--methods full,subnet,lora] [--density 0.2] [--json]

Persistent bytes come from the ledger of the run, which counts tensors. Temporaries are every storage that torch
allocates during the second step, from the operation that makes it until it is freed: what TRL's head allocates is
`logits`, what has the shape of a trained matrix is `dense gradients`, the rest is `activations`. Runs on the CPU. The
mask is uniformly random, and sequences are planned as long as those of the measured batch were.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

import subnet_ft.training.run as training_run
from subnet_ft.bench.tracker import StorageTracker
from subnet_ft.pipeline import Pipeline, load_checked_recipe
from subnet_ft.plan.build import plan_row
from subnet_ft.plan.rank import Phase
from subnet_ft.plan.request import Request
from subnet_ft.plan.setting import setting_of
from subnet_ft.plan.temporaries import GRADIENT, owner_of

_HEAD = ("trl.kernels.chunked_logprob",)
_OURS = ("subnet_ft.optim", "subnet_kernels")
_SAMPLER = ("transformers.generation",)
LOGITS, OPTIMIZER, SAMPLING = "logits", "optimizer", "sampling"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--methods", default="full,subnet,lora")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for method in args.methods.split(","):
        rows += compare(args.recipe, args.overrides, method=method, density=args.density)
    if args.json:
        print(json.dumps(rows))
        return
    print("| method | component | planned, MB | measured, MB | planned / measured |\n|---|---|---|---|---|")
    for row in rows:
        ratio = "" if not row["measured"] else f"{row['planned'] / row['measured']:.3f}"
        planned, measured = row["planned"] / 1e6, row["measured"] / 1e6
        print(f"| {row['method']} | {row['component']} | {planned:,.2f} | {measured:,.2f} | {ratio} |")


def compare(recipe_name: str, overrides: Sequence[str], *, method: str, density: float) -> list[dict[str, Any]]:
    """Plan and train two steps, and return a row per component: what was planned and measured, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [
            f"output={folder}/run", "training.max_steps=2", "evaluation.enabled=false", f"method={method}",
            f"subnet.source={{kind: uniform, density: {density}}}", "training.logging_steps=1",
        ]  # fmt: skip
        recipe = load_checked_recipe(recipe_name, [*overrides, *fixed])
        measured, phases = _measure(recipe)
    request = Request(device="cpu", density=density)
    generation = setting_of(recipe, request, method).generation
    planned_sequences = setting_of(recipe, request, method).sequences
    if phases["sequences"] != planned_sequences:
        raise SystemExit(
            f"The measured batch has {phases['sequences']} sequences, and a whole one {planned_sequences}. Give the "
            "recipe more data, such as task.pairs.num_prompts=200."
        )
    length = phases["tokens"] if generation is None else phases["tokens"] - generation.new
    request = dataclasses.replace(request, **{"tokens" if generation is None else "prompt_tokens": length})
    row = plan_row(recipe, request, method, "none")
    assert row.memory is not None
    planned = {part.name: part.nbytes for part in row.memory.persistent}
    rows = [(name, planned.get(name, 0), measured.get(name.replace(" ", "_"), 0)) for name in planned]
    counted = [name.replace(" ", "_") for name in planned]
    rows.append(("persistent", sum(planned.values()), sum(measured.get(name, 0) for name in counted)))
    of = {phase.name: phase for phase in row.memory.phases}
    if recipe.algorithm not in ("ppo", "prime"):  # these keep activations of a second model, too
        rows.append(("activations kept for backward", _part(of["head"], "activations"), phases["saved"]))
    rows += [
        ("logits", _part(of["head"], "logits"), phases[LOGITS]),
        ("temporaries at the peak", max(of["head"].nbytes, of["backward"].nbytes), phases["peak"]),
    ]
    if "sampling" in of:
        rows.append(("sampling", of["sampling"].nbytes, phases[SAMPLING]))
    return [
        {"method": method, "component": name, "planned": planned, "measured": found} for name, planned, found in rows
    ]


def _part(phase: Phase, name: str) -> int:
    return sum(part.nbytes for part in phase.parts if part.name == name)


def _measure(recipe: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Train by a recipe of two steps; return the ledger, and the temporaries of the second step."""
    found: dict[str, int] = {}
    real = training_run.restrict

    def restrict(trainer: Any, *args: Any, **options: Any) -> Any:
        restricted = real(trainer, *args, **options)
        _watch(restricted, found)
        return restricted

    with mock.patch.object(training_run, "restrict", restrict):
        stage = Pipeline(recipe, overwrite=False, progress=False).train()
    return stage.results["memory"], found


def _watch(trainer: Any, found: dict[str, int]) -> None:
    by_shape = owner_of({tuple(p.shape) for p in trainer.model.parameters() if p.requires_grad})

    def owner(op: str, tensor: torch.Tensor) -> str:
        where = _where()
        # TRL's head holds the gradient of its weights in float32.
        return where if where is not None and by_shape(op, tensor) != GRADIENT else by_shape(op, tensor)

    prepare, compute, training_step = trainer._prepare_inputs, trainer.compute_loss, trainer.training_step
    steps = 0

    def count_tokens(module: torch.nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            found["sequences"], found["tokens"] = args[0].shape

    trainer.model.get_input_embeddings().register_forward_pre_hook(count_tokens)

    def tracked_step(*args: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps != 2:
            return training_step(*args, **options)
        tracker = StorageTracker(owner)

        def prepare_tracked(*args: Any, **options: Any) -> Any:
            prepared = prepare(*args, **options)
            tracker.mark()
            return prepared

        def compute_tracked(*args: Any, **options: Any) -> Any:
            loss = compute(*args, **options)
            found["saved"] = tracker.live.get("activations", 0) + tracker.live.get(LOGITS, 0)
            return loss

        patched = mock.patch.multiple(trainer, _prepare_inputs=prepare_tracked, compute_loss=compute_tracked)
        with patched, tracker:
            loss = training_step(*args, **options)
        before, during = tracker.peaks()
        found[SAMPLING] = before.highest.get(SAMPLING, 0)
        found[LOGITS] = during.highest.get(LOGITS, 0)
        found["peak"] = during.total
        return loss

    trainer.training_step = tracked_step


def _where() -> str | None:
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        name = frame.f_globals.get("__name__", "")
        if name.startswith(_HEAD):
            return LOGITS
        if name.startswith(_OURS):
            return OPTIMIZER
        if name.startswith(_SAMPLER):
            return SAMPLING
    return None


if __name__ == "__main__":
    main()
