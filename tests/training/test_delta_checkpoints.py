"""Checkpoints that hold a delta: equal to dense ones, resumed to the same bits, small, and refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_mask
from small_runs import (
    FIRST_IS_BEST,
    FROZEN,
    SAVES,
    cut_off,
    damaged,
    mask_of,
    plain,
    restricted,
    steps_of,
    usual_mask,
)
from training.adapted import adapted, half_of_the_adapter
from training.masked_runs import Watch, same_state, same_weights, state_of, weights_of
from transformers.trainer_utils import HubStrategy

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.deltas import DeltaFile, apply_delta
from subnet_ft.errors import CheckpointError, DeltaMismatchError, OptimizerStateError, TrainerError
from subnet_ft.training import MaskSchedule, restrict
from subnet_ft.training.delta_checkpoints import DELTA, load_delta

ONLY_DELTA: dict[str, Any] = {"subnet": {"save_only_delta": True}, **SAVES}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer after four steps with a dense checkpoint of each."""
    trainer = restricted(tmp_path_factory.mktemp("dense"), **SAVES)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with deltas; nobody may write there."""
    folder = tmp_path_factory.mktemp("deltas")
    restricted(folder, **ONLY_DELTA).train()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the folder of the run with deltas."""
    return shutil.copytree(finished, tmp_path / "run")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(str(folder)).tensors())


def test_each_checkpoint_with_its_base_is_the_dense_one(finished: Path, dense: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    for step in (1, 2, 3, 4):
        checkpoint = finished / f"checkpoint-{step}"
        assert [path.name for path in checkpoint.glob("*.safetensors")] == [DELTA]
        made = apply_delta(base, checkpoint / DELTA, tmp_path / str(step))
        same_weights(stored(made), stored(Path(dense.args.output_dir) / f"checkpoint-{step}"))
        assert DeltaFile(checkpoint / DELTA).header.source == {"kind": "checkpoint", "step": step}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.float16),  # tied
        ("qwen2", torch.bfloat16),
        ("mixtral", torch.bfloat16),  # other names and shapes on disk
        ("gpt_neox", torch.bfloat16),  # another name on disk, buffers that are not saved
        ("gemma2", torch.bfloat16),
    ],
)
def test_checkpoints_of_every_kind_of_model_are_whole_beside_their_base(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny_model(family, dtype=dtype).save_pretrained(tmp_path / "base")
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def build(folder: str) -> Any:
        model = tiny_model(family, dtype=dtype)
        trainer = restricted(tmp_path / folder, model=model, mask=random_mask(model, 0.3), max_steps=3, **ONLY_DELTA)
        trainer.add_callback(Watch(end=lambda step: seen.update({step: weights_of(trainer.model)})))
        return trainer

    straight = build("run")
    straight.train()
    for step, weights in seen.items():
        file = tmp_path / "run" / f"checkpoint-{step}" / DELTA
        same_weights(stored(apply_delta(tmp_path / "base", file, tmp_path / f"{step}")), weights)
    again = build("again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    same_weights(weights_of(again.model), weights_of(straight.model))
    same_state(state_of(again), state_of(straight))


class Plain(torch.nn.Module):
    """A model that is nobody's `PreTrainedModel`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model("llama")

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids, labels=labels)


def test_a_model_without_config_is_saved_and_resumed(tmp_path: Path) -> None:
    trainers = []
    for _ in range(2):
        model = Plain()
        trainers.append(restricted(tmp_path, model=model, mask=random_mask(model, 0.3), **ONLY_DELTA))
    straight, again = trainers
    straight.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    same_weights(weights_of(again.model), weights_of(straight.model))


def test_a_checkpoint_has_every_other_file_of_a_dense_one(finished: Path, dense: Any) -> None:
    files, others = (
        {path.name for path in (folder / "checkpoint-4").iterdir()}
        for folder in (finished, Path(dense.args.output_dir))
    )
    assert files - others == {DELTA}
    assert others - files == {"model.safetensors"}


def test_the_tokenizer_of_the_collator_is_saved_where_the_trainer_has_none(tmp_path: Path) -> None:
    trainer = restricted(tmp_path, max_steps=1, **ONLY_DELTA)
    trainer.processing_class, trainer.data_collator.tokenizer = None, tiny_tokenizer()
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "tokenizer.json").is_file()


def test_it_stores_two_bytes_per_weight_of_the_mask_and_a_bit_per_weight(finished: Path) -> None:
    mask, path = usual_mask(), finished / "checkpoint-1" / DELTA
    bits = sum((tensor.num_elements + 7) // 8 for tensor in mask.tensors.values() if tensor.count)
    payload = 2 * mask.num_trainable + bits
    assert payload < path.stat().st_size < payload + 600 * len(mask.tensors)


@pytest.mark.parametrize("only_delta", [True, False])
@pytest.mark.parametrize("step", [1, 3])
def test_a_run_resumes_from_a_delta_to_the_same_bits(step: int, only_delta: bool, run: Path, dense: Any) -> None:
    again = restricted(run, subnet={"save_only_delta": only_delta})
    steps = steps_of(again)
    again.train(resume_from_checkpoint=str(run / f"checkpoint-{step}"))
    assert steps == list(range(step + 1, 5))
    same_weights(weights_of(again.model), weights_of(dense.model))
    same_state(state_of(again), state_of(dense))


def test_a_run_with_dense_checkpoints_goes_on_with_deltas(dense: Any, tmp_path: Path) -> None:
    shutil.copytree(Path(dense.args.output_dir) / "checkpoint-2", tmp_path / "checkpoint-2")
    again = restricted(tmp_path, **ONLY_DELTA)
    again.train(resume_from_checkpoint=True)
    same_weights(weights_of(again.model), weights_of(dense.model))
    tiny_model("llama").save_pretrained(tmp_path / "base")
    made = apply_delta(tmp_path / "base", tmp_path / "checkpoint-4" / DELTA, tmp_path / "made")
    same_weights(stored(made), weights_of(dense.model))


def test_a_run_that_was_cut_off_resumes_and_goes_on_writing_deltas(dense: Any, tmp_path: Path) -> None:
    trainer = restricted(tmp_path, **ONLY_DELTA)
    cut_off(trainer, after=3)
    damaged(tmp_path / "checkpoint-2" / DELTA)  # passed over: only `checkpoint-1` is whole
    again = restricted(tmp_path, **ONLY_DELTA)
    again.train(resume_from_checkpoint=True)
    same_weights(weights_of(again.model), weights_of(dense.model))
    same_state(state_of(again), state_of(dense))
    base = tiny_model("llama")
    load_delta(base, tmp_path / "checkpoint-4")
    same_weights(weights_of(base), weights_of(dense.model))


def test_the_same_trainer_resumes_with_the_weights_it_trained(dense: Any, tmp_path: Path) -> None:
    trainer = restricted(tmp_path, **ONLY_DELTA)
    cut_off(trainer, after=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    same_weights(weights_of(trainer.model), weights_of(dense.model))


def test_the_best_model_is_loaded_from_its_delta(tmp_path: Path) -> None:
    trainer = restricted(tmp_path, subnet={"save_only_delta": True}, **FIRST_IS_BEST)
    seen: list[dict[str, torch.Tensor]] = []
    trainer.add_callback(Watch(end=lambda step: seen.append(weights_of(trainer.model))))
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    same_weights(weights_of(trainer.model), seen[0])


def test_save_model_still_writes_a_dense_checkpoint(tmp_path: Path) -> None:
    trainer = restricted(tmp_path / "run", **ONLY_DELTA)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    same_weights(stored(tmp_path / "final"), weights_of(trainer.model))


@pytest.mark.parametrize("on_mask", [True, False])
def test_another_base_is_refused_before_the_model_is_touched(run: Path, on_mask: bool) -> None:
    model, name = tiny_model("llama"), "model.layers.1.mlp.up_proj.weight"
    flat = dict(model.named_parameters())[name].data.view(-1)
    flat[int((usual_mask()[name].view(-1) == on_mask).nonzero()[0])] += 1.0
    trainer = restricted(run, model=model, **ONLY_DELTA)
    start = weights_of(model)
    match = f"delta of another base: the weights of `{name}`" if on_mask else f"another base: .*`{name}`"
    with pytest.raises(OptimizerStateError, match=match):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    same_weights(weights_of(model), start)


def test_a_weight_outside_the_mask_that_changed_is_not_left_out_in_silence(tmp_path: Path) -> None:
    trainer = restricted(tmp_path, **ONLY_DELTA)
    frozen = dict(trainer.model.named_parameters())[FROZEN]

    def write(step: int) -> None:
        with torch.no_grad():
            frozen.view(-1)[0] += 1.0

    trainer.add_callback(Watch(end=write))
    with pytest.raises(DeltaMismatchError, match=f"`{FROZEN}` outside the mask changed"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_mask_that_changed_on_the_way_is_not_left_out_in_silence(tmp_path: Path) -> None:
    trainer, other = restricted(tmp_path, **ONLY_DELTA), mask_of(seed=5)
    trainer.add_callback(Watch(end=lambda step: trainer.masked_optimizer.set_mask(other) if step == 2 else None))
    with pytest.raises(DeltaMismatchError, match="outside the mask changed"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_what_a_delta_of_one_mask_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    trainer = restricted(tmp_path, **ONLY_DELTA)
    trainer.add_callback(MaskSchedule({2: usual_mask()}))
    with pytest.raises(TrainerError, match="`save_only_delta=True` writes deltas of one mask, and a `MaskSchedule`"):
        trainer.train()
    model = tiny_model("llama")
    model.register_buffer("running_mean", torch.zeros(2))
    with pytest.raises(TrainerError, match=r"saves 1 other tensors: .*running_mean"):
        restricted(tmp_path, model=model, **ONLY_DELTA)
    adapter = adapted()
    with pytest.raises(TrainerError, match="`save_only_delta=True` is of no use to PEFT adapters"):
        restricted(tmp_path, model=adapter, mask=half_of_the_adapter(adapter), **ONLY_DELTA)
    pushing = plain(tmp_path, **SAVES)
    pushing.args.push_to_hub, pushing.args.hub_strategy = True, HubStrategy.EVERY_SAVE
    with pytest.raises(TrainerError, match="pushes the dense weights of every checkpoint"):
        restrict(pushing, usual_mask(), save_only_delta=True)
    pushing.args.hub_strategy = HubStrategy.CHECKPOINT
    restrict(pushing, usual_mask(), save_only_delta=True)


def test_load_delta_refuses_another_model(finished: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_delta(model, finished / "checkpoint-1")


def test_load_delta_refuses_a_sharded_model(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subnet_ft.training.delta_checkpoints.is_sharded", lambda parameter: True)
    with pytest.raises(CheckpointError, match=r"FSDP2 shards this model\. Make the dense checkpoint out of it"):
        load_delta(tiny_model("llama"), finished / "checkpoint-1")
