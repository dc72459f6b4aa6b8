"""Counted bytes per weight against sums done by hand."""

from __future__ import annotations

import pytest

from subnet_kernels.traffic import GPU_SECTOR_BYTES, step_traffic, step_traffic_by_part, touched


def test_touched_gives_the_share_of_its_example() -> None:
    assert touched(0.5, 4, 8) == 0.75
    assert touched(0.0, 2, 32) == 0.0
    assert touched(1.0, 2, 32) == 1.0


def test_step_traffic_gives_the_bytes_of_its_example() -> None:
    assert step_traffic(1.0, changed=None) == 28.0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"grad_bytes": None, "changed": None}, {"gradient": 4.0, "masters": 8.0, "weights": 2.0}),
        ({"master": "remainder"}, {"gradient": 2.0, "masters": 4.0, "weights": 4.0}),
        ({"master": "none", "weight_bytes": 4, "grad_bytes": 4}, {"gradient": 4.0, "masters": 0.0, "weights": 8.0}),
        ({"compaction": True, "changed": None}, {"gradient": 10.0, "masters": 8.0, "weights": 2.0}),
    ],
)
def test_step_traffic_by_part_of_a_full_mask(options: dict[str, object], expected: dict[str, float]) -> None:
    parts = step_traffic_by_part(1.0, **options)  # type: ignore[arg-type]
    assert parts == {"mask": 0.0, "moments": 16.0, **expected}


def test_step_traffic_by_part_of_a_sparse_mask_counts_sectors() -> None:
    parts = step_traffic_by_part(0.1, changed=0.01, sector_bytes=GPU_SECTOR_BYTES)
    assert parts["mask"] == 1 / 8 + 4 / 1024
    assert parts["gradient"] == pytest.approx(2 * (1 - 0.9**16))
    assert parts["moments"] == pytest.approx(1.6)
    assert parts["masters"] == pytest.approx(0.8)
    assert parts["weights"] == pytest.approx(2 * 2 * (1 - 0.999**16))


def test_step_traffic_of_a_sparse_mask_is_less_than_of_a_dense_one() -> None:
    densities = [step_traffic(share / 20) for share in range(20)]
    assert densities == sorted(densities)
    assert densities[0] == 1 / 8 + 4 / 1024


@pytest.mark.parametrize(
    ("density", "options", "message"),
    [
        (1.5, {}, "`density` must be in"),
        (0.5, {"changed": -0.1}, "`changed` must be in"),
        (0.5, {"master": "fp32"}, "`master` must be one of float32, remainder, none"),
        (0.5, {"compaction": True, "grad_bytes": None}, "`grad_bytes` must be given"),
    ],
)
def test_step_traffic_names_a_bad_argument(density: float, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_traffic(density, **options)  # type: ignore[arg-type]
