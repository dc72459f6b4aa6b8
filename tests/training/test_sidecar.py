"""What transformers does not save: completions in use, what is trained beside the model, and a reference that moves."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import same_bits
from small_runs import FIRST_IS_BEST, SAVES, cut_off, damaged, restricted, steps_of
from training.every_trainer import base_model, build
from training.masked_runs import same_state, same_weights, state_of, third_of, weights_of

from subnet_ft.errors import CheckpointError, TrainerError
from subnet_ft.training import restrict
from subnet_ft.training.saving import MANIFEST
from subnet_ft.training.sidecar import load_extras, load_rollouts, save_extras, save_rollouts


def sampling(inputs: Any, step: int = 5, process: int = 0) -> Any:
    """Stand for a trainer that samples: what it has in use, and where in it."""
    args = SimpleNamespace(process_index=process, device=torch.device("cpu"), steps_per_generation=4)
    return SimpleNamespace(_buffered_inputs=inputs, _step=step, args=args)


def completions() -> list[dict[str, Any]]:
    nan = torch.tensor([float("nan"), -0.0])
    return [
        {"ids": torch.arange(6).view(2, 3), "advantages": nan, "none": None, "items": 3, "texts": ["a", ("b", 2.5)]}
    ]


def test_rollouts_are_saved_and_come_back_bit_by_bit(tmp_path: Path) -> None:
    save_rollouts(sampling(completions()), tmp_path)
    trainer = sampling(None, step=0)
    load_rollouts(trainer, tmp_path)
    assert trainer._step == 5
    (found,), (expected,) = trainer._buffered_inputs, completions()
    assert found.keys() == expected.keys()
    assert all(same_bits(found[key], expected[key]) for key in ("ids", "advantages"))
    assert [found[key] for key in ("none", "items", "texts")] == [None, 3, ["a", ("b", 2.5)]]


def test_rollouts_of_a_trainer_between_two_batches_are_nothing(tmp_path: Path) -> None:
    save_rollouts(sampling(None, step=8), tmp_path)
    trainer = sampling(completions(), step=0)
    load_rollouts(trainer, tmp_path)
    assert (trainer._step, trainer._buffered_inputs) == (8, None)


def test_every_process_has_its_own_rollouts(tmp_path: Path) -> None:
    for process in (0, 1):
        save_rollouts(sampling([torch.tensor(process)], process=process), tmp_path)
    for process in (0, 1):
        trainer = sampling(None, process=process)
        load_rollouts(trainer, tmp_path)
        assert trainer._buffered_inputs == [torch.tensor(process)]


def test_rollouts_that_torch_would_unpickle_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for strange in (Path(), {1, 2}, object()):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            save_rollouts(sampling([{"deep": [(strange,)]}]), tmp_path)
        assert len(caplog.messages) == 1
        assert type(strange).__name__ in caplog.messages[0]
        trainer = sampling(completions())
        load_rollouts(trainer, tmp_path)
        assert trainer._buffered_inputs is None


def test_a_trainer_that_does_not_sample_has_no_rollouts(tmp_path: Path) -> None:
    trainer = SimpleNamespace(args=SimpleNamespace(process_index=0))
    save_rollouts(trainer, tmp_path)
    load_rollouts(trainer, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A GRPO trainer after three steps, two of which share completions; nobody may write to its folder."""
    trainer = sampler(tmp_path_factory.mktemp("sampled"), **SAVES)
    trainer.train()
    return trainer


def sampler(folder: Path, **options: Any) -> Any:
    model = base_model("GRPO")
    known = {"max_steps": 3, "steps_per_generation": 2}
    return restrict(build("GRPO", folder, model=model, **{**known, **options}), third_of(model))


def test_one_flipped_bit_of_the_completions_is_refused_by_name_and_passed_over(sampled: Any, tmp_path: Path) -> None:
    run = shutil.copytree(sampled.args.output_dir, tmp_path / "run")
    damaged(run / "checkpoint-2" / "subnet_rollouts_0.pt")
    shutil.rmtree(run / "checkpoint-3")
    trainer = sampler(run)
    start, steps = weights_of(trainer.model), steps_of(trainer)
    with pytest.raises(CheckpointError, match=r"`subnet_rollouts_0\.pt` is not as it was written"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    same_weights(weights_of(trainer.model), start)
    trainer.train(resume_from_checkpoint=True)
    assert steps == [2, 3]
    same_weights(weights_of(trainer.model), weights_of(sampled.model))


@pytest.mark.parametrize("wrote", [2, 8])
def test_completions_of_more_processes_than_go_on_are_refused(sampled: Any, tmp_path: Path, wrote: int) -> None:
    run = shutil.copytree(sampled.args.output_dir, tmp_path / "run")
    manifest = json.loads((run / "checkpoint-1" / MANIFEST).read_text())
    (run / "checkpoint-1" / MANIFEST).write_text(json.dumps({**manifest, "num_processes": wrote}))
    trainer = sampler(run)
    start = weights_of(trainer.model)
    with pytest.raises(TrainerError, match=f"{wrote} processes wrote `{run / 'checkpoint-1'}`, 1 would go on, and the"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    same_weights(weights_of(trainer.model), start)


def test_completions_of_fewer_processes_than_go_on_are_refused(
    sampled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = sampler(tmp_path)
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: 2))
    with pytest.raises(TrainerError, match=r"1 processes wrote .*, 2 would go on.*Start as many as before"):
        trainer.train(resume_from_checkpoint=str(Path(sampled.args.output_dir) / "checkpoint-1"))


def test_where_completions_are_used_up_another_number_of_processes_samples_anew(
    sampled: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(sampled.args.output_dir, tmp_path / "run")
    manifest = json.loads((run / "checkpoint-2" / MANIFEST).read_text())
    (run / "checkpoint-2" / MANIFEST).write_text(json.dumps({**manifest, "num_processes": 2}))
    trainer = sampler(run)
    steps = steps_of(trainer)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert steps == [3]
    assert "not with the bits of a run that was not interrupted" in caplog.text


class Value:
    """A value model with its optimizer, trained a little at every step of the policy."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.head = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=0.1)

    def train_beside(self, trainer: Any) -> None:
        step = trainer.training_step

        def both(*args: Any, **kwargs: Any) -> Any:
            loss = step(*args, **kwargs)
            generator = torch.Generator().manual_seed(trainer.state.global_step)
            self.head(torch.randn(4, 3, generator=generator)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return loss

        trainer.training_step = both

    @property
    def extras(self) -> dict[str, Any]:
        return {"value": self.head, "value_optimizer": self.optimizer}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.head.state_dict().items()}


def with_value(folder: Path, **options: Any) -> tuple[Any, Value]:
    value = Value()
    trainer = restricted(folder, subnet={"extras": value.extras}, **options)
    value.train_beside(trainer)
    return trainer, value


def test_extras_are_part_of_every_checkpoint(tmp_path: Path) -> None:
    trainer, value = with_value(tmp_path / "straight")
    start = value.weights()
    trainer.train()
    assert all(not torch.equal(value.weights()[name], start[name]) for name in start)
    broken, _ = with_value(tmp_path / "cut", **SAVES)
    cut_off(broken, after=4)
    for step in (1, 2, 3):
        again, other = with_value(tmp_path / "cut")
        again.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
        same_weights(other.weights(), value.weights())
        same_weights(weights_of(again.model), weights_of(trainer.model))


def test_extras_of_a_finished_run_are_loaded(tmp_path: Path) -> None:
    trainer, value = with_value(tmp_path, **SAVES)
    trainer.train()
    again, other = with_value(tmp_path)
    again.train(resume_from_checkpoint=True)
    same_weights(other.weights(), value.weights())


@pytest.mark.parametrize("step", [1, 2])
def test_other_extras_than_those_of_the_run_are_refused(tmp_path: Path, step: int) -> None:
    trainer, _ = with_value(tmp_path, max_steps=2, **SAVES)
    trainer.train()
    checkpoint = str(tmp_path / f"checkpoint-{step}")
    value = Value()
    known = r"holds \['value', 'value_optimizer'\] beside the model, this trainer"
    for extras, found in (
        ({}, "nothing"),
        ({"value": value.head}, r"\['value'\]"),
        ({**value.extras, "third": torch.nn.Linear(1, 1)}, r"\['third', 'value', 'value_optimizer'\]"),
        ({"value": value.head, "optimizer": value.optimizer}, r"\['optimizer', 'value'\]"),
    ):
        before = value.weights()
        with pytest.raises(TrainerError, match=f"{known} {found}. Pass the same `extras`"):
            restricted(tmp_path, max_steps=2, subnet={"extras": extras}).train(resume_from_checkpoint=checkpoint)
        same_weights(value.weights(), before)
    without = restricted(tmp_path / "without", max_steps=2, **SAVES)
    without.train()
    with pytest.raises(TrainerError, match=r"holds nothing beside the model, this trainer \['value', 'value_optimizer"):
        with_value(tmp_path, max_steps=2)[0].train(resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-1"))


class Strange:
    """Holds something that torch would have to unpickle."""

    def __init__(self, strange: Any) -> None:
        self.strange = strange

    def state_dict(self) -> dict[str, Any]:
        return {"deep": [{"number": 1}, (self.strange,)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError(state_dict)


@pytest.mark.parametrize("strange", [Path("x"), {1, 2}, object()])
def test_extras_that_could_not_be_loaded_again_are_refused_at_the_first_save(tmp_path: Path, strange: Any) -> None:
    extras = {"value": torch.nn.Linear(1, 1), "odd": Strange(strange)}
    trainer = restricted(tmp_path, subnet={"extras": extras}, **SAVES)
    steps = steps_of(trainer)
    with pytest.raises(TrainerError, match=f"`odd`, one of the extras, has a {type(strange).__name__} in its state"):
        trainer.train()
    assert steps == [1]
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_extras_do_not_unpickle(tmp_path: Path) -> None:
    torch.save({"strange": {"path": Path()}}, tmp_path / "subnet_extras.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_extras({"strange": Strange(None)}, tmp_path)


def test_without_extras_there_is_no_file(tmp_path: Path) -> None:
    save_extras({}, tmp_path)
    assert list(tmp_path.iterdir()) == []
    load_extras({}, tmp_path)


def syncing(folder: Path, **options: Any) -> Any:
    model = base_model("DPO")
    known = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "max_steps": 5}
    return restrict(build("DPO", folder, model=model, **{**known, **options}), third_of(model))


def test_a_reference_that_is_synced_resumes_to_the_same_bits(tmp_path: Path) -> None:
    straight = syncing(tmp_path / "straight")
    start = weights_of(straight.ref_model)
    straight.train()
    moved = weights_of(straight.ref_model)
    assert [name for name in start if not same_bits(moved[name], start[name])] != []
    broken = syncing(tmp_path / "cut", **SAVES)
    cut_off(broken, after=5)
    for step in (2, 3):  # at a sync, and between two
        again = syncing(tmp_path / "cut")
        again.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
        same_weights(weights_of(again.ref_model), moved)
        same_weights(weights_of(again.model), weights_of(straight.model))
        same_state(state_of(again), state_of(straight))
    shutil.rmtree(tmp_path / "cut" / "checkpoint-3")
    still = syncing(tmp_path / "cut", sync_ref_model=False)
    with pytest.raises(TrainerError, match=r"holds \['ref_model'\] beside the model, this trainer nothing"):
        still.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))


def test_the_best_model_does_not_take_the_extras_back(tmp_path: Path) -> None:
    """`load_best_model_at_end` is about the model; what is trained beside it stays where it is, as without a mask."""
    trainer, value = with_value(tmp_path / "best", **FIRST_IS_BEST)
    trainer.train()
    straight, other = with_value(tmp_path / "straight")
    straight.train()
    same_weights(value.weights(), other.weights())
