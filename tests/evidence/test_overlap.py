"""Overlap of masks: three lines of torch and scipy for each figure, planted masks, and the trap of bf16."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from helpers import random_bits
from memory_checkpoint import MemoryCheckpoint
from scipy.stats import hypergeom

from subnet_ft.errors import MaskError, MaskMismatchError
from subnet_ft.evidence import overlap as overlap_module
from subnet_ft.evidence.overlap import MaskOverlap, mask_overlap, overlap_matrix
from subnet_ft.evidence.plain import from_plain
from subnet_ft.masks import Provenance, SubnetMask, control_mask
from subnet_ft.masks.magnitude import magnitude_bins

SHAPES = {"a.weight": (40, 50), "b.weight": (3, 17, 11), "c": (9,)}


def base_values(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: (0.02 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in SHAPES.items()}


def mask_of(seed: int, density: float, *, small_only: bool = False) -> SubnetMask:
    dense = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        dense[name] = random_bits(math.prod(shape), density, 100 * seed + index).view(shape)
        if small_only:
            dense[name] &= base_values()[name].abs() < 0.015
    return SubnetMask.from_dense(dense)


def flat(mask: SubnetMask) -> torch.Tensor:
    return torch.cat([mask[name].reshape(-1) for name in mask.names])


@pytest.mark.parametrize("piece", [8, 1 << 20])
def test_mask_overlap_equals_three_lines_of_torch_and_scipy(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap_module, "_CHUNK", piece)
    first, second = mask_of(1, 0.4, small_only=True), mask_of(2, 0.6, small_only=True)
    found = mask_overlap(first, second, base=MemoryCheckpoint("base", base_values()))
    overall = found.overall

    one, two = flat(first), flat(second)
    both = int((one & two).sum())
    assert (overall.count_first, overall.count_second, overall.count_both) == (int(one.sum()), int(two.sum()), both)
    assert overall.num_parameters == one.numel()
    assert overall.o1 == both / int(one.sum())
    assert overall.o2 == both / int(two.sum())
    assert overall.jaccard == both / int((one | two).sum())

    null = hypergeom(one.numel(), int(two.sum()), int(one.sum()))
    assert overall.uniform_o1 == pytest.approx(null.mean() / int(one.sum()))
    assert overall.uniform_o1 == pytest.approx(second.density)
    assert overall.uniform_o2 == pytest.approx(first.density)
    assert overall.uniform_o1_se == pytest.approx(null.std() / int(one.sum()))
    assert overall.uniform_o2_se == pytest.approx(null.std() / int(two.sum()))
    assert overall.lift == pytest.approx(both / null.mean())

    mean, variance = 0.0, 0.0
    for name, weight in base_values().items():
        bins = torch.from_numpy(magnitude_bins(weight.reshape(-1)).astype(np.int64))
        rows = [torch.bincount(bins[chosen], minlength=2048) for chosen in (bins >= 0, first[name].view(-1))]
        rows.append(torch.bincount(bins[second[name].view(-1)], minlength=2048))
        expected = float(sum(k1 * k2 for n, k1, k2 in zip(*rows, strict=True) if n == 1))  # scipy's variance is NaN
        nulls = [hypergeom(int(n), int(k2), int(k1)) for n, k1, k2 in zip(*rows, strict=True) if n > 1]
        with np.errstate(invalid="ignore", divide="ignore"):  # scipy's higher moments of sure outcomes
            expected, spread = expected + sum(null.mean() for null in nulls), sum(null.var() for null in nulls)
        ours = found.by_tensor[name]
        assert ours.magnitude_o1 == pytest.approx(expected / ours.count_first if ours.count_first else None)
        assert ours.uniform_o1 == pytest.approx(ours.count_second / ours.num_parameters)
        mean, variance = mean + expected, variance + spread
    assert overall.magnitude_o1 == pytest.approx(mean / int(one.sum()))
    assert overall.magnitude_o2 == pytest.approx(mean / int(two.sum()))
    assert overall.magnitude_o1_se == pytest.approx(variance**0.5 / int(one.sum()))
    assert overall.magnitude_o2_se == pytest.approx(variance**0.5 / int(two.sum()))
    assert overall.magnitude_lift == pytest.approx(both / mean)
    assert overall.excess == pytest.approx((both - mean) / (min(int(one.sum()), int(two.sum())) - mean))


def test_magnitude_null_is_what_sampled_controls_show() -> None:
    base, draws = base_values(), 400
    first, second = mask_of(1, 0.5, small_only=True), mask_of(2, 0.7, small_only=True)
    found = mask_overlap(first, second, base=MemoryCheckpoint("base", base)).overall
    shares = torch.tensor(
        [
            mask_overlap(first, control_mask(second, "magnitude_matched", seed=seed, weights=base.items())).overall.o1
            for seed in range(draws)
        ]
    )
    # The mean of 400 draws has a standard deviation of 1/20 of one draw's, a sample deviation one of 1/28 of itself.
    assert abs(float(shares.mean()) - found.magnitude_o1) < 4 * found.magnitude_o1_se / draws**0.5
    assert float(shares.std()) == pytest.approx(found.magnitude_o1_se, rel=4 / 28)
    assert found.magnitude_o1 > 1.5 * found.uniform_o1


def bf16_run(weights: torch.Tensor, seed: int) -> torch.Tensor:
    """Say which bf16 weights 50 steps of AdamW on random gradients change; runs share nothing but the base.

    Each weight has a small drift of its own under the noise, as gradients do, and a float32 master.
    """
    generator = torch.Generator().manual_seed(seed)
    master = torch.nn.Parameter(weights.float())
    optimizer = torch.optim.AdamW([master], lr=3.1e-6, weight_decay=0.0)
    drift = 0.1 * torch.randn(weights.shape, generator=generator) ** 3
    for _ in range(50):
        master.grad = drift + torch.randn(weights.shape, generator=generator)
        optimizer.step()
    return master.detach().bfloat16() != weights


def test_independent_bf16_updates_overlap_as_the_magnitude_null_says() -> None:
    """The trap: 59 % overlap at densities of 37 %, without anything in common but the base's magnitudes."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": (0.02 * torch.randn(400, 1000, generator=generator)).bfloat16()}
    one, two = (SubnetMask.from_dense({"w": bf16_run(base["w"], seed)}) for seed in (1, 2))
    found = mask_overlap(one, two, base=MemoryCheckpoint("base", base)).overall
    assert (one.density, two.density) == (pytest.approx(0.37, abs=0.01), pytest.approx(0.37, abs=0.01))
    assert found.o1 == pytest.approx(0.59, abs=0.02)
    assert found.o1 - found.uniform_o1 > 100 * found.uniform_o1_se
    assert abs(found.o1 - found.magnitude_o1) < 4 * found.magnitude_o1_se
    assert found.magnitude_lift == pytest.approx(1, abs=0.01)


def test_planted_common_part_exceeds_both_nulls() -> None:
    base = {"w": (0.02 * torch.randn(300, 1000, generator=torch.Generator().manual_seed(3))).bfloat16()}
    shared = random_bits(300_000, 0.1, 1).view(300, 1000)
    masks = [SubnetMask.from_dense({"w": shared | random_bits(300_000, 0.1, seed).view(300, 1000)}) for seed in (2, 3)]
    found = mask_overlap(*masks, base=MemoryCheckpoint("base", base)).overall
    # 0.1 in common by design, and 0.9 * 0.1 * 0.1 by chance, of densities of 0.19.
    assert found.o1 == pytest.approx(0.109 / 0.19, abs=0.01)
    assert found.magnitude_o1 == pytest.approx(0.19, abs=0.01)
    assert found.uniform_o1 == pytest.approx(0.19, abs=0.01)
    assert found.excess == pytest.approx((0.109 - 0.19**2) / (0.19 - 0.19**2), abs=0.01)


def test_mask_overlap_without_a_base_has_no_magnitude_null() -> None:
    overall = mask_overlap(mask_of(1, 0.3), mask_of(2, 0.3)).overall
    assert 0 < overall.uniform_o1 < 1
    missing = (overall.magnitude_o1, overall.magnitude_o2_se, overall.magnitude_lift, overall.excess)
    assert missing == (None, None, None, None)


def test_mask_overlap_of_itself_an_empty_and_a_full_mask() -> None:
    base = MemoryCheckpoint("base", base_values())
    mask, empty, full = mask_of(1, 0.3), mask_of(1, 0.0), SubnetMask.full(SHAPES)
    same = mask_overlap(mask, mask, base=base).overall
    assert (same.o1, same.o2, same.jaccard, same.excess) == (1, 1, 1, 1)
    none = mask_overlap(mask, empty, base=base).overall
    assert (none.o1, none.o2, none.jaccard, none.lift, none.magnitude_lift) == (0, None, 0, None, None)
    assert (none.uniform_o1, none.magnitude_o1) == (0, 0)
    whole = mask_overlap(mask, full, base=base).overall
    assert (whole.o1, whole.uniform_o1, whole.uniform_o1_se, whole.magnitude_o1_se, whole.excess) == (1, 1, 0, 0, None)
    assert whole.magnitude_lift == pytest.approx(1)
    assert mask_overlap(empty, empty, base=base).overall.jaccard is None


def test_overlap_matrix_reads_the_base_once_and_equals_the_pairs() -> None:
    base = MemoryCheckpoint("base", base_values())
    masks = {name: mask_of(seed, 0.3) for seed, name in enumerate("xyz")}
    found = overlap_matrix(masks, base)
    assert base.reads == dict.fromkeys(SHAPES, 1)
    assert [(pair.first, pair.second) for pair in found] == [("x", "y"), ("x", "z"), ("y", "z")]
    for pair in found:
        names = (pair.first, pair.second)
        assert pair == mask_overlap(masks[names[0]], masks[names[1]], base=base, names=names)


def test_mask_overlap_survives_json() -> None:
    found = mask_overlap(mask_of(1, 0.3), mask_of(2, 0.0), base=MemoryCheckpoint("base", base_values()))
    assert from_plain(MaskOverlap, json.loads(json.dumps(asdict(found)))) == found


def recorded(mask: SubnetMask, base: MemoryCheckpoint, compare_dtype: str | None = None) -> SubnetMask:
    return SubnetMask(mask.tensors, Provenance(base=base.record(), compare_dtype=compare_dtype))


def test_overlap_takes_only_the_base_that_a_mask_records() -> None:
    base = MemoryCheckpoint("base", base_values())
    masks = {"plain": mask_of(1, 0.3), "recorded": recorded(mask_of(2, 0.3), base)}
    overlap_matrix(masks, base)
    other = base_values()
    other["c"][4] += 1
    with pytest.raises(MaskMismatchError, match=r"weights of `c` are not those that the mask was made for \(`base`\)"):
        overlap_matrix(masks, MemoryCheckpoint("other", other))
    with pytest.raises(MaskMismatchError, match=r"`a\.weight` is float32 but the mask was compared in bfloat16"):
        overlap_matrix(masks, MemoryCheckpoint("other", base_values(torch.float32)))


def test_overlap_bins_the_base_in_the_dtype_that_the_masks_were_compared_in() -> None:
    stored = MemoryCheckpoint("base", base_values(torch.float32))
    cast = MemoryCheckpoint("base", base_values())
    masks = [recorded(mask_of(seed, 0.4, small_only=True), cast, "bfloat16") for seed in (1, 2)]
    assert mask_overlap(*masks, base=stored) == mask_overlap(*masks, base=cast)
    plain = [mask_of(seed, 0.4, small_only=True) for seed in (1, 2)]
    assert mask_overlap(*plain, base=stored) != mask_overlap(*plain, base=cast)


def test_overlap_refuses_masks_of_different_models() -> None:
    base = MemoryCheckpoint("base", base_values())
    other = MemoryCheckpoint("other", {name: value + 1 for name, value in base.values.items()})
    with pytest.raises(MaskError, match="needs two masks or more, got 1"):
        overlap_matrix({"one": mask_of(1, 0.3)})
    with pytest.raises(MaskMismatchError, match="different bases, base and other"):
        overlap_matrix(
            {"x": mask_of(0, 0.1), "y": recorded(mask_of(1, 0.1), base), "z": recorded(mask_of(2, 0.1), other)}
        )
    with pytest.raises(MaskMismatchError, match="`c` only in the mask"):
        mask_overlap(mask_of(1, 0.3), SubnetMask.from_dense({n: mask_of(2, 0.3)[n] for n in ("a.weight", "b.weight")}))
    with pytest.raises(MaskMismatchError, match="`d` only in the model"):
        mask_overlap(mask_of(1, 0.3), mask_of(2, 0.3), base=replace(base, values={**base.values, "d": torch.zeros(1)}))
