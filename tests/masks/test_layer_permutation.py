"""The layer-permuted control: whole layers change places, and none stays."""

from __future__ import annotations

import pytest
import torch
from helpers import random_bits

from subnet_ft.errors import MaskError
from subnet_ft.masks import SubnetMask
from subnet_ft.masks.layer_permutation import layer_permuted

LAYERS = 5


def layered_mask() -> SubnetMask:
    """Every layer with a density and bits of its own; a kind in two layers only, one in one only, and two outside."""
    shapes = {"self_attn.q_proj.weight": (8, 16), "mlp.up_proj.weight": (16, 24)}
    dense = {"model.embed_tokens.weight": random_bits(400, 0.3, 99).view(20, 20)}
    for layer in range(LAYERS):
        for index, (kind, shape) in enumerate(shapes.items()):
            bits = random_bits(shape[0] * shape[1], 0.1 * (layer + 1), 10 * layer + index)
            dense[f"model.layers.{layer}.{kind}"] = bits.view(shape)
    for layer in (0, 1):
        dense[f"model.layers.{layer}.mlp.gate.weight"] = random_bits(50, 0.5, 70 + layer)
    dense["model.layers.0.dense.weight"] = random_bits(60, 0.5, 80)
    dense["model.norm.weight"] = random_bits(30, 0.5, 81)
    return SubnetMask.from_dense(dense)


def origin(permuted: SubnetMask, mask: SubnetMask, kind: str, layer: int) -> int:
    bits = permuted[f"model.layers.{layer}.{kind}"]
    return next(n for n in range(LAYERS) if torch.equal(bits, mask[f"model.layers.{n}.{kind}"]))


def test_layers_move_whole_and_none_stays() -> None:
    mask = layered_mask()
    seen = set()
    for seed in range(30):
        permuted = SubnetMask(layer_permuted(mask, seed))
        moves = [origin(permuted, mask, "self_attn.q_proj.weight", layer) for layer in range(LAYERS)]
        assert sorted(moves) == list(range(LAYERS))
        assert all(moved != layer for layer, moved in enumerate(moves))
        assert moves == [origin(permuted, mask, "mlp.up_proj.weight", layer) for layer in range(LAYERS)]
        assert [origin(permuted, mask, "mlp.gate.weight", layer) for layer in (0, 1)] == [1, 0]
        assert permuted.names == mask.names
        assert permuted.density_by_kind() == mask.density_by_kind()
        seen.add(tuple(moves))
    assert len(seen) > 15  # of 44
    assert SubnetMask(layer_permuted(mask, 3)) == SubnetMask(layer_permuted(mask, 3))


def test_what_has_no_other_layer_is_drawn_uniformly_with_its_count() -> None:
    mask = layered_mask()
    permuted = SubnetMask(layer_permuted(mask, 0))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.dense.weight"):
        assert permuted.tensors[name].count == mask.tensors[name].count
        assert not torch.equal(permuted[name], mask[name])


def test_two_stacks_do_not_mix() -> None:
    names = [f"{stack}.layers.{layer}.fc.weight" for stack in ("encoder", "decoder") for layer in (0, 1)]
    mask = SubnetMask.from_dense({name: random_bits(64, 0.5, index) for index, name in enumerate(names)})
    permuted = SubnetMask(layer_permuted(mask, 0))
    for name, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        assert torch.equal(permuted[names[name]], mask[names[other]])


def test_layers_of_different_shapes_are_refused() -> None:
    dense = {f"model.layers.{layer}.fc.weight": random_bits(8 * (2 + layer), 0.5).view(-1, 8) for layer in (0, 1)}
    with pytest.raises(MaskError, match=r"`model.layers.0.fc.weight` has shape \(2, 8\) and .*1.fc.weight.* \(3, 8\)"):
        layer_permuted(SubnetMask.from_dense(dense), 0)
