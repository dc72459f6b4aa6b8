"""A quantized reference model: its layers, its bytes, and the loss that it gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from helpers import random_mask, same_bits
from old_versions import needs_trl_1_16
from recipe_texts import DPO, GRPO, problems_of

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.models import load_model
from subnet_ft.checkpoints.quantized import Quantization, quantized_layers, weight_bytes
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.masks import SubnetMask
from subnet_ft.pipeline import load_checked_recipe
from subnet_ft.tasks import load_recipe_data, prompt_dataset
from subnet_ft.training import ALGORITHMS, TrainingRun
from subnet_ft.training import run as training_run
from subnet_ft.training.free_reference import FreeReference

KINDS: tuple[Quantization, ...] = ("int8", "nf4")
PAIRS = Dataset.from_list([{"prompt": f"{a} + 1 = ", "chosen": f"{a + 1}", "rejected": "?"} for a in range(8)])
LABELLED = Dataset.from_list([{"prompt": f"{a} + 1 = ", "completion": f"{a}", "label": a % 2 == 1} for a in range(8)])
HOLDS_ONE = {
    "dpo": (),
    "kto": (),
    "grpo": ("training.beta=0.5",),
    "rloo": ("training.beta=0.5",),
    "ppo": ("training.kl_coef=0.5",),
    "prime": (),
}
"""Every algorithm with a reference model, and what makes it hold one."""


def test_all_algorithms_with_references_are_tested() -> None:
    assert HOLDS_ONE.keys() == {name for name, algorithm in ALGORITHMS.items() if algorithm.references}


def trained(
    name: str,
    base: Path,
    folder: Path,
    *overrides: str,
    monkeypatch: pytest.MonkeyPatch,
    mask: SubnetMask | None = None,
) -> tuple[TrainingRun, Any]:
    """Train a step, in full or under a mask; return what it measured, and the trainer."""
    kept: list[Any] = []
    restrict = training_run.restrict

    def keep(trainer: Any, *args: Any, **options: Any) -> Any:
        kept.append(trainer)
        return restrict(trainer, *args, **options)

    monkeypatch.setattr(training_run, "restrict", keep)
    options = [f"model.name={base}", "training.max_steps=1", "training.logging_steps=1", f"output={folder}"]
    recipe = load_checked_recipe(f"tiny/{name}", [*options, *HOLDS_ONE[name], *overrides])
    task, data = None, {"dpo": PAIRS, "kto": LABELLED}.get(name)
    if data is None:
        task = load_recipe_data(recipe).task
        assert task is not None
        data = prompt_dataset(task)
    run = training_run.train(recipe, base=base, folder=folder / "full", mask=mask, dataset=data, task=task)
    (trainer,) = kept
    return run, trainer


@pytest.mark.parametrize("name", HOLDS_ONE)
def test_train_holds_the_quantized_base_as_reference(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny("llama", tmp_path / "base")
    run, trainer = trained(name, base, tmp_path, "reference.quantization=nf4", monkeypatch=monkeypatch)
    by_hand, _ = load_model(base, dtype="bfloat16", quantization="nf4")
    layers, expected = quantized_layers(trainer.ref_model), quantized_layers(by_hand)
    assert layers.keys() == expected.keys()
    stored = by_hand.state_dict()
    assert trainer.ref_model.state_dict().keys() == stored.keys()
    for key, tensor in trainer.ref_model.state_dict().items():
        assert same_bits(tensor, stored[key]), key
    assert run.memory["reference_model"] == weight_bytes(by_hand)
    # What is trained stays dense, and is an ordinary checkpoint.
    assert not quantized_layers(trainer.model)
    assert open_checkpoint(tmp_path / "full").specs == open_checkpoint(base).specs


def test_train_saves_bytes_with_a_quantized_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these 232,448 weights nine tenths lie in linear layers."""
    base = save_tiny("llama", tmp_path / "base", hidden_size=128, intermediate_size=256)
    taken = {}
    for kind in (None, *KINDS):
        options = f"reference.quantization={kind or 'null'}"
        run, _ = trained("dpo", base, tmp_path / str(kind), options, monkeypatch=monkeypatch)
        taken[kind] = run.memory["reference_model"] / run.memory["weights"]
        monkeypatch.undo()
    assert taken[None] == 1.0
    assert 0.5 < taken["int8"] < 0.56
    assert 0.3 < taken["nf4"] < 0.36


@needs_trl_1_16("the loss is rounded to bfloat16")
@pytest.mark.parametrize("kind", KINDS)
def test_train_gives_the_loss_of_the_quantized_log_probabilities(
    kind: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first loss of DPO against the same model is log 2; against a quantized one it is what its numbers say."""
    from trl import DPOConfig, DPOTrainer

    base = save_tiny("llama", tmp_path / "base")
    dense, _ = trained("dpo", base, tmp_path / "dense", monkeypatch=monkeypatch)
    monkeypatch.undo()
    run, trainer = trained("dpo", base, tmp_path / "run", f"reference.quantization={kind}", monkeypatch=monkeypatch)
    model, tokenizer = load_model(base, dtype="bfloat16")
    by_hand, _ = load_model(base, dtype="bfloat16", quantization=kind)
    args: DPOConfig = trainer.args
    args.output_dir = str(tmp_path / "by_hand")
    expected = DPOTrainer(model=model, ref_model=by_hand, args=args, train_dataset=PAIRS, processing_class=tokenizer)
    expected.train()
    loss = run.log_history[0]["loss"]
    assert loss == expected.state.log_history[0]["loss"]
    assert dense.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(loss - math.log(2)) > 1e-5


def test_load_recipe_refuses_a_quantized_reference_where_there_is_none(tmp_path: Path) -> None:
    key = "reference.quantization"
    for name in ("orpo", "simpo", "raft"):
        (problem,) = problems_of(tmp_path, DPO.replace("dpo", name), f"{key}=nf4")
        assert problem.startswith(f"{key}: not used by `{name}`, which has no reference model, only by `dpo`, `kto`")
    (problem,) = problems_of(tmp_path, DPO, f"{key}=nf4", "training.sync_ref_model=true")
    assert "`training.sync_ref_model` moves it" in problem
    (problem,) = problems_of(tmp_path, DPO, f"{key}=nf4", "training.precompute_ref_log_probs=true")
    assert "`training.precompute_ref_log_probs`" in problem
    (problem,) = problems_of(tmp_path, GRPO, f"{key}=int4")
    assert problem.startswith(f"{key}: must be ")


@needs_trl_1_16("the reference model has its buffers in bfloat16, and is refused as another one than the policy")
@pytest.mark.parametrize("name", HOLDS_ONE)
def test_train_takes_the_reference_from_the_policy_where_a_mask_leaves_weights_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny("llama", tmp_path / "base")
    mask = random_mask(load_model(base, dtype="bfloat16")[0], 0.3)
    runs = {}
    for source in ("model", "policy"):
        options = (f"reference.source={source}", "training.max_steps=3", "training.learning_rate=1e-2")
        runs[source] = trained(name, base, tmp_path / source, *options, monkeypatch=monkeypatch, mask=mask)
        monkeypatch.undo()
    (second, _), (free, trainer) = runs["model"], runs["policy"]
    assert isinstance(trainer.ref_model, FreeReference)
    assert free.memory["reference_model"] == trainer.ref_model.nbytes < 0.5 * second.memory["reference_model"]
    losses = [[entry.get("loss") for entry in run.log_history] for run in (second, free)]
    assert losses[0] == losses[1]


def test_train_in_full_keeps_its_second_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny("llama", tmp_path / "base")
    run, trainer = trained("dpo", base, tmp_path / "run", "reference.source=policy", monkeypatch=monkeypatch)
    assert not isinstance(trainer.ref_model, FreeReference)
    assert run.memory["reference_model"] == weight_bytes(trainer.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("algorithm=orpo", "not used by `orpo`, which has no reference model, only by `dpo`, `kto`"),
        ("reference.quantization=nf4", "`reference.quantization` rounds it; set one of the two"),
        ("training.sync_ref_model=true", "`training.sync_ref_model`, which moves the reference model"),
        ("training.precompute_ref_log_probs=true", "`training.precompute_ref_log_probs`, which asks the base once"),
        ("training.torch_compile=true", "`training.torch_compile`, which compiles the policy"),
    ],
)
def test_load_recipe_refuses_a_free_reference_where_it_cannot_be(change: str, message: str, tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, DPO, "reference.source=policy", change)
    assert problem.startswith("reference.source: ")
    assert message in problem
