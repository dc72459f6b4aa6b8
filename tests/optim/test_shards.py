"""Parameters of which every process holds a part: odd rows, a mesh of two dimensions, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from odd_model import OddModel, odd_mask

from subnet_ft.optim.shards import Part, groups_of, local, local_flat, part_of, sum_over_parts


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_buffers_of_all_processes_are_those_of_the_mask(runs: Any, size: int) -> None:
    """Three rows for four processes: one has nothing of a tensor, another all that is trained in it."""
    held = [runs.result(size, rank)["ways"]["fsdp"]["buffers"] for rank in range(size)]
    assert sum(held) <= odd_mask().num_trainable
    assert max(held) < odd_mask().num_trainable or size == 1
    # The branch got no gradient in any step, and needs no buffer; under DDP all of them are one tensor.
    assert sum(held) == odd_mask().num_trainable - odd_mask().tensors["extra.weight"].count


def test_a_mesh_of_two_dimensions_trains_as_one_process_does(runs: Any) -> None:
    expected, found = runs.tensors("weights", 1, "fsdp"), runs.tensors("weights", 4, "fsdp, mesh")
    assert all(torch.allclose(found[name], weight, rtol=0, atol=1e-6) for name, weight in expected.items())
    held = [runs.result(4, rank)["ways"]["fsdp, mesh"]["buffers"] for rank in range(4)]
    assert held[:2] == held[2:], "the first dimension replicates"


def test_the_full_norm_of_sharded_gradients_is_that_of_one_process(runs: Any) -> None:
    expected = runs.result(1)["ways"]["fsdp, full norm"]["norms"]
    for size in (2, 4):
        assert runs.result(size)["ways"]["fsdp, full norm"]["norms"] == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 1.5 * max(runs.result(1)["ways"]["fsdp"]["norms"])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_set_mask_of_sharded_parameters_lets_tensors_leave_come_back_and_enter(runs: Any, size: int) -> None:
    for rank in range(size):
        assert runs.result(size, rank)["changed mask"] == {"stands still": True, "enters": True}


@pytest.mark.parametrize("size", [2, 4])
def test_check_replicas_compares_the_replicas_of_parts(runs: Any, size: int) -> None:
    for rank in range(size):
        assert "parted ways: `block.weight`" in runs.result(size, rank)["replicas of parts"]


def test_another_dimension_than_the_first_is_refused(runs: Any) -> None:
    for rank in range(2):
        said = runs.result(2, rank)["refusals"]["second dimension"]
        assert "`block.weight` is distributed as (Shard(dim=1),) over a mesh of shape (2,)" in said
        assert "Train without tensor or expert parallelism" in said


def test_of_a_plain_parameter_a_process_holds_all() -> None:
    weight = OddModel().block.weight
    assert part_of("block.weight", weight) == Part(0, 42)
    assert local(weight).data_ptr() == weight.data_ptr()
    assert local_flat(weight).shape == (42,)
    assert groups_of([Part(0, 42)]) == []
    sums = sum_over_parts({"a": torch.tensor([1, 2])}, {"a": Part(0, 42)})
    assert sums["a"].tolist() == [1, 2]
