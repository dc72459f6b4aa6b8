"""Moments read from checkpoints are what the optimizer had, and those of other runs are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from small_runs import SAVES, restricted, usual_mask
from training.masked_runs import Watch

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import OptimizerStateError
from subnet_ft.masks import SubnetMask
from subnet_ft.training.moments import read_moments

NORM = "model.norm.weight"


def full() -> SubnetMask:
    return SubnetMask.full({name: tuple(p.shape) for name, p in tiny_model("llama").named_parameters()})


def saved(folder: Path, *, subnet: dict[str, Any] | None = None, **options: Any) -> tuple[Path, Any]:
    """Train four steps in full with saves, and return the checkpoint of the third beside the optimizer's state then."""
    trainer = restricted(folder, mask=full(), subnet=subnet, **SAVES, **options)
    state: dict[str, Any] = {}

    def keep(step: int) -> None:
        if step == 3:
            optimizer = trainer.masked_optimizer
            state.update(
                {
                    optimizer._names[parameter]: {
                        key: value.clone() for key, value in optimizer.state[parameter].items()
                    }
                    for parameter in optimizer.state
                }
            )

    trainer.add_callback(Watch(end=keep))
    trainer.train()
    return folder / "checkpoint-3", state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return saved(tmp_path_factory.mktemp("full"))


def changed(checkpoint: Path, folder: Path, **entries: Any) -> Path:
    """Copy a checkpoint with other entries of one tensor's saved state; `None` removes one."""
    copy = folder / "checkpoint-3"
    copy.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "optimizer.pt":
            (copy / file.name).write_bytes(file.read_bytes())
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    state["state"][NORM].update(entries)
    state["state"][NORM] = {key: value for key, value in state["state"][NORM].items() if value is not None}
    torch.save(state, copy / "optimizer.pt")
    return copy


def test_read_moments_gives_the_optimizers_state_bit_by_bit(checkpoint: tuple[Path, Any]) -> None:
    folder, state = checkpoint
    moments = read_moments(folder)
    assert (moments.step, moments.total_steps) == (3, 4)
    assert moments.names == list(state)
    for _ in range(2):  # as often as one likes
        found = dict(moments)
        assert found.keys() == state.keys() == dict(tiny_model("llama").named_parameters()).keys()
        for name, values in state.items():
            one = found[name]
            assert one.master is not None
            assert same_bits(one.exp_avg, values["exp_avg"])
            assert same_bits(one.exp_avg_sq, values["exp_avg_sq"])
            assert same_bits(one.master, values["master"])
            assert (one.step, one.beta1, one.beta2, one.eps) == (3, 0.9, 0.999, 1e-8)
    assert moments.names  # what follows is the learning rate of the linear schedule: a quarter is left
    assert found[NORM].lr == pytest.approx(3e-2 / 4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the mappings of the process from /proc")
def test_read_moments_maps_the_file(checkpoint: tuple[Path, Any]) -> None:
    """Several gigabytes of state must not be read at once."""
    moments = read_moments(checkpoint[0])
    assert str(checkpoint[0] / "optimizer.pt") in Path("/proc/self/maps").read_text()
    assert moments.names


def test_read_moments_completes_remainders_to_the_masters(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    folder, state = saved(tmp_path, subnet={"master": "remainder"})
    assert state[NORM]["master"].dtype == torch.int16
    exact = checkpoint[1]  # the same run with float32 masters
    for name, one in read_moments(folder):
        assert one.master is not None
        assert same_bits(one.master, exact[name]["master"]), name


def test_read_moments_of_float32_weights_has_them_as_masters(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, model=tiny_model("llama", dtype=torch.float32))
    moments = read_moments(folder)
    for name, one in moments:
        assert one.master is not None
        assert same_bits(one.master, moments._weights.tensor(name).view(-1))
        assert one.master.dtype == torch.float32


@pytest.mark.parametrize("master", ["stochastic", "none"])
def test_read_moments_has_no_masters_where_the_run_had_none(master: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, subnet={"master": master})
    assert all(one.master is None for _, one in read_moments(folder))


def test_read_moments_refuses_a_masked_run(tmp_path: Path) -> None:
    trainer = restricted(tmp_path, **SAVES)
    trainer.train()
    with pytest.raises(OptimizerStateError, match=rf"trained mask {usual_mask().fingerprint[:16]}, not all weights"):
        read_moments(tmp_path / "checkpoint-3")


@pytest.mark.parametrize(("optim", "said"), [("sgd", "SGD, which keeps no moments"), ("adagrad", "`.*Adagrad`")])
def test_read_moments_refuses_other_optimizers(optim: str, said: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, optim=optim)
    with pytest.raises(OptimizerStateError, match=rf"trained with {said}"):
        read_moments(folder)


def test_read_moments_refuses_what_is_no_checkpoint(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(OptimizerStateError, match=r"no checkpoint of a trainer: `trainer_state.json`"):
        read_moments(tmp_path)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 3, "max_steps": 4}))
    with pytest.raises(OptimizerStateError, match=r"has no `optimizer.pt`"):
        read_moments(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"nothing")
    with pytest.raises(OptimizerStateError, match=r"torch cannot read"):
        read_moments(tmp_path)
    torch.save({"state": {}, "param_groups": [{"params": [0]}]}, tmp_path / "optimizer.pt")
    with pytest.raises(OptimizerStateError, match=r"not the state of a masked optimizer"):
        read_moments(tmp_path)


def test_read_moments_unpickles_nothing(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 3, "max_steps": 4}))
    torch.save({"state": {}, "param_groups": [], "other": Path("x")}, tmp_path / "optimizer.pt")
    with pytest.raises(OptimizerStateError, match=r"torch cannot read"):
        read_moments(tmp_path)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"exp_avg": None}, r"`exp_avg` of `model.norm.weight` in .* is None"),
        ({"exp_avg_sq": torch.zeros(3)}, r"`exp_avg_sq` .* is torch.float32 \(3,\), expected float32 \(32,\)"),
        ({"exp_avg": torch.zeros(32, dtype=torch.uint8)}, r"is torch.uint8 \(32,\)"),
        ({"master": torch.zeros(32, dtype=torch.float64)}, r"`master` .* is torch.float64"),
    ],
)
def test_read_moments_refuses_state_of_another_form(
    entries: dict[str, Any], said: str, checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    with pytest.raises(OptimizerStateError, match=said):
        read_moments(changed(checkpoint[0], tmp_path, **entries))
