"""Train, kill -9 at random moments, resume, and compare with a run that nobody killed.

Run as a program: it imports once and forks a child per attempt, so that a kill costs a second. Prints one JSON object.
Half of the kills come at a random moment of the run, half at a random moment of a save.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import random
import re
import shutil
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import numpy
import torch
from every_trainer import base_model, build
from helpers import random_mask, same_bits
from safetensors.torch import load_file
from transformers.trainer import safe_globals

from subnet_ft.training import restrict
from subnet_ft.training.delta_checkpoints import holds_delta, load_delta
from subnet_ft.training.resume import newest_complete, read_manifest
from subnet_ft.training.saving import STAGING

STEPS = 8
KILLS_PER_RUN = 3  # more would come one after another in the last step
SETTINGS: dict[str, dict[str, Any]] = {
    # 12 pairs in batches of 4: the run crosses the ends of two epochs. The reference moves every second step.
    "DPO": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
    # Completions serve 4 steps, so that most checkpoints lie in the middle of them.
    "GRPO": {"num_iterations": 2, "steps_per_generation": 2, "beta": 0.04},
}
IDLE, STEPPING, SAVING = 0, 1, 2
_NOT_COMPARED = re.compile(r"time|per_second|num_tokens")
"""Entries of the logs: times, and tokens seen, which DPO of TRL 1.16 counts from zero in every process."""


class Child:
    """A process that trains from the newest whole checkpoint of a folder, or from the start.

    Args:
        name: A key of `SETTINGS`.
        folder: The trainer's `output_dir`.
        only_delta: Its checkpoints hold deltas.
    """

    def __init__(self, name: str, folder: Path, *, only_delta: bool = False) -> None:
        # Shared with the child: its phase, and how many saves it has begun.
        self._shared = mmap.mmap(-1, 2)
        self._log = folder.with_suffix(".log")
        self._is_running = True
        self._only_delta = only_delta
        last = newest_complete(folder)
        self.first_step = 0 if last is None else int(last.name.rpartition("-")[2])
        self._pid = os.fork()
        if self._pid == 0:
            try:
                log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                self._train(name, folder)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)

    @property
    def phase(self) -> int:
        """What it is doing."""
        return self._shared[0]

    @property
    def num_saves(self) -> int:
        """How many saves it has begun."""
        return self._shared[1]

    def is_running(self) -> bool:
        """Whether it has not ended yet; one that failed is an error here."""
        if self._is_running:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._is_running = pid == 0
            if pid and status:
                raise RuntimeError(f"training failed:\n{self._log.read_text()[-4000:]}")
        return self._is_running

    def wait(self) -> None:
        """Let it train to its end."""
        while self.is_running():
            time.sleep(0.001)

    def kill(self, *, save: int | None, delay: float) -> str | None:
        """Kill it `delay` seconds after it began to train, or began that save.

        Returns:
            What it was doing, or `None` if it had ended before.
        """
        while self.is_running() and (self.phase == IDLE if save is None else self.num_saves < save):
            time.sleep(0.0005)
        time.sleep(delay)
        if not self.is_running():
            return None
        phase = self.phase
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        return {IDLE: "ending", STEPPING: "stepping", SAVING: "saving"}[phase]

    def _train(self, name: str, folder: Path) -> None:
        trainer: Any = build(
            name,
            folder,
            model=base_model(name),
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            lr_scheduler_type="linear",
            **SETTINGS[name],
        )
        restrict(trainer, random_mask(trainer.model, 0.3), save_only_delta=self._only_delta)
        save = trainer._save_checkpoint

        def watched(*args: Any) -> None:
            self._shared[0], self._shared[1] = SAVING, self._shared[1] + 1
            save(*args)
            self._shared[0] = STEPPING

        trainer._save_checkpoint = watched
        self._shared[0] = STEPPING
        trainer.train(resume_from_checkpoint=True if self.first_step else None)
        self._shared[0] = IDLE


def undisturbed(name: str, folder: Path) -> tuple[float, float]:
    """Run to the end; returns the seconds of training, and of one save on average."""
    child = Child(name, folder)
    ticks = {IDLE: 0, STEPPING: 0, SAVING: 0}
    while child.is_running():
        ticks[child.phase] += 1
        time.sleep(0.001)
    return 0.001 * (ticks[STEPPING] + ticks[SAVING]), 0.001 * ticks[SAVING] / STEPS


def weights_in(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """Load the weights of a checkpoint; those of one that holds a delta, with its base alone."""
    if not holds_delta(checkpoint):
        return load_file(checkpoint / "model.safetensors")
    model = base_model(name)
    load_delta(model, checkpoint)
    return {key: parameter.detach() for key, parameter in model.named_parameters()}


def contents(checkpoint: Path, name: str) -> dict[str, Any]:
    """Load everything of a checkpoint that training goes on from, and its logs."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    found: dict[str, Any] = {
        "model": weights_in(checkpoint, name),
        "logs": [{key: entry[key] for key in entry if not _NOT_COMPARED.search(key)} for entry in state["log_history"]],
        **{key: state[key] for key in ("global_step", "epoch", "max_steps")},
    }
    with safe_globals():  # what transformers lets numpy's random state be loaded with
        for file in sorted({*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")}):
            found[file.name] = torch.load(file, weights_only=True)
    return found


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """List where two nests of tensors, numbers and strings differ, bit by bit."""
    if isinstance(a, torch.Tensor):
        is_same = a.dtype == b.dtype and a.shape == b.shape and same_bits(a, b)
        return [] if is_same else [where]
    if isinstance(a, numpy.ndarray):
        return differences(torch.from_numpy(a), torch.from_numpy(b), where)
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [where]
        return [found for key in a for found in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [where]
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{where}/{i}")]
    return [] if a == b else [where]


def main() -> None:
    """Kill as often as asked, and compare every run that got to its end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=sorted(SETTINGS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-delta", action="store_true", help="kill runs whose checkpoints hold deltas")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    options.folder.mkdir(parents=True)
    # What is imported stays out of the children's collections, which would copy every page of it.
    gc.collect()
    gc.freeze()
    reference = options.folder / "reference"
    run_seconds, save_seconds = undisturbed(options.name, reference)
    expected = contents(reference / f"checkpoint-{STEPS}", options.name)
    kills = {"stepping": 0, "saving": 0, "ending": 0}
    resumed_from: dict[int, int] = {}
    runs = unfinished = 0
    problems: list[str] = []
    while sum(kills.values()) < options.kills:
        runs += 1
        folder = options.folder / f"run-{runs}"
        killed = 0
        while True:
            child = Child(options.name, folder, only_delta=options.only_delta)
            if child.first_step:
                resumed_from[child.first_step] = resumed_from.get(child.first_step, 0) + 1
            left = STEPS - child.first_step
            if killed == KILLS_PER_RUN or sum(kills.values()) == options.kills or not left:
                child.wait()
                break
            if chance.random() < 0.5:
                found = child.kill(save=chance.randint(1, left), delay=chance.uniform(0.0, save_seconds))
            else:
                found = child.kill(save=None, delay=chance.uniform(0.0, run_seconds * left / STEPS))
            if found is None:
                break
            kills[found] += 1
            killed += 1
            unfinished += (folder / STAGING).exists() and any((folder / STAGING).iterdir())
            for checkpoint in folder.glob("checkpoint-*"):
                read_manifest(checkpoint)  # raises where a kill left a part of one
                contents(checkpoint, options.name)
                assert holds_delta(checkpoint) == options.only_delta
        last = contents(folder / f"checkpoint-{STEPS}", options.name)
        problems += [f"run {runs}{found}" for found in differences(expected, last)]
        shutil.rmtree(folder)
    print(
        json.dumps(
            {
                "kills": kills,
                "runs": runs,
                "unfinished_checkpoints_found": int(unfinished),
                "resumed_from": dict(sorted(resumed_from.items())),
                "differences": problems,
                "run_seconds": run_seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
