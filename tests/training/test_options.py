"""What `restrict` can be asked for, which optimizer a trainer's arguments become, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SubnetTrainer, plain, restricted, usual_mask
from training.masked_runs import Watch, check_weights, same_weights, weights_of
from transformers import Trainer
from transformers.training_args import ParallelMode
from wrapped_optimizers import Lion

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import TrainerError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW, MaskedOptimizer, MaskedSGD
from subnet_ft.training import SubnetTrainerMixin, restrict

FROM_ARGUMENTS: dict[str, tuple[dict[str, Any], type, dict[str, Any]]] = {
    "adamw_torch": ({"adam_beta1": 0.8, "adam_epsilon": 1e-6}, MaskedAdamW, {"betas": (0.8, 0.999), "eps": 1e-6}),
    "adamw_torch_fused": ({"adam_beta2": 0.95}, MaskedAdamW, {"betas": (0.9, 0.95)}),
    "sgd": ({}, MaskedSGD, {"momentum": 0.0, "nesterov": False}),
    "rmsprop": ({}, MaskedOptimizer, {"alpha": 0.99}),
    "adagrad": ({}, MaskedOptimizer, {"lr_decay": 0}),
}
"""`optim`, with other arguments, to the optimizer that it becomes and some of its options."""

GIVEN: list[tuple[type[torch.optim.Optimizer], dict[str, Any], type]] = [
    (torch.optim.AdamW, {"lr": 1e-2, "betas": (0.8, 0.9)}, MaskedAdamW),
    (torch.optim.AdamW, {"lr": 1e-2, "fused": True}, MaskedAdamW),
    (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}, MaskedOptimizer),
    (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "nesterov": True}, MaskedSGD),
    (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "dampening": 0.1}, MaskedOptimizer),
    (torch.optim.NAdam, {"lr": 1e-2, "momentum_decay": 1e-2}, MaskedOptimizer),
    (torch.optim.RAdam, {"lr": 1e-2, "decoupled_weight_decay": True}, MaskedOptimizer),
    (torch.optim.Adam, {"lr": 1e-2}, MaskedOptimizer),
    (Lion, {"lr": 1e-2}, MaskedOptimizer),
]
"""What `optimizer_cls_and_kwargs` becomes."""


@pytest.mark.parametrize("optim", FROM_ARGUMENTS)
def test_optim_becomes_the_masked_form_of_what_the_trainer_asks_for(tmp_path: Path, optim: str) -> None:
    arguments, kind, options = FROM_ARGUMENTS[optim]
    trainer = restricted(tmp_path, optim=optim, lr_scheduler_type="constant", max_steps=6, **arguments)
    start = weights_of(trainer.model)
    trainer.train()
    optimizer = trainer.masked_optimizer
    assert type(optimizer) is kind
    for group, decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
        assert group["lr"] == 3e-2
        assert group["weight_decay"] == decay
        assert {key: group[key] for key in options} == options
    found = weights_of(trainer.model)
    for name, chosen in ((name, usual_mask()[name]) for name in found):
        assert torch.equal(found[name][~chosen], start[name][~chosen])
    assert any((found[name] != start[name]).any() for name in found)


@pytest.mark.parametrize(("optimizer_cls", "keywords", "kind"), GIVEN)
def test_optimizer_cls_and_kwargs_become_their_masked_form(
    tmp_path: Path, optimizer_cls: type[torch.optim.Optimizer], keywords: dict[str, Any], kind: type
) -> None:
    trainer = restricted(
        tmp_path,
        arguments={"optimizer_cls_and_kwargs": (optimizer_cls, keywords)},
        lr_scheduler_type="constant",
        max_steps=2,
        model=tiny_model("llama", dtype=torch.float32),
    )
    start = weights_of(trainer.model)
    trainer.train()
    optimizer = trainer.masked_optimizer
    assert type(optimizer) is kind
    if isinstance(optimizer, MaskedOptimizer):
        assert optimizer.optimizer_cls is optimizer_cls
    for group in optimizer.param_groups:
        assert {key: group[key] for key in keywords if key != "fused"} == {
            key: value for key, value in keywords.items() if key != "fused"
        }
    check_weights(trainer.model, usual_mask(), start)


@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam, torch.optim.Adam])
def test_an_option_that_is_left_open_is_that_of_torch(
    tmp_path: Path, optimizer_cls: type[torch.optim.Optimizer]
) -> None:
    trainer = restricted(tmp_path, arguments={"optimizer_cls_and_kwargs": (optimizer_cls, {})})
    optimizer = trainer.create_optimizer()
    theirs = optimizer_cls([torch.nn.Parameter(torch.zeros(1))]).defaults
    for key in {"lr", "betas", "eps", "momentum", "nesterov", "momentum_decay"} & theirs.keys():
        assert {group[key] for group in optimizer.param_groups} == {theirs[key]}


def test_a_full_mask_with_sgd_is_the_trainers_own_sgd(tmp_path: Path) -> None:
    """The masked form of an optimizer is that optimizer: in float32, to the last digits of a sum."""
    options = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 3}
    own = plain(tmp_path / "own", model=tiny_model("llama", dtype=torch.float32), **options)
    own.train()
    model = tiny_model("llama", dtype=torch.float32)
    full = SubnetMask.full({name: tuple(p.shape) for name, p in model.named_parameters()})
    ours = restricted(tmp_path / "ours", model=model, mask=full, **options)
    ours.train()
    for name, value in weights_of(ours.model).items():
        torch.testing.assert_close(value, weights_of(own.model)[name], rtol=1e-6, atol=1e-6)


class MuonLike(torch.optim.Muon):
    """Somebody's own form of it."""


def lion_factory(params: Any, **options: Any) -> torch.optim.Optimizer:
    return Lion(params, **options)


class AdamWFromGaLore(torch.optim.AdamW):
    """As `galore_torch.GaLoreAdamW` is defined."""

    __module__ = "galore_torch.adamw"


@pytest.mark.parametrize(
    ("optimizer_cls", "keywords", "message"),
    [
        (torch.optim.Muon, {"lr": 1e-2}, "`Muon` cannot train a subnetwork: it orthogonalizes"),
        (MuonLike, {"lr": 1e-2}, "`MuonLike` cannot train a subnetwork"),
        (torch.optim.Adafactor, {"lr": 1e-2}, "`Adafactor` cannot train a subnetwork: it factors second moments"),
        (AdamWFromGaLore, {"lr": 1e-2}, "cannot train a subnetwork: it projects gradients to a low rank"),
        (torch.optim.LBFGS, {"lr": 1e-2}, "evaluates the model several times"),
        (torch.optim.SparseAdam, {"lr": 1e-2}, "takes sparse gradients"),
        (lion_factory, {"lr": 1e-2}, "it is made by a factory"),
        (torch.optim.AdamW, {"lr": 1e-2, "model": None}, "it is built from the whole model"),
        (MaskedAdamW, {"lr": 1e-2, "max_grad_norm": None}, "it is masked already"),
    ],
)
def test_optimizers_that_need_more_than_single_weights_are_refused_by_name(
    tmp_path: Path, optimizer_cls: Any, keywords: dict[str, Any], message: str
) -> None:
    trainer = plain(tmp_path, arguments={"optimizer_cls_and_kwargs": (optimizer_cls, keywords)})
    with pytest.raises(TrainerError, match=message):
        restrict(trainer, usual_mask())
    assert not type(trainer).__name__.startswith("Subnet")  # a refused trainer stays what it was


def test_optim_adafactor_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        TrainerError, match=r"asks for the optimizer `adafactor`. `Adafactor` cannot train a subnetwork"
    ):
        restricted(tmp_path, optim="adafactor")


@pytest.mark.parametrize("master", ["remainder", "stochastic"])
def test_masters_of_a_kernel_are_refused_for_a_wrapped_optimizer(tmp_path: Path, master: str) -> None:
    trainer = plain(tmp_path, optim="rmsprop")
    with pytest.raises(TrainerError, match=f"`master='{master}'` needs an optimizer with a kernel of its own"):
        restrict(trainer, usual_mask(), master=master)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"master": "bf16"}, "`master` must be one of fp32, remainder, stochastic, none, got 'bf16'"),
        ({"clip_norm": "both"}, "`clip_norm` must be one of masked, full, got 'both'"),
        ({"nonfinite": "warn"}, "`nonfinite` must be one of raise, skip, ignore, got 'warn'"),
        ({"audit_steps": 0}, "`audit_steps` must be >= 1, or None for no audits, got 0"),
        ({"audit_steps": -3}, "`audit_steps` must be >= 1"),
        ({"save_total_bytes": 0}, "`save_total_bytes` must be >= 1, or None for no limit, got 0"),
    ],
)
def test_an_option_out_of_range_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    trainer = plain(tmp_path)
    with pytest.raises(ValueError, match=message):
        restrict(trainer, usual_mask(), **options)
    restrict(trainer, usual_mask())  # a refused trainer can still be restricted


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"clip_norm": "full"}, "`clip_norm='full'`"),
        ({"log_norms": True}, "`log_norms=True`"),
        ({"clip_norm": "full", "log_norms": True, "compact_grads": True}, "`clip_norm='full'`"),
    ],
)
def test_the_whole_norm_is_refused_with_compaction_over_several_micro_batches(
    tmp_path: Path, options: dict[str, Any], asked: str
) -> None:
    trainer = plain(tmp_path, gradient_accumulation_steps=2)
    message = f"{asked} needs the dense gradient.*`gradient_accumulation_steps` is 2.*`compact_grads=False`"
    with pytest.raises(TrainerError, match=message):
        restrict(trainer, usual_mask(), **options)
    restrict(trainer, usual_mask(), **{**options, "compact_grads": False})
    trainer.train()


def test_compact_and_dense_gradients_train_the_same_bits(tmp_path: Path) -> None:
    weights, held = [], []
    for compact_grads in (None, True, False):
        trainer = restricted(tmp_path, subnet={"compact_grads": compact_grads, "clip_norm": "full"})
        dense: list[bool] = []
        trainer.add_callback(
            Watch(before=lambda _, t=trainer, d=dense: d.append(any(p.grad is not None for p in t.model.parameters())))
        )
        trainer.train()
        held.append(set(dense))
        weights.append(weights_of(trainer.model))
    assert held == [{False}, {False}, {True}]  # one process: compaction is the default
    same_weights(weights[0], weights[1])
    same_weights(weights[0], weights[2])


@pytest.mark.parametrize("world_size", [1, 2])
def test_under_ddp_dense_gradients_are_the_default(
    tmp_path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher wraps the model in DDP, also when it started one process only."""
    trainer = plain(tmp_path, gradient_accumulation_steps=2)
    monkeypatch.setattr(type(trainer.args), "parallel_mode", property(lambda self: ParallelMode.DISTRIBUTED))
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: world_size))
    restrict(trainer, usual_mask(), clip_norm="full")  # no compaction, so accumulation is allowed
    assert not trainer.create_optimizer().compact_grads


class OwnOptimizer(Trainer):
    """Builds its optimizer by itself."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2)
        return self.optimizer


class OwnClipping(Trainer):
    """Clips in its own way."""

    def _clip_grad_norm(self, model: Any) -> Any:
        return super()._clip_grad_norm(model)


class OwnNorm(Trainer):
    """Logs a norm of its own."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(model, grad_norm)


class OwnLoss(Trainer):
    """Leaves the optimizer alone."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize(
    ("owner", "method"),
    [(OwnOptimizer, "create_optimizer"), (OwnClipping, "_clip_grad_norm"), (OwnNorm, "_get_grad_norm")],
)
def test_a_trainer_whose_own_method_would_be_replaced_is_refused(
    tmp_path: Path, owner: type[Trainer], method: str
) -> None:
    message = f"`{owner.__name__}` has a `{method}` of its own, and that of the masked optimizer would replace it"
    trainer = plain(tmp_path, trainer_class=owner)
    with pytest.raises(TrainerError, match=message):
        restrict(trainer, usual_mask())
    assert type(trainer) is owner
    # Whether it is inherited, or stands behind the mixin in a class.
    with pytest.raises(TrainerError, match=message):
        restrict(plain(tmp_path, trainer_class=type("Heir", (owner,), {})), usual_mask())
    behind = type("Behind", (SubnetTrainerMixin, owner), {})
    with pytest.raises(TrainerError, match=message):
        plain(tmp_path, trainer_class=behind, arguments={"subnet_mask": usual_mask()})


def test_a_trainer_with_other_methods_of_its_own_is_restricted(tmp_path: Path) -> None:
    restrict(plain(tmp_path, trainer_class=OwnLoss), usual_mask()).train()
    called: list[str] = []

    class Before(SubnetTrainer):
        """What stands before the mixin calls it, so nothing is passed over."""

        def _clip_grad_norm(self, model: Any) -> torch.Tensor:
            called.append("clip")
            return super()._clip_grad_norm(model)

    trainer = plain(tmp_path, trainer_class=Before, arguments={"subnet_mask": usual_mask()}, max_steps=2)
    trainer.train()
    assert called == ["clip"] * 2


def test_fp16_is_refused(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    trainer.args.fp16 = True
    with pytest.raises(TrainerError, match="`fp16=True` scales gradients"):
        restrict(trainer, usual_mask())
