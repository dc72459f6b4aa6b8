"""DPO and GRPO on one global batch: the same weights from 1, 2 and 4 processes, under DDP and FSDP2."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers import random_mask
from launching import torchrun
from packaging.version import Version
from safetensors.torch import load_file
from small_runs import plain

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import TrainerError
from subnet_ft.optim.frozen import weights_digest
from subnet_ft.training import restrict
from subnet_ft.training.saving import MANIFEST

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="transformers before 5.18 cannot resume several processes on the CPU: it loads to `cpu:0`, unknown to torch",
)

DDP = ("DPO, ddp", "GRPO, ddp")
FSDP = ("DPO, fsdp", "DPO, fsdp, one loads", "DPO, fsdp, in parts", "GRPO, fsdp")


@dataclass(frozen=True)
class Spread:
    """What `spread_worker.py` left in a folder; FSDP2 has no run in one process unless there are three sizes."""

    folder: Path
    sizes: tuple[int, ...]

    @property
    def most(self) -> int:
        """The number of processes that saved what the others resume."""
        return self.sizes[0]

    def sizes_of(self, name: str) -> list[int]:
        """Return the numbers of processes that a run was made with."""
        return [size for size in self.sizes if size > 1 or name in DDP or self.most > 2]

    def result(self, engine: str, size: int, rank: int = 0) -> dict[str, Any]:
        """Return what a process wrote down."""
        found: dict[str, Any] = json.loads((self.folder / f"result-{engine}-{size}-{rank}.json").read_text())
        return found

    def run(self, name: str, size: int, rank: int = 0) -> dict[str, Any]:
        """Return what a process wrote down about a run."""
        found: dict[str, Any] = self.result("ddp" if name in DDP else "fsdp", size, rank)["runs"][name]
        return found

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Return the weights of the end."""
        return load_file(self.folder / f"{name}.safetensors")


@pytest.fixture(scope="module", params=[(2, 1), pytest.param((4, 2, 1), marks=pytest.mark.slow)], ids=["2", "4"])
def spread(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Spread:
    """The runs; what most processes saved is resumed by fewer."""
    found = Spread(tmp_path_factory.mktemp("spread"), request.param)
    worker = Path(__file__).with_name("spread_worker.py")
    for size in found.sizes:
        for engine in ("ddp", "fsdp"):
            if size in found.sizes_of(f"DPO, {engine}"):
                torchrun(worker, found.folder, engine, found.most, processes=size)
    return found


def largest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between two models' weights."""
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("name", [*DDP, *FSDP])
def test_any_number_of_processes_trains_to_the_same_weights(spread: Spread, name: str) -> None:
    last = spread.sizes_of(name)[-1]
    for size in spread.sizes_of(name)[:-1]:
        assert largest(spread.weights(f"{name}-{size}"), spread.weights(f"{name}-{last}")) < 1e-6
        assert spread.run(name, size)["norms"] == pytest.approx(spread.run(name, last)["norms"], rel=1e-5)


@pytest.mark.parametrize("algorithm", ["DPO", "GRPO"])
def test_ddp_and_fsdp2_train_to_the_same_weights(spread: Spread, algorithm: str) -> None:
    for size in spread.sizes_of(f"{algorithm}, fsdp"):
        ddp, fsdp = spread.weights(f"{algorithm}, ddp-{size}"), spread.weights(f"{algorithm}, fsdp-{size}")
        assert largest(ddp, fsdp) < 1e-6


def test_weights_that_one_process_loads_train_as_those_that_all_load(spread: Spread) -> None:
    """`cpu_ram_efficient_loading`: the others hold nothing until the model is sharded, and the base is checked then."""
    ours, usual = (spread.weights(f"{name}-{spread.most}") for name in ("DPO, fsdp, one loads", "DPO, fsdp"))
    assert all(torch.equal(weight, usual[name]) for name, weight in ours.items())


@pytest.mark.parametrize("name", [*DDP, *FSDP])
def test_off_mask_weights_keep_their_bits_and_every_process_has_the_same_ones(spread: Spread, name: str) -> None:
    for size in spread.sizes_of(name):
        first = spread.run(name, size)
        assert len(first["digests"]) == len(set(first["digests"].values())) == 4
        for rank in range(size):
            found = spread.run(name, size, rank)
            assert found["compact"]
            assert found["off_mask"] == []
            assert found["moved"] > 0.5 * found["trainable"]
            assert found["digests"] == first["digests"]
            assert found["norms"] == first["norms"]


@pytest.mark.parametrize("name", FSDP)
def test_each_process_holds_its_part_of_the_compact_gradient(spread: Spread, name: str) -> None:
    for size in spread.sizes_of(name):
        held = [spread.run(name, size, rank)["held"] for rank in range(size)]
        assert sum(held) == spread.run(name, size)["trainable"]
        assert max(held) < 1.1 / size * sum(held)


@pytest.mark.parametrize("name", [*DDP, *FSDP])
def test_fewer_processes_go_on_from_a_checkpoint_of_more(spread: Spread, name: str) -> None:
    """Within rounding: sums over other numbers of processes round elsewhere."""
    engine = "ddp" if name in DDP else "fsdp"
    for size in spread.sizes_of(name)[1:]:
        assert sorted(spread.result(engine, size)["resumed"][name]["digests"]) == ["3", "4"]
        resumed, whole = spread.weights(f"{name}-{spread.most}-then-{size}"), spread.weights(f"{name}-{spread.most}")
        assert largest(resumed, whole) < 1e-6


def test_checkpoints_hold_whole_files_or_a_part_per_process(spread: Spread) -> None:
    def names(run: str) -> set[str]:
        return {file.partition("checkpoint-2/")[2] for file in spread.run(run, spread.most)["files"]}

    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", MANIFEST} <= names("DPO, fsdp")
    parts = names("DPO, fsdp, in parts")
    assert {"sharded/optimizer.json", "scheduler.pt", "config.json", MANIFEST} <= parts
    assert sum(file.startswith("sharded/shard-") for file in parts) == spread.most
    assert not {"model.safetensors", "optimizer.pt"} & parts


def test_a_checkpoint_in_parts_opens_as_the_model_that_was_trained(spread: Spread) -> None:
    run = "DPO, fsdp, in parts"
    checkpoint = open_checkpoint(spread.folder / str(spread.most) / run / "checkpoint-2")
    model = tiny_model("llama", dtype=torch.float32, seed=9)
    named = dict(model.named_parameters())
    assert checkpoint.is_in_parts
    assert list(checkpoint.specs) == list(named)
    with torch.no_grad():
        for name, tensor in checkpoint.tensors():
            named[name].copy_(tensor)
    assert weights_digest(model) == spread.run(run, spread.most)["digests"]["2"]


def test_foreign_masks_mixed_precision_and_deltas_are_refused_in_every_process(spread: Spread) -> None:
    for rank in range(spread.most):
        refusals = spread.result("fsdp", spread.most, rank)["refusals"]
        assert "was trained under mask" in refusals["foreign mask"]
        assert "Mixed precision (bf16) makes accelerate keep" in refusals["mixed precision"]
        assert "not those that the mask was made for (`another/base`)" in refusals["base that one process loads"]
        assert "`save_only_delta=True` reads the whole weights in one process, and FSDP2" in refusals["only deltas"]
        different = spread.result("ddp", spread.most, rank)["different masks"]
        assert f"were given {spread.most} different masks" in different


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_every_process_loads_the_best_model_at_the_end(spread: Spread, engine: str) -> None:
    for rank in range(spread.most):
        found = spread.result(engine, spread.most, rank)["best"]
        assert found["is_first"]
        assert found["best"].endswith("checkpoint-1")
        assert ".unfinished" not in found["best"]


def stand_in(**changes: Any) -> SimpleNamespace:
    """Return an accelerator in a state that this machine cannot bring about."""
    plugin = SimpleNamespace(
        fsdp_version=2,
        mixed_precision_policy=None,
        cpu_ram_efficient_loading=False,
        cpu_offload=None,
        state_dict_type="StateDictType.FULL_STATE_DICT",
    )
    state = SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=SimpleNamespace(zero_stage=3))
    known = {"state": state, "mixed_precision": "no", "parallelism_config": None, "distributed_type": "MULTI_CPU"}
    return SimpleNamespace(**{**known, **changes})


@pytest.mark.parametrize(
    ("flag", "stage", "message"),
    [
        ("is_deepspeed_enabled", 1, r"ZeRO stage 1\) joins parameters.* Use DDP, under which"),
        ("is_deepspeed_enabled", 2, "FSDP2 with `fsdp_reshard_after_forward: false`"),
        ("is_deepspeed_enabled", 3, "FSDP2 with `fsdp_reshard_after_forward: true`"),
        ("is_fsdp_xla_enabled", 0, "FSDP on XLA flattens parameters"),
    ],
)
def test_restrict_refuses_other_sharding_with_what_to_use_instead(
    tmp_path: Path, flag: str, stage: int, message: str
) -> None:
    trainer: Any = plain(tmp_path)
    setattr(trainer, flag, True)
    trainer.accelerator = stand_in()
    trainer.accelerator.state.deepspeed_plugin.zero_stage = stage
    with pytest.raises(TrainerError, match=message):
        restrict(trainer, random_mask(trainer.model, 0.3))


def test_restrict_refuses_fsdp1_and_parallelism_beside_fsdp2(tmp_path: Path) -> None:
    trainer: Any = plain(tmp_path)
    mask = random_mask(trainer.model, 0.3)
    trainer.is_fsdp_enabled = True
    trainer.accelerator = stand_in()
    trainer.accelerator.state.fsdp_plugin.fsdp_version = 1
    with pytest.raises(TrainerError, match="FSDP1 flattens parameters"):
        restrict(trainer, mask)
    trainer.accelerator = stand_in(parallelism_config=SimpleNamespace(tp_size=2, cp_size=1, sp_size=1))
    with pytest.raises(TrainerError, match="`tp_size` is 2"):
        restrict(trainer, mask)


def test_restrict_refuses_checkpoints_in_parts_without_weights(tmp_path: Path) -> None:
    trainer: Any = plain(tmp_path, save_only_model=True)
    trainer.is_fsdp_enabled = True
    trainer.accelerator = stand_in()
    trainer.accelerator.state.fsdp_plugin.state_dict_type = "StateDictType.SHARDED_STATE_DICT"
    with pytest.raises(TrainerError, match="`save_only_model` with `state_dict_type: SHARDED_STATE_DICT`"):
        restrict(trainer, random_mask(trainer.model, 0.3))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"cpu_offload": object()}, {}, "CPU offload under FSDP2 is tested with torch 2.13"),
        ({}, {"optim": "adamw_bnb_8bit"}, "keeps a scale per block of values"),
    ],
)
def test_restrict_refuses_under_fsdp2_what_would_train_or_save_something_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    trainer: Any = plain(tmp_path, **options)
    trainer.is_fsdp_enabled = True
    trainer.accelerator = stand_in()
    vars(trainer.accelerator.state.fsdp_plugin).update(changes)
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    with pytest.raises(TrainerError, match=message):
        restrict(trainer, random_mask(trainer.model, 0.3))


def test_restrict_refuses_adapters_under_fsdp2(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    trainer: Any = plain(tmp_path, model=model)
    trainer.is_fsdp_enabled = True
    trainer.accelerator = stand_in()
    with pytest.raises(TrainerError, match="train them under DDP"):
        restrict(trainer, random_mask(trainer.model, 0.3))


def test_restrict_refuses_a_launcher_whose_fsdp_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs accelerate runs DDP instead, and says nothing."""
    trainer = plain(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainerError, match="nothing would be sharded"):
        restrict(trainer, random_mask(trainer.model, 0.3))
