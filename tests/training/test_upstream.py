"""What is taken for granted about transformers and TRL: signatures, order of calls, files.

The table of signatures is in `upstream.py`; `test_upstream_optimizers.py` is about accelerate and torch.
Everything here runs the installed upstream packages without our code.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from small_runs import FIRST_IS_BEST, plain
from training.every_trainer import TRAINERS, build
from training.upstream import (
    CHECKPOINTS,
    MIXIN,
    OVERRIDDEN,
    RESUME,
    ROLLOUTS,
    SAVING,
    TAKEN,
    Taken,
    differs,
    expect,
    override_problems,
    problem,
)
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import sort_checkpoints
from trl.trainer.utils import RepeatSampler

from subnet_ft.training.mixin import SubnetTrainerMixin

ROOT = Path(__file__).resolve().parents[2]
STABLE = [f"trl:{name}" for name in dir(trl) if name.endswith("Trainer")]
EXPERIMENTAL = ["trl.experimental.orpo:ORPOTrainer", "trl.experimental.cpo:CPOTrainer"]


@pytest.mark.parametrize("taken", TAKEN, ids=lambda taken: taken.where)
def test_upstream_takes_what_the_table_says(taken: Taken) -> None:
    assert problem(taken) is None, problem(taken)


def test_the_table_has_every_method_of_a_trainer_that_is_overridden() -> None:
    ours = SubnetTrainerMixin.__mro__[: SubnetTrainerMixin.__mro__.index(object)]
    shadowed = {name for owner in ours for name in vars(owner) if hasattr(Trainer, name) and not name.startswith("__")}
    assert shadowed == OVERRIDDEN.keys()


@pytest.mark.parametrize("taken", TAKEN, ids=lambda taken: taken.where)
def test_the_table_names_a_file_that_relies_on(taken: Taken) -> None:
    assert taken.where.rpartition(".")[2].rpartition(":")[2] in (ROOT / taken.used_by).read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.parametrize("where", STABLE + EXPERIMENTAL)
def test_trainers_override_the_same_methods_with_the_same_parameters(where: str) -> None:
    module, _, name = where.partition(":")
    trainer_class = getattr(importlib.import_module(module), name)
    problems = override_problems(trainer_class, Trainer)
    assert problems == [], "\n".join(problems)


@pytest.mark.parametrize(
    ("replacement", "said"),
    [
        (lambda self, model, foreach: None, "takes (self, model, foreach), expected (self, model)"),
        (None, "is gone"),
    ],
)
def test_a_changed_signature_is_named(
    replacement: Callable[..., Any] | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if replacement is None:
        monkeypatch.delattr(Trainer, "_clip_grad_norm")
    else:
        monkeypatch.setattr(Trainer, "_clip_grad_norm", replacement)
    message = problem(OVERRIDDEN["_clip_grad_norm"])
    assert message is not None
    assert message.startswith(f"transformers {transformers.__version__}: `transformers.Trainer._clip_grad_norm` {said}")
    assert f"`{MIXIN}` relies on it" in message


def test_a_changed_override_is_named() -> None:
    class Changed(Trainer):
        __module__ = "trl"

        def _get_output_dir(self, trial: Any, step: int) -> str:
            return super()._get_output_dir(trial)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            return None

    found = override_problems(Changed, Trainer)
    assert len(found) == 2
    assert any("_get_output_dir` takes (self, trial, step), expected (self, trial)" in message for message in found)
    assert any("_save_checkpoint` never calls `super()._save_checkpoint`" in message for message in found)


class Events(TrainerCallback):
    """Writes down what a trainer calls, in order: watched methods by name, optimizer steps, and its callbacks."""

    def __init__(self, trainer: Trainer) -> None:
        self.seen: list[str] = []
        trainer.add_callback(self)

    def watch(self, owner: Any, *names: str) -> None:
        """Note every call of these methods of an object."""
        for name in names:
            setattr(owner, name, self._noted(name, getattr(owner, name)))

    def _noted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.seen.append(name)
            return method(*args, **kwargs)

        return noted

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("on_train_begin")
        kwargs["optimizer"].optimizer.register_step_pre_hook(lambda *_: self.seen.append("step"))

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("on_pre_optimizer_step")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("on_step_end")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("on_train_end")


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_trainer_clips_then_measures_then_steps_then_logs_then_saves(tmp_path: Path, max_grad_norm: float) -> None:
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_grad_norm": max_grad_norm}
    trainer = build("Trainer", tmp_path, save_strategy="steps", save_steps=1, **options)
    events = Events(trainer)
    events.watch(trainer, "training_step", "_clip_grad_norm", "_get_grad_norm", "log", "_save_checkpoint")
    trainer.train()
    step = [
        *["training_step", "training_step"],
        *(["_clip_grad_norm"] if max_grad_norm else []),
        *["_get_grad_norm", "on_pre_optimizer_step", "step", "on_step_end", "log", "_save_checkpoint"],
    ]
    expect(
        events.seen, ["on_train_begin", *step, *step, "log", "on_train_end"], "transformers:Trainer._run_epoch", MIXIN
    )


def test_trainer_drops_the_gradients_of_the_model_before_the_step_ends(tmp_path: Path) -> None:
    trainer = build("Trainer", tmp_path, max_steps=1)
    events = Events(trainer)
    events.watch(trainer.model, "zero_grad")
    trainer.train()
    order = ["zero_grad", "on_train_begin", "on_pre_optimizer_step", "step", "zero_grad", "on_step_end", "on_train_end"]
    expect(events.seen, order, "transformers:Trainer._run_epoch", MIXIN)


def test_trainer_ends_when_an_epoch_asks_for_it_before_its_first_step(tmp_path: Path) -> None:
    trainer: Any = build("Trainer", tmp_path)
    trainer._run_epoch = lambda **_: setattr(trainer.control, "should_training_stop", True)
    found = trainer.train()
    expect(
        (found.global_step, trainer.state.global_step), (0, 0), "transformers:Trainer._inner_training_loop", CHECKPOINTS
    )


def test_trainer_logs_what_get_grad_norm_returns(tmp_path: Path) -> None:
    trainer: Any = build("Trainer", tmp_path)
    given: list[Any] = []
    trainer._clip_grad_norm = lambda model: torch.tensor(3.0)
    trainer._get_grad_norm = lambda model, grad_norm=None: given.append(grad_norm) or torch.tensor(7.5)
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    expect(given, [torch.tensor(3.0)] * 2, "transformers:Trainer._run_epoch", MIXIN)
    expect(logged, [7.5, 7.5], "transformers:Trainer._maybe_log_save_evaluate", MIXIN)


def test_trainer_resumes_weights_then_optimizer_then_its_state(tmp_path: Path) -> None:
    build("Trainer", tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    trainer = build("Trainer", tmp_path)
    events = Events(trainer)
    events.watch(trainer, "_load_from_checkpoint", "create_optimizer", "_load_optimizer_and_scheduler")
    events.watch(trainer.accelerator, "prepare_optimizer")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    order = ["_load_from_checkpoint", "create_optimizer", "prepare_optimizer", "_load_optimizer_and_scheduler"]
    expect(events.seen[:5], [*order, "on_train_begin"], "transformers:Trainer._prepare_for_training", CHECKPOINTS)


def test_trainer_loads_the_weights_of_a_checkpoint_into_the_model_that_it_has(tmp_path: Path) -> None:
    build("Trainer", tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    trainer = build("Trainer", tmp_path)
    model, kept = trainer.model, dict(trainer.model.named_parameters())
    for parameter in kept.values():
        parameter.data.zero_()
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    found = dict(trainer.model.named_parameters())
    where = "transformers:Trainer._load_from_checkpoint"
    expect(trainer.model is model and all(found[name] is kept[name] for name in kept), True, where, CHECKPOINTS)
    expect([name for name in kept if not kept[name].any()], [], where, CHECKPOINTS)


def test_trainer_loads_the_best_model_once_after_the_last_step_and_before_train_ends(tmp_path: Path) -> None:
    trainer = plain(tmp_path, max_steps=2, **FIRST_IS_BEST)
    events = Events(trainer)
    events.watch(trainer, "_load_best_model")
    trainer.train()
    where = "transformers:Trainer._finalize_training"
    expect(events.seen[-3:], ["on_step_end", "_load_best_model", "on_train_end"], where, CHECKPOINTS)
    expect(trainer.state.best_model_checkpoint, str(tmp_path / "checkpoint-1"), where, CHECKPOINTS)


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_write_checkpoints_where_get_output_dir_says_and_their_state_last(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    written = tmp_path / "aside" / "checkpoint-1"
    before: list[set[str]] = []
    save = TrainerState.save_to_json

    def spied(state: TrainerState, json_path: str) -> None:
        before.append(files(written))
        save(state, json_path)

    trainer: Any = build(name, tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    trainer._get_output_dir = lambda trial: str(tmp_path / "aside")
    monkeypatch.setattr(TrainerState, "save_to_json", spied)
    trainer.train()
    where = f"{type(trainer).__module__}:{type(trainer).__name__}._save_checkpoint"
    expect([path.name for path in (tmp_path / "run").glob("checkpoint-*")], [], where, CHECKPOINTS)
    needed = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    expect(needed - files(written), set(), where, RESUME)
    expect([files(written) - earlier for earlier in before], [{"trainer_state.json"}], where, SAVING)


def test_trainer_saves_then_pushes_then_rotates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Push and rotation of the folder in which a checkpoint is only being written must be ours to put off."""
    trainer: Any = build("Trainer", tmp_path, max_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1)
    events = Events(trainer)
    saving = ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "_push_from_checkpoint"]
    trainer._push_from_checkpoint = lambda checkpoint_folder: None
    events.watch(trainer, *saving)
    given: dict[str, Any] = {}
    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", lambda **options: given.update(options))
    trainer.args.push_to_hub = True
    trainer.is_in_train = True
    trainer.create_optimizer_and_scheduler(1)
    trainer._save_checkpoint(trainer.model, None)
    expect(events.seen, saving, "transformers:Trainer._save_checkpoint", CHECKPOINTS)
    expect(given.get("output_dir"), str(tmp_path), "transformers:Trainer._save_checkpoint", SAVING)


@pytest.mark.parametrize("name", ["GRPO", "RLOO", "Distillation"])
def test_trainers_keep_completions_under_the_names_that_are_saved(name: str, tmp_path: Path) -> None:
    trainer: Any = build(name, tmp_path, gradient_accumulation_steps=2, max_steps=1)
    where = f"{type(trainer).__module__}:{type(trainer).__name__}._prepare_inputs"
    found = {key: vars(trainer).get(key, "nothing") for key in ("_step", "_buffered_inputs")}
    expect(found, {"_step": 0, "_buffered_inputs": None}, where, ROLLOUTS)
    trainer.train()
    expect(trainer._step, 2, where, ROLLOUTS)
    expect([type(part) for part in trainer._buffered_inputs], [dict, dict], where, ROLLOUTS)
    # What a resumed run puts back is used, not sampled again, as long as the step is inside a generation.
    first, second = {"input_ids": torch.zeros(1)}, {"input_ids": torch.ones(1)}
    trainer._step, trainer._buffered_inputs = 1, [first, second]
    trainer.model.train()
    assert trainer._prepare_inputs({}) is second, differs(where, "samples anew inside a generation", ROLLOUTS)


def test_repeat_sampler_draws_once_per_epoch_from_its_own_generator() -> None:
    sampler = RepeatSampler(range(7), mini_repeat_count=2, batch_size=3, repeat_count=1, shuffle=True, seed=3)
    where = "trl:trainer.utils.RepeatSampler"
    expect([sampler.shuffle, sampler.num_samples, type(sampler.generator)], [True, 7, torch.Generator], where, RESUME)
    first, second = list(sampler), list(sampler)
    again = RepeatSampler(range(7), mini_repeat_count=2, batch_size=3, repeat_count=1, shuffle=True, seed=3)
    torch.randperm(again.num_samples, generator=again.generator)
    assert first != second
    expect(list(again), second, where, RESUME)


def test_sort_checkpoints_lists_folders_from_the_oldest_to_the_newest(tmp_path: Path) -> None:
    for age, step in enumerate((2, 10, 9)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (age * 100, age * 100))
    (tmp_path / ".unfinished").mkdir()
    found = [
        [Path(path).name for path in sort_checkpoints(str(tmp_path), use_mtime=use_mtime)]
        for use_mtime in (True, False)
    ]
    by_age, by_step = (
        ["checkpoint-2", "checkpoint-10", "checkpoint-9"],
        ["checkpoint-2", "checkpoint-9", "checkpoint-10"],
    )
    expect(found, [by_age, by_step], "transformers:trainer_utils.sort_checkpoints", SAVING)
