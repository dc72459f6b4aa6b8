"""Checkpoints of a restricted trainer: the weights they give back, what they are refused for, and warnings."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from masked_optimizers import only
from small_runs import FIRST_IS_BEST, FROZEN, SAVES, cut_off, damaged, mask_of, restricted, steps_of, usual_mask
from training.masked_runs import Watch, same_state, same_weights, state_of, third_of, weights_of

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import CheckpointError, OptimizerStateError
from subnet_ft.training.saving import MANIFEST

LOST = "model.layers.1.mlp.up_proj.weight"
EXPERTS = {"mixtral": "model.layers.0.mlp.experts.gate_up_proj", "deepseek_v3": "model.layers.1.mlp.experts.down_proj"}
"""A tensor of each family that transformers 5.24 does not load again, because it has other names on the disk."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer after four steps with a checkpoint of each; nobody may write to its folder."""
    trainer = restricted(tmp_path_factory.mktemp("finished"), **SAVES)
    trainer.train()
    return trainer


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> Path:
    """A copy of the folder of the finished run."""
    return shutil.copytree(finished.args.output_dir, tmp_path / "run")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_one_flipped_bit_is_refused_by_name_and_passed_over(run: Path, finished: Any, name: str) -> None:
    damaged(run / "checkpoint-4" / name)
    trainer = restricted(run)
    start, steps = weights_of(trainer.model), steps_of(trainer)
    with pytest.raises(CheckpointError, match=f"`{name}` is not as it was written.*`{run / 'checkpoint-3'}` is whole"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    same_weights(weights_of(trainer.model), start)
    trainer.train(resume_from_checkpoint=True)
    assert steps == [4]
    same_weights(weights_of(trainer.model), weights_of(finished.model))
    same_state(state_of(trainer), state_of(finished))


@pytest.mark.parametrize("step", [2, 4])
def test_another_mask_is_refused_before_the_model_is_touched(run: Path, step: int) -> None:
    trainer = restricted(run, mask=mask_of(5))
    start = weights_of(trainer.model)
    with pytest.raises(OptimizerStateError, match=f"trained under mask {usual_mask().fingerprint[:16]}, this trainer"):
        trainer.train(resume_from_checkpoint=str(run / f"checkpoint-{step}"))
    same_weights(weights_of(trainer.model), start)
    assert trainer.optimizer is None
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("name", [FROZEN, "model.layers.1.mlp.up_proj.weight"])
def test_another_base_is_refused_before_the_model_is_touched(run: Path, name: str, step: int) -> None:
    model, mask = tiny_model("llama"), usual_mask()
    flat = dict(model.named_parameters())[name].data.view(-1)
    place = int((~mask[name]).view(-1).nonzero()[0])
    flat[place] = -flat[place]
    trainer = restricted(run, model=model)
    start = weights_of(trainer.model)
    with pytest.raises(OptimizerStateError, match=rf"another base: outside the mask, `{name}`.*\(1 tensors differ\)"):
        trainer.train(resume_from_checkpoint=str(run / f"checkpoint-{step}"))
    same_weights(weights_of(trainer.model), start)
    assert trainer.optimizer is None


def test_a_base_that_differs_on_the_mask_alone_is_one_that_was_trained(run: Path, finished: Any) -> None:
    """The trainer of an interrupted run holds such weights; the checkpoint's take their place."""
    model, mask = tiny_model("llama"), usual_mask()
    name = "model.layers.1.mlp.up_proj.weight"
    flat = dict(model.named_parameters())[name].data.view(-1)
    flat[int(mask[name].view(-1).nonzero()[0])] += 1.0
    trainer = restricted(run, model=model)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    same_weights(weights_of(trainer.model), weights_of(finished.model))


def of_family(family: str, folder: Path, **options: Any) -> Any:
    model = tiny_model(family)
    return restricted(folder, model=model, mask=third_of(model), **options)


@pytest.mark.parametrize("family", EXPERTS)
def test_a_mixture_of_experts_resumes_to_the_same_bits(family: str, tmp_path: Path) -> None:
    straight = of_family(family, tmp_path / "straight")
    start = weights_of(straight.model)
    straight.train()
    assert not same_bits(weights_of(straight.model)[EXPERTS[family]], start[EXPERTS[family]])
    cut_off(of_family(family, tmp_path / "cut", **SAVES), after=4)
    for step in (1, 3):
        again = of_family(family, tmp_path / "cut")
        steps = steps_of(again)
        again.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
        assert steps == list(range(step + 1, 5))
        same_weights(weights_of(again.model), weights_of(straight.model))
        same_state(state_of(again), state_of(straight))


def test_a_mixture_of_experts_ends_with_its_best_weights(tmp_path: Path) -> None:
    trainer = of_family("mixtral", tmp_path, **FIRST_IS_BEST)
    seen: list[dict[str, torch.Tensor]] = []
    trainer.add_callback(Watch(end=lambda step: seen.append(weights_of(trainer.model))))
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    same_weights(weights_of(trainer.model), seen[0])
    assert not same_bits(seen[0][EXPERTS["mixtral"]], seen[-1][EXPERTS["mixtral"]])


def _leaves_out(model: Any) -> None:
    model._keys_to_ignore_on_save = [LOST]


def _rounds(model: Any) -> None:
    save = model.save_pretrained

    def saved(*args: Any, **kwargs: Any) -> None:
        rounded = {name: value.to(torch.float8_e4m3fn).to(value.dtype) for name, value in model.state_dict().items()}
        save(*args, **{**kwargs, "state_dict": rounded})

    model.save_pretrained = saved


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_leaves_out, "leaves some of them out; restrict the trainer to a mask"),
        (_rounds, "does not give back the weights that it was saved with"),
    ],
)
def test_a_model_whose_save_loses_weights_does_not_resume(
    spoil: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    trainer = restricted(tmp_path, **SAVES)
    spoil(trainer.model)
    cut_off(trainer, after=3)
    again = restricted(tmp_path)
    spoil(again.model)
    steps = steps_of(again)
    with pytest.raises(CheckpointError, match=message):
        again.train(resume_from_checkpoint=True)
    assert steps == []


def test_weights_that_a_save_leaves_out_do_no_harm_outside_the_mask(tmp_path: Path) -> None:
    """They are the base's, which the trainer that resumes has."""

    def trainer(folder: Path, **options: Any) -> Any:
        model = tiny_model("llama")
        _leaves_out(model)
        mask = third_of(model)
        return restricted(
            folder, model=model, mask=only(model, {n: mask[n] for n in mask.names if n != LOST}), **options
        )

    straight = trainer(tmp_path / "straight")
    straight.train()
    cut_off(trainer(tmp_path / "cut", **SAVES), after=3)
    again = trainer(tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    same_weights(weights_of(again.model), weights_of(straight.model))


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("subnet_ft")]


MASTERS: dict[str, dict[str, Any]] = {
    "fp32 masters": {},
    "remainders": {"subnet": {"master": "remainder"}},
    "SGD with momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "wrapped": {"arguments": {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 1e-2, "weight_decay": 0.1})}},
}


@pytest.mark.parametrize("kind", MASTERS)
def test_a_second_run_starts_from_the_best_weights(kind: str, tmp_path: Path) -> None:
    """The trainer loaded them behind the optimizer, whose masters are those of the last step."""
    trainer = restricted(tmp_path, **MASTERS[kind], **FIRST_IS_BEST)
    seen: list[dict[str, torch.Tensor]] = []
    trainer.add_callback(Watch(end=lambda step: seen.append(weights_of(trainer.model))))
    trainer.train()
    optimizer, moments = trainer.masked_optimizer, state_of(trainer)
    same_weights(weights_of(trainer.model), seen[0])
    assert any(not same_bits(seen[0][name], seen[-1][name]) for name in seen[0])

    def stand_still(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.0

    trainer.add_callback(Watch(before=stand_still))
    trainer.args.load_best_model_at_end = False
    trainer.args.max_steps = 1
    trainer.train()
    assert trainer.masked_optimizer is optimizer
    same_weights(weights_of(trainer.model), seen[0])
    for name, entries in state_of(trainer).items():
        best, master = seen[0][name][trainer.subnet_mask[name]], entries["master"]
        assert torch.equal(master, best.float() if master.is_floating_point() else torch.zeros_like(master))
        assert entries.get("step", 5) == moments[name].get("step", 4) + 1, "the moments go on"


@pytest.mark.parametrize("other", [2, 3])
def test_another_number_of_processes_is_warned_of(
    run: Path, finished: Any, other: int, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = json.loads((run / "checkpoint-3" / MANIFEST).read_text())
    (run / "checkpoint-3" / MANIFEST).write_text(json.dumps({**manifest, "num_processes": other}))
    for step, warns in ((3, True), (2, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="subnet_ft"):
            trainer = restricted(run)
            trainer.train(resume_from_checkpoint=str(run / f"checkpoint-{step}"))
        expected = f"{other} processes wrote `{run / 'checkpoint-3'}`, 1 would go on: not with the bits"
        assert [message.startswith(expected) for message in ours(caplog)] == [True] * warns
        same_weights(weights_of(trainer.model), weights_of(finished.model))


def test_starting_anew_beside_old_checkpoints_is_warned_of(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    def warned(folder: Path, **options: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="subnet_ft"):
            restricted(folder, max_steps=1, **options).train()
        return ours(caplog)

    assert warned(run) == []  # it saves nothing
    assert warned(run / "empty", **SAVES) == []
    (message,) = warned(run, **SAVES)
    assert message.startswith(f"`{run}` holds checkpoints of an earlier run, and `resume_from_checkpoint=True` takes")


def test_resuming_beside_old_checkpoints_is_not_warned_of(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="subnet_ft"):
        restricted(run, **SAVES).train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert ours(caplog) == []
