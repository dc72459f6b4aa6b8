"""What a run may continue from, what is refused before the model is touched, and what a finished run becomes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from masked_optimizers import weights_of as by_name
from small_runs import FIRST_IS_BEST, SAVES, cut_off, damaged, plain, restricted, steps_of, usual_mask
from training.masked_runs import same_state, same_weights, state_of, weights_of
from transformers.trainer_utils import get_last_checkpoint
from trl.trainer.utils import RepeatSampler

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import CheckpointError, TrainerError
from subnet_ft.training.resume import (
    NoSaveAtTheEnd,
    newest_complete,
    read_manifest,
    remove_checkpoints,
    replayed,
    trained_epochs,
)
from subnet_ft.training.saving import MANIFEST


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a checkpoint of each; nobody may write there."""
    folder = tmp_path_factory.mktemp("finished")
    restricted(folder, **SAVES).train()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer that ran to the end without being interrupted."""
    trainer = restricted(tmp_path_factory.mktemp("straight"))
    trainer.train()
    return trainer


def edited(**changes: Any) -> Callable[[Path], None]:
    """Change entries of a manifest; `None` removes one."""

    def damage(checkpoint: Path) -> None:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        manifest.update(changes)
        kept = {key: value for key, value in manifest.items() if value is not None}
        (checkpoint / MANIFEST).write_text(json.dumps(kept))

    return damage


def replaced(text: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / MANIFEST).write_text(text)  # type: ignore[return-value]


def truncated(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:-1])

    return damage


def flipped(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: damaged(checkpoint / name)


def missing(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "config.json",
    "subnet_start_0.pt",
)
BROKEN: list[tuple[Callable[[Path], None], str]] = [
    *((missing(name), f"`{name}` is missing") for name in FILES),
    *(
        (damage(name), rf"`{name}` is not as it was written \(SHA-256 \w{{16}}, then \w{{16}}\)")
        for damage in (truncated, flipped)
        for name in FILES
    ),
    (missing(MANIFEST), f"it has no `{MANIFEST}`"),
    (replaced(""), f"its `{MANIFEST}` cannot be read"),
    (replaced("{"), f"its `{MANIFEST}` cannot be read"),
    (replaced("[]"), f"its `{MANIFEST}` cannot be read"),
    (replaced("null"), f"its `{MANIFEST}` cannot be read"),
    (edited(files=[]), f"its `{MANIFEST}` cannot be read"),
    (edited(files={"model.safetensors": "many"}), "`model.safetensors` is not as it was written"),
    (edited(files=None), f"its `{MANIFEST}` cannot be read"),
    (edited(files={}), "saved without `optimizer.pt`"),
    (edited(format=99), f"its `{MANIFEST}` has format 99"),
    (edited(format=None), f"its `{MANIFEST}` cannot be read"),
    (edited(global_step=None), f"its `{MANIFEST}` cannot be read"),
    (edited(global_step="2"), f"its `{MANIFEST}` cannot be read"),
    (edited(mask_fingerprint=None), f"its `{MANIFEST}` cannot be read"),
    (edited(mask_fingerprint=7), f"its `{MANIFEST}` cannot be read"),
    (edited(base_fingerprints=[1]), f"its `{MANIFEST}` cannot be read"),
    (edited(base_fingerprints=None), f"its `{MANIFEST}` cannot be read"),
    (edited(num_processes=None), f"its `{MANIFEST}` cannot be read"),
    (edited(num_processes="one"), f"its `{MANIFEST}` cannot be read"),
    (edited(weights=None), f"its `{MANIFEST}` cannot be read"),
]


@pytest.mark.parametrize(("damage", "problem"), BROKEN)
def test_a_broken_checkpoint_is_named_passed_over_and_refused(
    damage: Callable[[Path], None], problem: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(run / "checkpoint-4")
    assert newest_complete(run) == run / "checkpoint-3"
    (message,) = caplog.messages
    assert message.startswith(f"not resuming from `{run / 'checkpoint-4'}`: ")
    with pytest.raises(CheckpointError, match=problem) as error:
        read_manifest(run / "checkpoint-4")
    assert f"`{run / 'checkpoint-3'}` is whole" in str(error.value)


def test_an_extra_file_does_no_harm(run: Path) -> None:
    (run / "checkpoint-4" / "notes.txt").write_text("the good one")
    assert newest_complete(run) == run / "checkpoint-4"
    assert read_manifest(run / "checkpoint-4")["global_step"] == 4


def test_newest_complete_goes_by_the_numbers_that_transformers_knows(run: Path) -> None:
    (run / "checkpoint-4").rename(run / "checkpoint-10")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-copy-99")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-3-old")
    shutil.copytree(run / "checkpoint-2", run / "my-checkpoint-98")
    (run / "checkpoint-97").touch()
    (run / "checkpoint-notes.txt").touch()
    assert newest_complete(run) == run / "checkpoint-10"
    (run / "checkpoint-97").unlink()
    assert get_last_checkpoint(str(run)) == str(run / "checkpoint-10")
    remove_checkpoints(run)
    kept = {path.name for path in run.iterdir() if path.name.startswith(("checkpoint", "my"))}
    assert kept == {"checkpoint-copy-99", "checkpoint-3-old", "my-checkpoint-98", "checkpoint-notes.txt"}


def test_where_nothing_is_whole_both_ways_say_so(run: Path) -> None:
    for step in (1, 2, 3, 4):
        (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
    trainer = restricted(run)
    start = weights_of(trainer.model)
    with pytest.raises(CheckpointError, match=r"nothing to resume from: .*`checkpoint-3`: `optimizer\.pt` is missing"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"`optimizer\.pt` is missing.*No checkpoint beside it is whole"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    same_weights(weights_of(trainer.model), start)
    assert trainer.optimizer is None


def test_a_path_that_is_no_checkpoint_is_refused(run: Path) -> None:
    trainer = restricted(run)
    for path in (run / "checkpoint-9", run):
        with pytest.raises(CheckpointError, match=f"Cannot resume from `{path}`: it has no `{MANIFEST}`"):
            trainer.train(resume_from_checkpoint=str(path))
    plain(run / "plain", max_steps=1, **SAVES).train()
    with pytest.raises(CheckpointError, match="was not written by a restricted trainer"):
        trainer.train(resume_from_checkpoint=str(run / "plain" / "checkpoint-1"))


def test_resume_goes_on_from_the_newest_that_is_whole(run: Path, straight: Any) -> None:
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    (run / "checkpoint-3" / "scheduler.pt").write_bytes(b"")
    trainer = restricted(run)
    steps = steps_of(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert steps == [3, 4]
    same_weights(weights_of(trainer.model), weights_of(straight.model))
    same_state(state_of(trainer), state_of(straight))


def test_a_folder_without_checkpoints_has_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"`{tmp_path}` holds nothing to resume from"):
        restricted(tmp_path).train(resume_from_checkpoint=True)


def test_what_is_drawn_before_a_run_resumes_does_not_change_it(tmp_path: Path) -> None:
    """The order of the data comes from torch's own generator, which anybody may have seeded."""
    trainers = []
    for name, seed in (("one", 1), ("one again", 1), ("two", 2)):
        trainer = restricted(tmp_path / name, **SAVES)
        torch.manual_seed(seed)
        trainer.train()
        trainers.append(trainer)
    one, again, two = (weights_of(trainer.model) for trainer in trainers)
    same_weights(one, again)
    assert any(not same_bits(one[name], two[name]) for name in one)  # other data, or the test shows nothing
    for step in (1, 3):
        resumed = restricted(tmp_path / "two")
        torch.manual_seed(5)
        torch.rand(5)
        resumed.train(resume_from_checkpoint=str(tmp_path / "two" / f"checkpoint-{step}"))
        same_weights(weights_of(resumed.model), two)


@pytest.mark.parametrize("step", [1, 3])
def test_an_explicit_checkpoint_is_the_one_that_is_resumed(run: Path, straight: Any, step: int) -> None:
    trainer = restricted(run)
    steps = steps_of(trainer)
    trainer.train(resume_from_checkpoint=str(run / f"checkpoint-{step}"))
    assert steps == list(range(step + 1, 5))
    same_weights(weights_of(trainer.model), weights_of(straight.model))
    same_state(state_of(trainer), state_of(straight))


def test_a_trainer_that_was_cut_off_resumes_itself(tmp_path: Path, straight: Any) -> None:
    trainer = restricted(tmp_path, subnet={"audit_steps": 1}, **SAVES)
    cut_off(trainer, after=3)
    trainer.train(resume_from_checkpoint=True)
    same_weights(weights_of(trainer.model), weights_of(straight.model))
    same_state(state_of(trainer), state_of(straight))


@pytest.mark.parametrize("options", [{}, {"max_steps": -1, "num_train_epochs": 4 / 3}])
def test_a_finished_run_resumes_to_its_weights_without_a_step(run: Path, straight: Any, options: Any) -> None:
    trainer = restricted(run, subnet={"audit_steps": 2}, **options)
    steps = steps_of(trainer)
    result = trainer.train(resume_from_checkpoint=True)
    assert steps == []
    assert result.global_step == trainer.state.global_step == 4
    same_weights(weights_of(trainer.model), weights_of(straight.model))
    same_state(state_of(trainer), state_of(straight))
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4]


def test_a_finished_run_that_is_given_more_steps_goes_on(tmp_path: Path) -> None:
    constant = {"lr_scheduler_type": "constant"}
    longer = restricted(tmp_path / "longer", max_steps=6, **constant)
    longer.train()
    restricted(tmp_path / "run", **constant, **SAVES).train()
    trainer = restricted(tmp_path / "run", max_steps=6, **constant)
    steps = steps_of(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert steps == [5, 6]
    same_weights(weights_of(trainer.model), weights_of(longer.model))


def test_a_finished_run_resumes_to_its_best_weights(tmp_path: Path) -> None:
    first = restricted(tmp_path, **FIRST_IS_BEST)
    first.train()
    trainer = restricted(tmp_path, **FIRST_IS_BEST)
    trainer.train(resume_from_checkpoint=True)
    same_weights(weights_of(trainer.model), weights_of(first.model))
    assert trainer.state.best_model_checkpoint == first.state.best_model_checkpoint
    last = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert last["state"].keys() == trainer.masked_optimizer.state_dict()["state"].keys()


def test_resume_false_and_none_start_from_the_beginning(run: Path) -> None:
    for asked in (None, False):
        trainer = restricted(run, max_steps=1)
        steps = steps_of(trainer)
        trainer.train(resume_from_checkpoint=asked)
        assert steps == [1]


def test_the_masked_optimizer_does_not_exist_before_training(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="masked optimizer"):
        _ = restricted(tmp_path).masked_optimizer


def test_no_save_at_the_end_takes_back_only_the_last_save(tmp_path: Path) -> None:
    trainer = restricted(tmp_path, callbacks=[NoSaveAtTheEnd()], **SAVES)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (1, 2, 3)]


def test_trained_epochs_counts_whole_ones(finished: Path) -> None:
    assert [trained_epochs(finished / f"checkpoint-{step}") for step in (1, 2, 3, 4)] == [0, 0, 1, 1]


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_replayed_draws_the_orders_of_the_finished_epochs_again(epochs: int) -> None:
    def sampler(shuffle: bool = True) -> RepeatSampler:
        return RepeatSampler(range(11), mini_repeat_count=2, batch_size=3, repeat_count=2, shuffle=shuffle, seed=4)

    uninterrupted = sampler()
    orders = [list(uninterrupted) for _ in range(epochs + 2)]
    again = replayed(sampler(), epochs)
    assert [list(again), list(again)] == orders[epochs:]
    assert orders[0] != orders[1]
    in_order = sampler(shuffle=False)
    assert list(replayed(in_order, epochs)) == list(sampler(shuffle=False))
    other = torch.utils.data.SequentialSampler(range(3))
    assert replayed(other, epochs) is other


def test_a_run_without_optimizer_in_its_checkpoints_cannot_be_resumed(tmp_path: Path) -> None:
    restricted(tmp_path, max_steps=1, save_only_model=True, **SAVES).train()
    with pytest.raises(CheckpointError, match=r"saved without `optimizer\.pt` \(`save_only_model`\)"):
        restricted(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_off_the_mask_every_checkpoint_has_the_bits_of_the_base(finished: Path) -> None:
    base, mask = by_name(tiny_model("llama")), usual_mask()
    for step in (1, 4):
        saved = by_name(type(tiny_model("llama")).from_pretrained(finished / f"checkpoint-{step}"))
        assert saved.keys() == base.keys()
        for name in base:
            assert same_bits(saved[name][~mask[name]], base[name][~mask[name]])
