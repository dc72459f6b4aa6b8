"""What a restricted trainer does differently, as a class and by `restrict`: the same bits, its logs, its refusals."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from masked_optimizers import only
from small_runs import SAVES, SubnetTrainer, cut_off, mask_of, plain, restricted, usual_mask
from training.every_trainer import BATCH, TRAINERS, base_model, build
from training.masked_runs import Watch, check_weights, same_state, same_weights, state_of, third_of, weights_of
from trl import DPOTrainer

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import MaskMismatchError, NonFiniteGradientError, TrainerError
from subnet_ft.masks import ModelRecord, Provenance, SubnetMask
from subnet_ft.training import SubnetTrainerMixin, restrict

TWO_MICRO_BATCHES = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": BATCH // 2}


def classed(folder: Path, *, subnet: dict[str, Any] | None = None, **options: Any) -> Any:
    arguments = {"subnet_mask": usual_mask(), "subnet_options": subnet}
    return plain(folder, trainer_class=SubnetTrainer, arguments=arguments, **options)


CASES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "clipped on the whole norm": {"subnet": {"clip_norm": "full", "log_norms": True}, "max_grad_norm": 0.3},
    "micro-batches": {**TWO_MICRO_BATCHES, "subnet": {"master": "remainder", "audit_steps": 2}},
    "dense gradients": {**TWO_MICRO_BATCHES, "subnet": {"compact_grads": False, "clip_norm": "full"}},
    "sgd": {"optim": "sgd", "learning_rate": 3.0, "subnet": {"master": "stochastic", "nonfinite": "ignore"}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_class_form_equals_restrict_bit_for_bit(case: str, tmp_path: Path) -> None:
    ours, theirs = (make(tmp_path / make.__name__, **CASES[case]) for make in (classed, restricted))
    start = weights_of(ours.model)
    for trainer in (ours, theirs):
        trainer.train()
    same_weights(weights_of(ours.model), weights_of(theirs.model))
    same_state(state_of(ours), state_of(theirs))
    timed = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "audit_seconds"}
    logs = [
        [{key: value for key, value in entry.items() if key not in timed} for entry in trainer.state.log_history]
        for trainer in (ours, theirs)
    ]
    assert logs[0] == logs[1]
    check_weights(ours.model, usual_mask(), start)


def test_either_form_resumes_what_the_other_began(tmp_path: Path) -> None:
    straight = restricted(tmp_path / "straight")
    straight.train()
    cut_off(classed(tmp_path / "cut", **SAVES), after=3)
    again = restricted(tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    same_weights(weights_of(again.model), weights_of(straight.model))


def test_the_class_form_of_a_trl_trainer_equals_restrict(tmp_path: Path) -> None:
    class SubnetDPOTrainer(SubnetTrainerMixin, DPOTrainer):
        pass

    weights = []
    for form in ("restrict", "class"):
        model = base_model("DPO")
        mask = third_of(model)
        trainer: Any = build("DPO", tmp_path / form, model=model)
        if form == "restrict":
            restrict(trainer, mask)
        else:
            trainer = SubnetDPOTrainer(
                model=model, ref_model=trainer.ref_model, args=trainer.args, train_dataset=TRAINERS["DPO"].data(),
                processing_class=trainer.processing_class, subnet_mask=mask,
            )  # fmt: skip
        trainer.train()
        weights.append(weights_of(trainer.model))
    same_weights(*weights)


def test_the_class_form_refuses_what_restrict_refuses(tmp_path: Path) -> None:
    other = Provenance(base=ModelRecord("other/base", fingerprints=dict.fromkeys(usual_mask().names, "0" * 32)))
    with pytest.raises(MaskMismatchError, match="other/base"):
        plain(tmp_path, trainer_class=SubnetTrainer, arguments={"subnet_mask": SubnetMask(usual_mask().tensors, other)})
    with pytest.raises(TrainerError, match="asks for the optimizer `adafactor`"):
        classed(tmp_path, optim="adafactor")
    with pytest.raises(ValueError, match="`clip_norm` must be one of"):
        classed(tmp_path, subnet={"clip_norm": "both"})
    with pytest.raises(TypeError, match="clip_nrom"):
        classed(tmp_path, subnet={"clip_nrom": "full"})
    with pytest.raises(TypeError, match="subnet_mask"):
        plain(tmp_path, trainer_class=SubnetTrainer)
    with pytest.raises(TrainerError, match="already restricted"):
        restrict(classed(tmp_path), mask_of(5))


def watch_norms(trainer: Any) -> list[dict[str, float]]:
    """Return a list that gets both norms of every step, from what autograd computes."""
    squares: dict[str, tuple[float, float]] = {}
    seen: list[dict[str, float]] = []
    mask = usual_mask()

    def watch(name: str, parameter: torch.nn.Parameter) -> None:
        def hook(grad: torch.Tensor) -> None:
            squares[name] = float(grad[mask[name]].double().square().sum()), float(grad.double().square().sum())

        parameter.register_hook(hook)

    for name, parameter in trainer.model.named_parameters():
        watch(name, parameter)

    def note(step: int) -> None:
        masked, full = (math.sqrt(sum(pair[which] for pair in squares.values())) for which in (0, 1))
        seen.append({"masked": masked, "full": full})

    trainer.add_callback(Watch(before=note))
    return seen


@pytest.mark.parametrize("compact_grads", [True, False])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("clip_norm", ["masked", "full"])
def test_both_norms_are_logged_and_are_those_of_autograd(
    tmp_path: Path, clip_norm: str, max_grad_norm: float, compact_grads: bool
) -> None:
    subnet = {"clip_norm": clip_norm, "log_norms": True, "compact_grads": compact_grads}
    trainer = restricted(tmp_path, subnet=subnet, max_grad_norm=max_grad_norm, adam_beta1=0.0)
    expected = watch_norms(trainer)
    used: list[float] = []
    trainer.add_callback(
        Watch(
            after=lambda step: used.append(float(torch.cat([v["exp_avg"] for v in state_of(trainer).values()]).norm()))
        )
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logged) == len(expected) == 4
    for entry, norms, taken in zip(logged, expected, used, strict=True):
        assert entry["grad_norm_masked"] == pytest.approx(norms["masked"], rel=1e-4)
        assert entry["grad_norm_full"] == pytest.approx(norms["full"], rel=1e-4)
        assert norms["full"] > 1.05 * norms["masked"]
        assert entry["grad_norm"] == entry[f"grad_norm_{clip_norm}"]
        scale = min(1.0, max_grad_norm / norms[clip_norm]) if max_grad_norm else 1.0
        assert taken == pytest.approx(scale * norms["masked"], rel=1e-4)


def test_with_dense_gradients_both_norms_are_those_of_the_whole_step(tmp_path: Path) -> None:
    options = {**TWO_MICRO_BATCHES, "subnet": {"log_norms": True, "compact_grads": False}}
    trainer = restricted(tmp_path, **options, max_steps=2)
    sums: list[float] = []
    trainer.add_callback(
        Watch(before=lambda step: sums.append(math.sqrt(sum(
            float(p.grad.double().square().sum()) for p in trainer.model.parameters() if p.grad is not None
        ))))
    )  # fmt: skip
    trainer.train()
    logged = [entry["grad_norm_full"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(sums, rel=1e-5)


def test_norms_are_logged_only_if_asked_for(tmp_path: Path) -> None:
    trainer = restricted(tmp_path, subnet={"clip_norm": "full"}, max_steps=1)
    trainer.train()
    assert not any(key.startswith("grad_norm_") for entry in trainer.state.log_history for key in entry)


def spoil(trainer: Any, *, calls: tuple[int, ...]) -> None:
    """Make the loss of some micro-batches NaN."""
    compute, seen = trainer.compute_loss, [0]

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        loss = compute(*args, **kwargs)
        return loss * float("nan") if seen[0] in calls else loss

    trainer.compute_loss = spoiled


@pytest.mark.parametrize("clip_norm", ["masked", "full"])
def test_skipped_steps_are_logged_and_move_nothing(tmp_path: Path, clip_norm: str) -> None:
    subnet = {"nonfinite": "skip", "clip_norm": clip_norm}
    trainer = restricted(tmp_path, subnet=subnet, max_steps=5, logging_nan_inf_filter=False)
    spoil(trainer, calls=(2, 4))
    seen = [weights_of(trainer.model)]
    trainer.add_callback(Watch(end=lambda step: seen.append(weights_of(trainer.model))))
    trainer.train()
    logged = [entry.get("skipped_steps") for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [None, 1, 1, 2, 2]
    moved = [any(not same_bits(a[name], b[name]) for name in a) for a, b in itertools.pairwise(seen)]
    assert moved == [True, False, True, False, True]
    assert {float(values["step"]) for values in state_of(trainer).values()} == {3.0}


def test_raise_stops_the_run_and_the_trainer_can_start_again(tmp_path: Path) -> None:
    trainer = restricted(tmp_path)
    start = weights_of(trainer.model)
    spoil(trainer, calls=(1,))
    with pytest.raises(NonFiniteGradientError):
        trainer.train()
    same_weights(weights_of(trainer.model), start)
    trainer.train()
    untroubled = restricted(tmp_path)
    untroubled.train()
    same_weights(weights_of(trainer.model), weights_of(untroubled.model))


class Begin(Watch):
    """Does something when training begins."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.act()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("clip_norm", ["masked", "full"])
@pytest.mark.parametrize("hides", [True, False])
def test_a_step_in_which_no_gradient_reaches_the_mask_is_an_error(tmp_path: Path, hides: bool, clip_norm: str) -> None:
    """Re-entrant checkpointing of layers whose inputs need no gradient computes none, and says nothing."""
    model = tiny_model("llama")
    inside = {n: torch.rand(p.shape) < 0.3 for n, p in model.named_parameters() if ".layers." in n}
    model.get_input_embeddings().weight.requires_grad_(False)
    trainer = restricted(
        tmp_path, mask=only(model, inside), subnet={"clip_norm": clip_norm}, model=model,
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True},
    )  # fmt: skip
    start = weights_of(model)
    if hides:  # as in models whose code does not call `enable_input_require_grads`
        model.enable_input_require_grads = lambda: None
        trainer.add_callback(Begin(model.disable_input_require_grads))
        # Under the whole norm the final norm outside the mask gets a gradient; otherwise torch has nothing to compute.
        silent = clip_norm == "full"
        error: type[Exception] = TrainerError if silent else RuntimeError
        message = "No gradient reached any tensor of the mask" if silent else "does not require grad"
        with pytest.raises(error, match=message):
            trainer.train()
        same_weights(weights_of(model), start)
    else:
        trainer.train()
        check_weights(model, trainer.subnet_mask, start)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_tensors_without_a_gradient_in_the_first_step_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    all_but_embeddings = {n: torch.rand(p.shape) < 0.3 for n, p in model.named_parameters() if "embed" not in n}
    for hides in (True, False):
        trainer = restricted(
            tmp_path, mask=only(model, all_but_embeddings), activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": True},
        )  # fmt: skip
        if hides:
            trainer.model.enable_input_require_grads = lambda: None
            trainer.add_callback(Begin(trainer.model.disable_input_require_grads))
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="subnet_ft"):
            trainer.train()
        found = [message for message in caplog.messages if "got no gradient" in message]
        assert len(found) == hides
        if hides:
            assert "18 of the 19 tensors that the mask trains got no gradient in the first step" in found[0]
            assert "model.layers.0.self_attn.q_proj.weight" in found[0]
