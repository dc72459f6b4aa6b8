"""Structure of masks: three lines of torch and scipy for each figure, and planted rows, columns and heads."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers import random_bits
from scipy.stats import entropy, hypergeom
from transformers import LlamaConfig

from subnet_ft.errors import MaskMismatchError
from subnet_ft.evidence import structure as structure_module
from subnet_ft.evidence.plain import from_plain
from subnet_ft.evidence.structure import Structure, head_split, mask_structure
from subnet_ft.masks import SubnetMask

CONFIG = LlamaConfig(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, head_dim=4)


def structure_of(dense: torch.Tensor, name: str = "w", **options: object) -> Structure:
    return mask_structure(SubnetMask.from_dense({name: dense}), **options)


@pytest.mark.parametrize("piece", [7, 1 << 20])
@pytest.mark.parametrize("shape", [(31, 13), (16, 64), (1, 40), (5, 9, 7)])
def test_mask_structure_equals_three_lines_of_torch_and_scipy(
    shape: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure_module, "_CHUNK", piece)
    dense = random_bits(math.prod(shape), 0.15, 3).view(shape)
    dense[..., 0] = False  # an empty column, and rows that differ
    dense[..., -1, :] |= random_bits(shape[-1], 0.7, 4)
    found = structure_of(dense).tensors["w"]
    size, count = dense.numel(), int(dense.sum())
    assert found.density == count / size
    for spread, counts in ((found.rows, dense.sum(-1).view(-1)), (found.columns, dense.sum(-2).view(-1))):
        counts = counts.double()
        groups, members = len(counts), size // len(counts)
        assert spread.num_groups == groups
        null = hypergeom(size, count, members)
        ratio = pytest.approx(float(counts.var(correction=0) / null.var())) if groups > 1 else None
        assert spread.variance_ratio == ratio
        differences = (counts.unsqueeze(0) - counts.unsqueeze(1)).abs().mean()
        assert spread.gini == pytest.approx(float(differences / (2 * counts.mean())), abs=1e-12)
        if groups > 1:
            assert spread.entropy == pytest.approx(entropy(counts) / math.log(groups))
        densities = (counts / members).quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
        assert [spread.low, spread.median, spread.high] == pytest.approx(densities.tolist())
        assert spread.empty_share == float((counts == 0).double().mean())
        assert spread.empty_expected == pytest.approx(null.pmf(0), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("size", [1, 1000, 1024, 5000])
def test_mask_structure_counts_empty_tiles_and_words(size: int) -> None:
    dense = random_bits(size, 0.01, 1)
    found = structure_of(dense).tensors["w"]
    assert (found.rows, found.columns, found.heads) == (None, None, None)
    for run, share, expected in (
        (1024, found.empty_tiles, found.empty_tiles_expected),
        (32, found.empty_words, found.empty_words_expected),
    ):
        parts = dense.split(run)
        assert share == sum(not part.any() for part in parts) / len(parts)
        assert expected == pytest.approx(hypergeom(size, int(dense.sum()), min(run, size)).pmf(0), rel=1e-6)


def test_random_masks_have_ratios_of_one_and_planted_ones_do_not() -> None:
    dense = random_bits(400 * 300, 0.2, 5).view(400, 300)
    found = structure_of(dense).tensors["w"]
    # A variance over G groups has a relative standard deviation of sqrt(2 / G): 0.07 and 0.08.
    assert found.rows.variance_ratio == pytest.approx(1, abs=0.3)
    assert found.columns.variance_ratio == pytest.approx(1, abs=0.35)

    rows = dense & (torch.arange(400) % 2 == 0).unsqueeze(1)
    found = structure_of(rows).tensors["w"]
    # Half the rows hold 0.2 * 300, half nothing: variance 30**2 against 300 * 0.1 * 0.9.
    assert found.rows.variance_ratio == pytest.approx(900 / 27, rel=0.1)
    assert found.columns.variance_ratio == pytest.approx(1, abs=0.35)
    assert found.rows.empty_share == 0.5
    assert found.rows.empty_expected < 1e-12
    assert found.rows.gini == pytest.approx(0.5, abs=0.05)

    columns = structure_of(rows.T.contiguous()).tensors["w"]
    assert columns.columns.variance_ratio == pytest.approx(900 / 27, rel=0.1)
    assert columns.rows.variance_ratio == pytest.approx(1, abs=0.35)


def test_empty_and_full_masks_have_no_ratio() -> None:
    empty = structure_of(torch.zeros(4, 6, dtype=torch.bool)).tensors["w"]
    assert (empty.rows.variance_ratio, empty.rows.gini, empty.rows.entropy, empty.rows.empty_share) == (None,) * 3 + (
        1,
    )
    assert (empty.empty_tiles, empty.empty_tiles_expected, empty.empty_words) == (1, 1, 1)
    full = structure_of(torch.ones(4, 6, dtype=torch.bool)).tensors["w"]
    assert (full.rows.variance_ratio, full.rows.gini, full.rows.empty_share) == (None, pytest.approx(0), 0)
    assert full.rows.entropy == pytest.approx(1)


def test_mask_structure_finds_planted_heads() -> None:
    name = "model.layers.0.self_attn.{}_proj.weight"
    query = torch.zeros(24, 24, dtype=torch.bool)
    query[8:12] = True  # the third of six heads of four rows
    output = torch.zeros(24, 24, dtype=torch.bool)
    output[:, 20:24] = True  # the sixth head's four columns
    key = torch.zeros(8, 24, dtype=torch.bool)
    key[4:8, :12] = True  # half of the second of two
    dense = {name.format("q"): query, name.format("o"): output, name.format("k"): key}
    found = mask_structure(SubnetMask.from_dense(dense), config=CONFIG).tensors
    assert found[name.format("q")].head_densities == [0, 0, 1, 0, 0, 0]
    assert found[name.format("o")].head_densities == [0, 0, 0, 0, 0, 1]
    assert found[name.format("k")].head_densities == [0, 0.5]
    assert found[name.format("q")].heads.num_groups == 6
    assert found[name.format("q")].heads.empty_share == pytest.approx(5 / 6)
    assert mask_structure(SubnetMask.from_dense(dense)).tensors[name.format("q")].heads is None


@pytest.mark.parametrize(
    ("name", "shape", "config", "expected"),
    [
        ("layers.1.self_attn.q_proj.weight", (24, 24), CONFIG, ("rows", 6)),
        ("layers.1.self_attn.v_proj.weight", (8, 24), CONFIG, ("rows", 2)),
        ("layers.1.self_attn.q_proj.weight", (24, 48), CONFIG, ("rows", 6)),
        ("layers.1.self_attn.out_proj.weight", (48, 24), CONFIG, ("columns", 6)),
        ("layers.1.self_attn.k_proj.weight", (24, 24), CONFIG, None),  # another size than the configuration's
        ("layers.1.self_attn.q_proj.bias", (24,), CONFIG, None),
        ("layers.1.mlp.up_proj.weight", (24, 24), CONFIG, None),
        ("w", (24, 24), CONFIG, None),
        ("layers.1.self_attn.q_proj.weight", (24, 24), None, None),
        ("q_proj.weight", (12, 12), LlamaConfig(hidden_size=12, num_attention_heads=3), ("rows", 3)),
    ],
)
def test_head_split(
    name: str, shape: tuple[int, ...], config: LlamaConfig | None, expected: tuple[str, int] | None
) -> None:
    assert head_split(name, shape, config) == expected


def test_mask_structure_summarises_kinds_by_their_means() -> None:
    dense = {
        f"layers.{layer}.mlp.weight": random_bits(600, 0.1 * (1 + layer), layer).view(20, 30) for layer in range(3)
    }
    found = mask_structure(SubnetMask.from_dense({**dense, "norm.weight": random_bits(9, 0.5)}))
    assert list(found.by_kind) == ["mlp.weight", "norm.weight"]
    kind, parts = found.by_kind["mlp.weight"], [found.tensors[name] for name in dense]
    assert (kind.num_tensors, kind.shape, kind.rows.num_groups) == (3, [20, 30], 60)
    assert kind.density == pytest.approx(np.mean([part.density for part in parts]))
    assert kind.rows.gini == pytest.approx(np.mean([part.rows.gini for part in parts]))
    assert kind.columns.variance_ratio == pytest.approx(np.mean([part.columns.variance_ratio for part in parts]))
    assert kind.empty_words == pytest.approx(np.mean([part.empty_words for part in parts]))
    assert found.by_kind["norm.weight"].rows is None


def test_mask_structure_has_the_control_beside_it() -> None:
    mask, control = (SubnetMask.from_dense({"w": random_bits(600, 0.2, seed).view(20, 30)}) for seed in (1, 2))
    found = mask_structure(mask, control=control)
    assert found.control == mask_structure(control)
    assert found.tensors == mask_structure(mask).tensors
    assert from_plain(Structure, json.loads(json.dumps(asdict(found)))) == found
    with pytest.raises(MaskMismatchError, match="`w`"):
        mask_structure(mask, control=SubnetMask.from_dense({"w": random_bits(60, 0.2)}))
