"""Every method trains, saves, loads and is judged: each test is a cell of the table in `docs/methods.md`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_table import read_table
from helpers import same_bits
from safetensors.torch import load_file
from training.masked_runs import Watch, check_weights, third_of, weights_of
from transformers import TrainerCallback

from subnet_ft.base_stage import make_base
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.models import load_model
from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import CheckpointError
from subnet_ft.evidence.accuracy import evaluate_model
from subnet_ft.evidence.pairs import evaluate_pairs
from subnet_ft.held_out import HeldOutPairs, held_out, judge
from subnet_ft.inputs import RunInputs
from subnet_ft.masks import SubnetMask
from subnet_ft.methods.adapters import attach
from subnet_ft.methods.saved import BASE, CONFIG, WEIGHTS, load_trained
from subnet_ft.pipeline import load_checked_recipe
from subnet_ft.recipe import Recipe
from subnet_ft.recipe.algorithms import ALGORITHMS
from subnet_ft.recipe.methods import METHODS
from subnet_ft.training import run as training_run
from subnet_ft.training.adapters import prompt_texts
from subnet_ft.training_data import training_dataset

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
COLUMNS = ("train", "save", "load", "evaluate")
SMALL = ["task.num_train=64", "task.num_eval=16", "training.max_steps=8", "training.per_device_train_batch_size=8"]
# What fits a model of 32 dimensions, and a learning rate at which eight steps show.
SETTINGS = {
    "last_layers": "{config: {num_layers: 1, final_norm_and_head: true}}",
    "bitfit": "{config: {terms: bias_and_norm}, training: {learning_rate: 2.0e-2}}",
    "eva": "{config: {r: 4}}",
    "shira": "{config: {r: 4}, training: {learning_rate: 1.0e-2}}",
    "ia3": "{training: {learning_rate: 1.0e-1}}",
    "prompt_tuning": "{training: {learning_rate: 3.0e-2}}",
    "prefix_tuning": "{training: {learning_rate: 1.0e-1}}",
    "adapters": "{training: {learning_rate: 1.0e-2}}",
    "adaption_prompt": "{training: {learning_rate: 1.0e-1}}",
}
PAIRS = ("task.pairs.num_prompts=64",)
ADAPTERS = [name for name, method in METHODS.items() if method.trains == "adapter"]
REWARDED = [
    name for name, method in METHODS.items() if name not in ("full", "subnet") and "reward" not in method.refuses
]
TOKENIZER = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}


@dataclass(frozen=True)
class Trained:
    """One finished run of a method.

    Args:
        inputs: Its recipe, base and data.
        folder: What it saved.
        trainer: The trainer, with the model as it ended.
        mask: What it trained.
        run: What it measured.
    """

    inputs: RunInputs
    folder: Path
    trainer: Any
    mask: SubnetMask
    run: training_run.TrainingRun


def recipe_of(method: str, output: Path, *overrides: str, name: str = "tiny/sft") -> Recipe:
    settings = [f"methods.{method}={SETTINGS[method]}"] if method in SETTINGS else []
    return load_checked_recipe(name, [*SMALL, f"output={output}", *settings, *overrides])


def trained_with(method: str, recipe: Recipe, folder: Path, callbacks: Sequence[TrainerCallback] = ()) -> Trained:
    """Train a method as its stage does, and keep the trainer."""
    inputs, kept = RunInputs(recipe), []
    make_base(inputs, folder.parent, overwrite=False)
    restrict = training_run.restrict

    def keep(trainer: Any, *args: Any, **options: Any) -> Any:
        kept.append((trainer, *args))
        for callback in callbacks:
            trainer.add_callback(callback)
        return restrict(trainer, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "restrict", keep)
        run = training_run.train(
            recipe,
            base=inputs.base.folder,
            folder=folder,
            mask=third_of(tiny_model("llama")) if method == "subnet" else None,
            dataset=training_dataset(inputs, folder.parent, overwrite=False, progress=False),
            task=inputs.data.task if inputs.needs_rewards else None,
            teacher=None if inputs.teacher is None else inputs.teacher.folder,
            method=method,
        )
    trainer, mask = kept[-1]
    return Trained(inputs, folder, trainer, mask, run)


def started(method: str, inputs: RunInputs) -> Any:
    """Return the model as the run of a method started."""
    recipe = inputs.recipe
    kind, held = ALGORITHMS[recipe.algorithm].model_kind, METHODS[method].quantization
    model, tokenizer = load_model(inputs.base.folder, dtype="bfloat16", kind=kind, quantization=held)
    if method not in ADAPTERS:
        return model
    texts = prompt_texts(training_dataset(inputs, Path(recipe.output), overwrite=False, progress=False), tokenizer)
    config = recipe.methods[method].config if method in recipe.methods else {}
    return attach(model, tokenizer, method, config, seed=recipe.seed, texts=texts)


def loss_of(model: Any, inputs: RunInputs) -> float:
    """Return the mean loss of the training rows' completions, by the model itself."""
    _, tokenizer = load_model(inputs.base.folder, dtype="bfloat16")
    rows = list(training_dataset(inputs, Path(), overwrite=False, progress=False))
    prompts = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    batch = tokenizer(
        [row["prompt"] + row["completion"] for row in rows], return_tensors="pt", padding=True, padding_side="right"
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, length in zip(labels, prompts, strict=True):
        row[:length] = -100
    with torch.no_grad():
        loss = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    return float(loss)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what trains a method once for all its cells."""
    folder = tmp_path_factory.mktemp("runs")
    return cache(lambda method: trained_with(method, recipe_of(method, folder), folder / method))


def check_train(name: str, done: Trained) -> None:
    """Only what the method trains has moved, nearly all of it, and the model writes the completions more readily."""
    start = started(name, done.inputs)
    check_weights(done.trainer.model, done.mask, weights_of(start))
    assert (done.run.num_steps, done.run.num_trainable) == (8, done.mask.num_trainable)
    losses = [entry["loss"] for entry in done.run.log_history[:-1]]
    assert len(losses) == 8
    assert loss_of(done.trainer.model, done.inputs) < 0.98 * loss_of(start, done.inputs)
    base = open_checkpoint(done.inputs.base.folder)
    num_base = sum(math.prod(spec.shape) for spec in base.specs.values())
    assert done.run.num_parameters == num_base + (done.mask.num_trainable if name in ADAPTERS else 0)
    itemsize = 4 if name in ADAPTERS and name != "adaption_prompt" else 2
    memory, count = done.run.memory, done.run.num_trainable
    assert memory["gradients"] == 4 * count
    assert memory["moments"] == 8 * count
    assert memory["masters"] == (4 * count if itemsize == 2 else 0)
    if name != "qlora":
        assert memory["weights"] == 2 * num_base + (itemsize * count if name in ADAPTERS else 0)
    assert 0.0 < done.run.step_seconds < done.run.seconds


def check_save(name: str, done: Trained) -> None:
    """The folder holds the model or the adapter, in safetensors, as large as counted, and nothing to unpickle."""
    files = {path.name for path in done.folder.iterdir() if path.is_file()}
    if name not in ADAPTERS:
        assert files == {*TOKENIZER, "config.json", "generation_config.json", "model.safetensors", "log.json"}
        assert open_checkpoint(done.folder).specs == done.inputs.base.specs
        return
    assert files == {*TOKENIZER, CONFIG, WEIGHTS, BASE, "log.json"}
    stored = load_file(done.folder / WEIGHTS)
    # SHiRA's indices are part of what it learned: a row and a column for every weight.
    weights = {key: value for key, value in stored.items() if value.is_floating_point()}
    assert sum(value.numel() for value in weights.values()) == done.run.num_trainable
    assert sum(value.numel() for value in stored.values()) == done.run.num_trainable * (3 if name == "shira" else 1)
    with pytest.raises(CheckpointError, match="is a PEFT adapter"):
        open_checkpoint(done.folder)


def check_load(name: str, done: Trained) -> None:
    """A fresh process's model has the logits of the one that was trained, bit for bit."""
    ids = torch.arange(2, 34).view(2, 16)
    loaded, tokenizer = load_trained(done.folder, done.inputs.base.folder, dtype="bfloat16")
    with torch.no_grad():
        assert same_bits(loaded.eval()(ids).logits, done.trainer.model.eval()(ids).logits)
    assert tokenizer.get_vocab() == done.trainer.processing_class.get_vocab()


def check_evaluate(name: str, done: Trained) -> None:
    """The stage is judged like the model that was trained: the same answers, one by one."""
    task = done.inputs.data.evaluation
    assert task is not None
    own = load_model(done.inputs.base.folder, dtype="bfloat16")[1]
    records = evaluate_model(done.trainer.model, own, task, max_new_tokens=4, batch_size=8)
    recipe = dataclasses.replace(
        done.inputs.recipe,
        evaluation=dataclasses.replace(done.inputs.recipe.evaluation, max_new_tokens=4, batch_size=8),
    )
    assert judge(done.folder, RunInputs(recipe), task) == records
    assert any(record["completion"] for record in records)


CHECKS = {"train": check_train, "save": check_save, "load": check_load, "evaluate": check_evaluate}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", METHODS)
def test_method_does(name: str, column: str, trained: Any, record_property: Any) -> None:
    row = list(METHODS).index(name)
    record_property("corner", "method")
    record_property("cell", [row, name, COLUMNS.index(column), column, len(METHODS) * len(COLUMNS)])
    CHECKS[column](name, trained(name))
    record_property("outcome", "yes")


def test_the_table_names_every_cell_with_its_outcome() -> None:
    expected = {(name, column): "yes" for name in METHODS for column in COLUMNS}
    assert read_table(PAGE.read_text(encoding="utf-8")) == expected


def test_the_page_names_every_method_with_its_config_and_what_it_refuses() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    found = {row[0].strip("`"): (row[2].strip("`"), row[5]) for row in rows}
    assert {name: config for name, (config, _) in found.items()} == {
        name: "" if method.config is None else method.config.rpartition(":")[2] for name, method in METHODS.items()
    }
    for name, method in METHODS.items():
        assert all(f"`{algorithm}`" in found[name][1] for algorithm in method.refuses), name


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what trains a reward model with a method once."""
    folder = tmp_path_factory.mktemp("rewards")
    return cache(
        lambda method: trained_with(method, recipe_of(method, folder, *PAIRS, name="tiny/reward"), folder / method)
    )


@pytest.mark.parametrize("name", REWARDED)
def test_train_gives_a_reward_model_with(name: str, reward_models: Any) -> None:
    """The new head is trained and saved beside what the method trains; judged by pairs, it is the trained model."""
    done = reward_models(name)
    check_weights(done.trainer.model, done.mask, weights_of(started(name, done.inputs)))
    base = open_checkpoint(done.inputs.base.folder)
    (head,) = [key for key, tensor in done.mask.tensors.items() if "score" in key and tensor.count]
    assert done.mask.tensors[head].count == base.specs["score.weight"].shape[1]
    assert done.run.num_trainable == done.mask.num_trainable > done.mask.tensors[head].count
    assert done.run.memory["moments"] == 8 * done.run.num_trainable
    saved = load_file(done.folder / (WEIGHTS if name in ADAPTERS else "model.safetensors"))
    (key,) = [key for key in saved if key.endswith("score.weight")]
    assert saved[key].shape == base.specs["score.weight"].shape
    assert not same_bits(saved[key], base.tensor("score.weight"))
    ids = torch.arange(2, 34).view(2, 16)
    loaded, own = load_trained(done.folder, base.folder, dtype="bfloat16", kind="reward_model")
    with torch.no_grad():
        assert same_bits(loaded.eval()(ids).logits, done.trainer.model.eval()(ids).logits)
    pairs = held_out(done.inputs)
    assert isinstance(pairs, HeldOutPairs)
    records = judge(done.folder, done.inputs, pairs)
    batch_size = done.inputs.recipe.evaluation.batch_size
    assert records == evaluate_pairs(done.trainer.model, own, pairs.rows, batch_size=batch_size)
    assert records != judge(base.folder, done.inputs, pairs)


@pytest.mark.parametrize(("name", "method"), [("tiny/sft", "lora"), ("tiny/sft", "adapters"), ("tiny/reward", "lora")])
def test_train_resumes_an_adapter_to_the_bits_of_an_uninterrupted_run(
    name: str, method: str, trained: Any, reward_models: Any, tmp_path: Path
) -> None:
    def stop(step: int) -> None:
        if step == 5:
            raise InterruptedError

    is_reward = name == "tiny/reward"
    whole = (reward_models if is_reward else trained)(method)
    recipe = recipe_of(method, tmp_path, "training.save_steps=2", *(PAIRS if is_reward else ()), name=name)
    with pytest.raises(InterruptedError):
        trained_with(method, recipe, tmp_path / method, [Watch(end=stop)])
    resumed = trained_with(method, recipe, tmp_path / method)
    assert resumed.run.resumed_from == "checkpoint-4"
    expected, found = load_file(whole.folder / WEIGHTS), load_file(resumed.folder / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[key], expected[key]) for key in expected)
