"""One global batch on 1, 2 and 4 processes: the same compact gradient, whoever reduces it, and the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from odd_model import OddModel, odd_mask

from subnet_ft.optim.binding import Binding
from subnet_ft.optim.reduction import Replica, mark, reduction_of

ONE_LOSS = (
    "ddp",
    "ddp, optimizer first",
    "ddp, micro-batches",
    "fsdp",
    "fsdp, optimizer first",
    "fsdp, micro-batches",
    "fsdp, checkpointed",
    "fsdp, offloaded",
)
"""Ways that train the same, but for how the gradient comes about."""

OTHERS = ("plain ddp", "ddp, a branch that one process uses", "fsdp, full norm", "fsdp, wrapped", "fsdp, bfloat16")


def largest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between values of one name, relative to the largest of its tensor."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - e).abs().max() / e.abs().max()) for n, e in expected.items() if e.numel())


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("way", ONE_LOSS)
def test_the_compact_gradient_does_not_depend_on_how_many_processes_share_a_batch(
    runs: Any, way: str, size: int
) -> None:
    expected = runs.tensors("gradient", 1, "ddp")
    unused = odd_mask().tensors["extra.weight"].count
    assert sum(gradient.numel() for gradient in expected.values()) == odd_mask().num_trainable - unused
    for rank in range(size):
        assert largest(runs.tensors("gradient", size, way, rank), expected) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("way", [*ONE_LOSS, "plain ddp"])
def test_masked_sgd_ends_with_the_weights_of_one_process(runs: Any, way: str, size: int) -> None:
    assert largest(runs.tensors("weights", size, way), runs.tensors("weights", 1, "ddp")) < 1e-6
    norms = runs.result(size)["ways"][way]["norms"]
    assert norms == pytest.approx(runs.result(1)["ways"]["ddp"]["norms"], rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("way", [*ONE_LOSS, *OTHERS])
def test_all_processes_have_the_same_bits_and_those_outside_the_mask_of_the_start(
    runs: Any, way: str, size: int
) -> None:
    first, start = runs.tensors("weights", size, way), dict(OddModel().named_parameters())
    assert any(not torch.equal(weight.float(), start[name].detach()) for name, weight in first.items())
    for rank in range(size):
        assert runs.result(size, rank)["ways"][way]["off_mask"] == []
        found = runs.tensors("weights", size, way, rank)
        assert all(torch.equal(weight, found[name]) for name, weight in first.items())


def test_a_gradient_that_one_process_has_is_the_mean_over_all(runs: Any) -> None:
    """As plain DDP does, with `find_unused_parameters`: the others count as zero."""
    way = "ddp, a branch that one process uses"
    for size in (2, 4):
        for rank in range(size):
            gradient = runs.tensors("gradient", size, way, rank)
            assert float(gradient["extra.weight"].abs().max()) > 0
            assert torch.equal(gradient["extra.weight"], runs.tensors("gradient", size, way)["extra.weight"])


@pytest.mark.parametrize("size", [2, 4])
def test_a_process_without_any_gradient_steps_with_the_others(runs: Any, size: int) -> None:
    for rank in range(size):
        assert runs.result(size, rank)["trained by one"] == {"moved": True, "ignored": []}, "released, all is undone"


@pytest.mark.parametrize("size", [2, 4])
def test_dense_gradients_of_a_prepared_model_are_refused(runs: Any, size: int) -> None:
    for rank in range(size):
        said = runs.result(size, rank)["dense"]
        assert "so nobody would reduce the dense ones. Call `release()`" in said


@pytest.mark.parametrize("size", [2, 4])
def test_an_unprepared_model_is_refused_and_the_next_step_is_named(runs: Any, size: int) -> None:
    for rank in range(size):
        said = runs.result(size, rank)["refusals"]
        assert f"{size} processes train together" in said["unprepared"]
        assert "prepare_ddp(model)" in said["unprepared"]
        assert "compact_grads=False" in said["full norm"]


def test_reduction_of_keeps_the_buffers_of_a_device_in_one_tensor() -> None:
    model = OddModel()
    parameters = dict(model.named_parameters())
    binding = Binding(parameters, odd_mask())
    assert reduction_of(binding) is None
    for name, parameter in parameters.items():
        mark(parameter, Replica(None, is_kept=name == "norm.weight"))
    reduction = reduction_of(binding)
    assert reduction is not None
    assert reduction.kept is parameters["norm.weight"]
    buffers = reduction.buffers()
    assert {buffer.untyped_storage().data_ptr() for buffer in buffers.values()} == {
        next(iter(buffers.values())).untyped_storage().data_ptr()
    }
    assert sum(buffer.numel() for buffer in buffers.values()) == odd_mask().num_trainable
    reduction.forget()
    assert next(iter(reduction.buffers().values())) is not next(iter(buffers.values()))
