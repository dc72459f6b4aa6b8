"""A run trains and saves in the dtype that its base is stored in, so that the two compare bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import processors
from transformers import AutoTokenizer

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.errors import CheckpointError, TrainerError
from subnet_ft.evidence.dynamics import DYNAMICS, read_dynamics
from subnet_ft.masks import extract
from subnet_ft.pipeline import load_checked_recipe
from subnet_ft.training import run as training_run
from subnet_ft.training.resume import remove_checkpoints
from subnet_ft.training.snapshots import SNAPSHOTS

ROUTER = "model.layers.1.mlp.gate.weight"
PAIRS = Dataset.from_list([{"prompt": f"{a} + 1 = ", "chosen": f"{a + 1}", "rejected": "?"} for a in range(8)])


def train(base: Path, folder: Path, **options: Any) -> training_run.TrainingRun:
    recipe = load_checked_recipe("tiny/dpo", ["training.max_steps=1", f"output={folder}"])
    return training_run.train(recipe, base=base, folder=folder, dataset=PAIRS, task=None, **options)


def test_train_saves_the_dtypes_of_the_base(tmp_path: Path) -> None:
    """transformers 5.24 loads the routers of this family in float32, and TRL those of the reference model."""
    base, full, subnet = save_tiny("deepseek_v3", tmp_path / "base"), tmp_path / "full", tmp_path / "subnet"
    finished = train(base, full, mask=None)
    assert finished.memory["reference_model"] == finished.memory["weights"]
    mask = extract(base, full)
    assert mask[ROUTER].any()
    train(base, subnet, mask=mask)
    assert open_checkpoint(base).specs == open_checkpoint(full).specs == open_checkpoint(subnet).specs


def test_train_refuses_weights_that_stay_in_another_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model = training_run.load_model

    def load_with_precise_router(*args: Any, **options: Any) -> Any:
        model, tokenizer = load_model(*args, **options)
        router = model.get_parameter(ROUTER)
        router.data = router.data.float() + 2.0**-20
        return model, tokenizer

    monkeypatch.setattr(training_run, "load_model", load_with_precise_router)
    base = save_tiny("deepseek_v3", tmp_path / "base")
    with pytest.raises(CheckpointError, match=rf"than `model\.dtype: bfloat16`.*: `?{ROUTER}.*torch\.bfloat16"):
        train(base, tmp_path / "full", mask=None)
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize("algorithm", ["orpo", "simpo"])
@pytest.mark.parametrize("own", [False, True])
def test_train_puts_a_bos_token_before_prompts_only_where_the_tokenizer_does(
    algorithm: str, own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's older trainers add one always; the model is sampled and judged with what the tokenizer says."""
    trainers: list[Any] = []
    restrict = training_run.restrict
    monkeypatch.setattr(
        training_run, "restrict", lambda trainer, *args, **kwargs: restrict(_keep(trainers, trainer), *args, **kwargs)
    )
    base = save_tiny("llama", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.bos_token = "<"
    bos = tokenizer.bos_token_id
    if own:
        template = processors.TemplateProcessing(single="< $A", special_tokens=[("<", bos)])
        tokenizer._tokenizer.post_processor = template
    tokenizer.save_pretrained(base)
    assert (AutoTokenizer.from_pretrained(base)("1")["input_ids"][0] == bos) is own
    recipe = load_checked_recipe(
        f"tiny/{algorithm}", ["training.max_steps=1", f"model.name={base}", f"output={tmp_path}"]
    )
    training_run.train(recipe, base=base, folder=tmp_path / "full", dataset=PAIRS, task=None, mask=None)
    (trainer,) = trainers
    assert all((row["chosen_input_ids"][0] == bos) is own for row in trainer.train_dataset)
    assert AutoTokenizer.from_pretrained(tmp_path / "full").bos_token == "<"


def test_train_says_when_there_is_less_data_than_a_batch(tmp_path: Path) -> None:
    """TRL drops what is left of a batch, and transformers then trains no step and says nothing."""
    base = save_tiny("llama", tmp_path / "base")
    recipe = load_checked_recipe(
        "tiny/distillation", [f"model.name={base}", f"teacher.name={base}", f"output={tmp_path}"]
    )
    few = Dataset.from_list([{"prompt": f"{a} + 1 = "} for a in range(8)])
    with pytest.raises(TrainerError, match="Not one step was trained: 8 rows"):
        training_run.train(recipe, base=base, folder=tmp_path / "full", dataset=few, task=None, mask=None, teacher=base)
    assert not (tmp_path / "full" / "model.safetensors").exists()


def test_train_refuses_a_teacher_with_another_tokenizer(tmp_path: Path) -> None:
    base, teacher = save_tiny("llama", tmp_path / "base"), save_tiny("llama", tmp_path / "teacher", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(teacher)
    recipe = load_checked_recipe(
        "tiny/distillation", [f"model.name={base}", f"teacher.name={teacher}", f"output={tmp_path}"]
    )
    with pytest.raises(CheckpointError, match=r"another vocabulary than .*: 84 and 83 tokens"):
        training_run.train(
            recipe, base=base, folder=tmp_path / "full", dataset=PAIRS, task=None, mask=None, teacher=teacher
        )


def _keep(trainers: list[Any], trainer: Any) -> Any:
    trainers.append(trainer)
    return trainer


def test_train_writes_the_dynamics_that_the_recipe_asks_for(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    settings = ["training.max_steps=5", "training.save_steps=2", "methods.lora.config.r=2", f"output={tmp_path}"]
    asked = load_checked_recipe("tiny/dpo", [*settings, "evidence.dynamics_steps=2"])
    data: dict[str, Any] = {"base": base, "dataset": PAIRS, "task": None}
    training_run.train(asked, folder=tmp_path / "full", mask=None, **data)
    found = read_dynamics(tmp_path / "full")
    mask = extract(base, tmp_path / "full")
    assert (found.steps, found.final, found.missing) == ([2, 4, 5], mask.density, "")
    assert found.num_trainable == found.num_parameters == mask.num_parameters
    training_run.train(asked, folder=tmp_path / "subnet", mask=mask, **data)
    assert read_dynamics(tmp_path / "subnet").num_trainable == mask.num_trainable
    # A run may have to resume until its stage is finished, and then nothing of this is needed.
    bitmaps = tmp_path / "full" / training_run.TRAINER / SNAPSHOTS
    assert len(list(bitmaps.iterdir())) == 3
    remove_checkpoints(bitmaps.parent, since=2)
    assert bitmaps.is_dir()
    remove_checkpoints(bitmaps.parent)
    assert not bitmaps.exists()

    # The first steps of a run, whose checkpoint is all that is wanted; and weights that are not the base's.
    training_run.train(asked, folder=tmp_path / "probe", mask=None, stop_after=3, **data)
    training_run.train(asked, folder=tmp_path / "lora", mask=None, method="lora", **data)
    training_run.train(load_checked_recipe("tiny/dpo", settings), folder=tmp_path / "unasked", mask=None, **data)
    assert [folder.name for folder in sorted(tmp_path.iterdir()) if (folder / DYNAMICS).exists()] == ["full", "subnet"]
