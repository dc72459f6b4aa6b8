from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from recipe_texts import DPO, GRPO

from subnet_ft.errors import LaunchError
from subnet_ft.recipe import Recipe, load_recipe
from subnet_ft.recipe.algorithms import ALGORITHMS
from subnet_ft.training.launch_check import (
    check_launch,
    check_trainer_joined,
    refuse_many_devices,
    refuse_many_processes,
)

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(autouse=True)
def _two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.fixture
def recipe(tmp_path: Any) -> Any:
    def load(text: str = DPO, *overrides: str) -> Recipe:
        (tmp_path / "recipe.yaml").write_text(text)
        return load_recipe(tmp_path / "recipe.yaml", overrides)

    return load


def test_refuse_many_processes_names_the_command_and_those_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match=r"`study` was started in 2 processes \(WORLD_SIZE=2\).*`run`, `train`"):
        refuse_many_processes("study")
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_many_processes("study")


@pytest.mark.parametrize(("devices", "local_rank", "refused"), [(2, None, True), (1, None, False), (2, "0", False)])
def test_refuse_many_devices_where_the_trainer_would_use_them_all(
    devices: int, local_rank: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    if refused:
        with pytest.raises(LaunchError, match=r"accelerate launch .*CUDA_VISIBLE_DEVICES=0"):
            refuse_many_devices()
    else:
        refuse_many_devices()


def test_check_launch_refuses_algorithms_whose_trainers_work_in_one_process(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [name for name, row in ALGORITHMS.items() if row.needs_one_process] == ["ppo", "prime"]
    for name in ("ppo", "prime"):
        with pytest.raises(LaunchError, match=rf"`algorithm: {name}` .* this launch has 2.* dpo, kto"):
            check_launch(recipe(GRPO.replace("algorithm: grpo", f"algorithm: {name}")))
    check_launch(recipe())
    monkeypatch.delenv("WORLD_SIZE")
    check_launch(recipe(GRPO.replace("algorithm: grpo", "algorithm: ppo")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: bf16"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1"),
        ({**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading"),
    ],
)
def test_check_launch_refuses_engines_and_precisions(
    settings: dict[str, str], message: str, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=message):
        check_launch(recipe())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=lora", "`lora` trains an adapter"),
        ("evidence.dynamics_steps=2", "dynamics_steps"),
        ("subnet.save_only_delta=true", "`subnet.save_only_delta` reads whole weights"),
        ("subnet.source={kind: gradient, steps: 2, density: 0.1}", "kind: gradient"),
    ],
)
def test_check_launch_refuses_under_fsdp_what_needs_whole_weights(
    override: str, message: str, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_launch(recipe(DPO, override))
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    check_launch(recipe())
    with pytest.raises(LaunchError, match=message):
        check_launch(recipe(DPO, override))


def test_check_trainer_joined_refuses_processes_that_would_train_by_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trainer(world_size: int, *, is_sharded: bool) -> Any:
        return SimpleNamespace(args=SimpleNamespace(world_size=world_size), is_fsdp_enabled=is_sharded)

    check_trainer_joined(trainer(2, is_sharded=False))
    with pytest.raises(LaunchError, match="2 processes, and accelerate makes them 1"):
        check_trainer_joined(trainer(1, is_sharded=False))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_trainer_joined(trainer(2, is_sharded=True))
    with pytest.raises(LaunchError, match="does not shard on this device"):
        check_trainer_joined(trainer(2, is_sharded=False))
