from __future__ import annotations

import pytest

from subnet_ft.plan.shapes import read_shapes
from subnet_ft.plan.traffic import Traffic, traffic_of
from subnet_ft.plan.trained import Trained, adapted, fully, of_density


def model(density: float) -> Trained:
    shapes = read_shapes("tiny:llama", dtype="bfloat16")
    return fully(shapes) if density == 1.0 else of_density(shapes, density)


def test_ddp_sends_the_trained_values_once_per_step_however_many_micro_batches() -> None:
    trained = model(0.1)
    one, many = (traffic_of(trained, "ddp", 4, micro_batches=n) for n in (1, 8))
    assert one == many
    assert one.gradients == int(2 * 3 / 4 * 4 * trained.num_trainable)
    # Issue 7: at density 0.1 at most a quarter of dense bfloat16 gradients.
    assert one.total <= 0.25 * one.dense_gradients


def test_fsdp2_sends_as_much_for_a_subnetwork_as_for_a_full_run() -> None:
    full, subnet = (traffic_of(model(density), "fsdp2", 4, micro_batches=2) for density in (1.0, 0.1))
    assert full == subnet
    weights = 2 * model(1.0).num_parameters
    assert full.weights == int(3 / 4 * weights * 2 * 2)  # forward and backward, two micro-batches
    assert full.gradients == int(3 / 4 * weights)  # once


def test_fsdp2_gathers_for_the_reference_and_for_every_sampled_token() -> None:
    plain = traffic_of(model(1.0), "fsdp2", 2, micro_batches=1)
    more = traffic_of(model(1.0), "fsdp2", 2, micro_batches=1, gathers=1, generated=10)
    assert more.weights == pytest.approx(1.5 * plain.weights)
    assert more.generation == pytest.approx(5 * plain.weights)


def test_offload_copies_a_ranks_share_over_the_bus() -> None:
    traffic = traffic_of(model(1.0), "fsdp2_offload", 4, micro_batches=1)
    weights = 2 * model(1.0).num_parameters
    assert traffic.host == 3 * weights // 4
    assert traffic_of(model(1.0), "fsdp2", 4, micro_batches=1).host == 0


def test_an_adapter_sends_its_own_gradients_only() -> None:
    trained = adapted(read_shapes("tiny:llama", dtype="bfloat16"), "lora", {})
    traffic = traffic_of(trained, "ddp", 2, micro_batches=1)
    assert traffic.gradients == traffic.dense_gradients == 4 * trained.num_trainable


def test_one_process_sends_nothing() -> None:
    assert traffic_of(model(1.0), "none", 1, micro_batches=4, gathers=1, generated=9) == Traffic()
