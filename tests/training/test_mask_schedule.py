"""An early mask, then the final one: what is trained when, and resuming before, at and after the change."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from small_runs import (
    FIRST_IS_BEST,
    FROZEN,
    SAVES,
    SubnetTrainer,
    cut_off,
    mask_of,
    plain,
    restricted,
    steps_of,
    usual_mask,
)
from training.masked_runs import Watch, same_state, same_weights, state_of, weights_of

import subnet_kernels
from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import MaskMismatchError, OptimizerStateError, TrainerError
from subnet_ft.masks import ModelRecord, Provenance, SubnetMask, format_fingerprint
from subnet_ft.training import MaskSchedule

KINDS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "remainders": {"subnet": {"master": "remainder"}},
    "stochastic": {"subnet": {"master": "stochastic"}},
    "dense gradients": {"subnet": {"compact_grads": False}},
    "full norm": {"subnet": {"clip_norm": "full", "audit_steps": 1}},
    "SGD": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "NAdam": {"arguments": {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 1e-2, "weight_decay": 0.1})}},
}


def of_base(mask: SubnetMask) -> SubnetMask:
    """Return a mask that records the tiny llama as its base, as extracted ones do."""
    prints = {
        name: format_fingerprint(subnet_kernels.fingerprint(parameter.detach()))
        for name, parameter in tiny_model("llama").named_parameters()
    }
    return SubnetMask(mask.tensors, Provenance(base=ModelRecord("tiny/llama", fingerprints=prints)))


def early() -> SubnetMask:
    return of_base(usual_mask())


def final() -> SubnetMask:
    """Trains something of `FROZEN`, and nothing of another tensor that `early` trains."""
    other = mask_of(6)
    dense = {name: other[name] for name in other.names}
    dense["model.layers.1.mlp.up_proj.weight"] = torch.zeros_like(dense["model.layers.1.mlp.up_proj.weight"])
    return of_base(SubnetMask.from_dense(dense))


def scheduled(folder: Path, masks: dict[int, SubnetMask] | None = None, **options: Any) -> Any:
    trainer = restricted(folder, mask=early(), **options)
    trainer.add_callback(MaskSchedule({2: final()} if masks is None else masks))
    return trainer


def test_before_the_change_the_early_mask_trains_and_after_it_the_final_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = scheduled(tmp_path, subnet={"audit_steps": 1})
    seen = [weights_of(trainer.model)]
    trainer.add_callback(Watch(end=lambda step: seen.append(weights_of(trainer.model))))
    with caplog.at_level(logging.INFO, logger="subnet_ft"):
        trainer.train()
    for step, mask in ((1, early()), (2, early()), (3, final()), (4, final())):
        for name, value in seen[step].items():
            chosen = mask[name]
            assert same_bits(value[~chosen], seen[step - 1][name][~chosen])
            assert not chosen.any() or (value != seen[step - 1][name])[chosen].any()
    assert trainer.masked_optimizer.mask.fingerprint == final().fingerprint
    assert [m for m in caplog.messages if "mask of density" in m] == [
        f"step 2: mask of density {final().density:.4g} from here on"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_before_at_and_after_the_change_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    straight = scheduled(tmp_path / "straight", **KINDS[kind])
    straight.train()
    broken = scheduled(tmp_path / "cut", **KINDS[kind], **SAVES)
    cut_off(broken, after=4)
    for step in (1, 2, 3):
        again = scheduled(tmp_path / "cut", **KINDS[kind])
        steps = steps_of(again)
        again.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
        assert steps == list(range(step + 1, 5))
        same_weights(weights_of(again.model), weights_of(straight.model))
        same_state(state_of(again), state_of(straight))


def test_a_finished_run_resumes_under_its_last_mask(tmp_path: Path) -> None:
    straight = scheduled(tmp_path, **SAVES)
    straight.train()
    again = scheduled(tmp_path)
    steps = steps_of(again)
    again.train(resume_from_checkpoint=True)
    assert steps == []
    same_weights(weights_of(again.model), weights_of(straight.model))
    assert again.masked_optimizer.mask.fingerprint == final().fingerprint


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_trainer_that_was_cut_off_resumes_itself(tmp_path: Path, step: int) -> None:
    straight = scheduled(tmp_path / "straight")
    straight.train()
    trainer = scheduled(tmp_path / "cut", subnet={"audit_steps": 1}, **SAVES)
    cut_off(trainer, after=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
    same_weights(weights_of(trainer.model), weights_of(straight.model))


def test_a_second_run_of_one_trainer_does_not_start_under_the_last_mask(tmp_path: Path) -> None:
    trainer = scheduled(tmp_path)
    trainer.train()
    before = weights_of(trainer.model)
    with pytest.raises(TrainerError, match=f"ended under mask {final().fingerprint[:16]}"):
        trainer.train()
    same_weights(weights_of(trainer.model), before)


def test_a_retry_with_smaller_batches_does_not_start_under_the_last_mask(tmp_path: Path) -> None:
    """`auto_find_batch_size` begins again at step 0 where memory ran out, with the optimizer that is there."""
    trainer = scheduled(tmp_path, auto_find_batch_size=True)
    compute, calls = trainer.compute_loss, [0]

    def runs_out_once(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return compute(*args, **kwargs)

    trainer.compute_loss = runs_out_once
    used: list[tuple[int, str]] = []
    trainer.add_callback(Watch(before=lambda step: used.append((step, trainer.masked_optimizer.mask.fingerprint))))
    try:
        trainer.train()
    except TrainerError:
        return  # a refusal is as good
    assert used[3:] == [(step, mask.fingerprint) for step, mask in enumerate([early()] * 2 + [final()] * 2, start=1)]


def test_a_schedule_that_comes_with_the_constructor_is_the_same(tmp_path: Path) -> None:
    added = scheduled(tmp_path / "added")
    added.train()
    built = plain(
        tmp_path / "built",
        trainer_class=SubnetTrainer,
        callbacks=[MaskSchedule({0: early(), 2: final()})],
        arguments={"subnet_mask": early(), "subnet_options": {"audit_steps": 1}},
    )
    built.train()
    same_weights(weights_of(built.model), weights_of(added.model))
    same_state(state_of(built), state_of(added))


def test_several_changes_and_one_that_is_never_reached(tmp_path: Path) -> None:
    third = of_base(mask_of(8, 0.1))
    trainer = scheduled(tmp_path, {9: early(), 3: third, 1: final()})
    used: list[str] = []
    trainer.add_callback(Watch(before=lambda step: used.append(trainer.masked_optimizer.mask.fingerprint)))
    trainer.train()
    assert used == [mask.fingerprint for mask in (early(), final(), final(), third)]


def test_mask_at_is_the_last_one_that_is_due() -> None:
    first, second = early(), final()
    schedule = MaskSchedule({7: second, 3: first})
    assert [schedule.mask_at(step) for step in (0, 2, 3, 6, 7, 99)] == [None, None, first, first, second, second]


@pytest.mark.parametrize("steps", [[], [-1], [-1, 3]])
def test_a_schedule_without_masks_or_before_the_start_is_refused(steps: list[int]) -> None:
    with pytest.raises(ValueError, match="`masks` maps steps >= 0 to masks"):
        MaskSchedule(dict.fromkeys(steps, usual_mask()))


def test_a_schedule_that_starts_with_another_mask_is_refused(tmp_path: Path) -> None:
    trainer = scheduled(tmp_path, {0: final()})
    start = weights_of(trainer.model)
    with pytest.raises(TrainerError, match=f"schedule has mask {final().fingerprint[:16]}"):
        trainer.train()
    same_weights(weights_of(trainer.model), start)


def test_a_schedule_on_a_trainer_that_nobody_restricted_is_refused(tmp_path: Path) -> None:
    trainer = plain(tmp_path, callbacks=[MaskSchedule({2: usual_mask()})])
    with pytest.raises(TrainerError, match="not a masked one"):
        trainer.train()


def test_a_mask_of_another_base_stops_the_run_when_it_is_due(tmp_path: Path) -> None:
    other = ModelRecord("another/base", fingerprints=dict.fromkeys(final().names, "0" * 32))
    trainer = scheduled(tmp_path, {2: SubnetMask(final().tensors, Provenance(base=other))})
    with pytest.raises(MaskMismatchError, match="another base"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_checkpoint_is_refused_by_a_trainer_with_another_schedule(tmp_path: Path) -> None:
    broken = scheduled(tmp_path, **SAVES)
    cut_off(broken, after=4)
    for masks, step, expected in (
        ({3: final()}, 2, final()),  # the change came earlier than this schedule says
        ({1: final()}, 1, early()),
        ({2: of_base(mask_of(9))}, 3, final()),
    ):
        trainer = scheduled(tmp_path, masks)
        start = weights_of(trainer.model)
        with pytest.raises(OptimizerStateError, match=f"was trained under mask {expected.fingerprint[:16]}"):
            trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        same_weights(weights_of(trainer.model), start)
    without = restricted(tmp_path, mask=early())
    with pytest.raises(OptimizerStateError, match=f"was trained under mask {final().fingerprint[:16]}"):
        without.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("name", [FROZEN, "model.layers.0.mlp.up_proj.weight"])
def test_another_base_is_refused_before_at_and_after_the_change(tmp_path: Path, name: str, step: int) -> None:
    """Whether the schedule names its first mask or not; also in tensors of which either mask trains a part."""
    cut_off(scheduled(tmp_path, **SAVES), after=4)
    for masks in ({2: final()}, {0: early(), 2: final()}):
        model = tiny_model("llama")
        trainer = scheduled(tmp_path, masks, model=model)
        flat = dict(model.named_parameters())[name].data.view(-1)
        flat[int((~(early()[name] | final()[name])).view(-1).nonzero()[0])] += 1.0
        start, steps = weights_of(model), steps_of(trainer)
        with pytest.raises(OptimizerStateError, match=rf"another base: outside the mask, `{name}`.*\(1 tensors differ"):
            trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        same_weights(weights_of(model), start)
        assert steps == []


def test_audits_bear_with_a_best_model_of_the_first_mask(tmp_path: Path) -> None:
    trainer = scheduled(tmp_path / "straight", subnet={"audit_steps": 1}, **FIRST_IS_BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "straight" / "checkpoint-1")
    best = weights_of(trainer.model)
    shutil.rmtree(tmp_path / "straight" / "checkpoint-4")
    again = scheduled(tmp_path / "straight", subnet={"audit_steps": 1}, **FIRST_IS_BEST)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "straight" / "checkpoint-1")
    same_weights(weights_of(again.model), best)
