"""Masks from base weights alone: what they choose, how many, and that they belong to their base."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.checkpoints.models import load_model
from subnet_ft.checkpoints.tiny import FAMILIES, save_tiny
from subnet_ft.errors import MaskError
from subnet_ft.masks import BASE_KINDS, SubnetMask, base_mask, control_mask, extract
from subnet_ft.masks.spacing import reach_keys, reach_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny model whose weights have the usual spread, norms included."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("models") / "base")
    model, _ = load_model(folder, dtype="bfloat16")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return open_checkpoint(folder)


def flat(weights: torch.Tensor) -> torch.Tensor:
    return weights.float().abs().flatten()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", BASE_KINDS)
def test_base_mask_has_the_density_of_every_family_and_belongs_to_it(kind: str, family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(f"tiny:{family}")
    mask = base_mask(checkpoint, kind, density=0.2)
    assert mask.names == list(checkpoint.specs)
    mask.check_base(checkpoint)
    for tensor in mask.tensors.values():
        if kind != "predicted":
            assert tensor.count == round(0.2 * tensor.num_elements)
    assert mask.num_trainable == pytest.approx(0.2 * mask.num_parameters, abs=len(mask.names) / 2)
    path = mask.save(tmp_path / "mask.subnet.safetensors")
    loaded = SubnetMask.load(path, base=checkpoint)
    assert (loaded, loaded.provenance) == (mask, mask.provenance)


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_base_mask_is_made_again_from_its_source(kind: str, base: Checkpoint) -> None:
    options = {"uniform": {"scope": "global"}, "principal": {"rank": 2}}.get(kind, {})
    mask = base_mask(base, kind, density=0.1, seed=4, **options)
    source = dict(mask.provenance.source)
    source.pop("rank_share", None)
    assert source.pop("kind") == kind
    assert base_mask(base, kind, **source) == mask
    assert source["seed"] == 4


def test_low_magnitude_has_the_smallest_weights_of_every_tensor(base: Checkpoint) -> None:
    mask = base_mask(base, "low_magnitude", density=0.3)
    for name, weight in base.tensors():
        expected = flat(weight).sort().values[: mask.tensors[name].count]
        assert torch.equal(flat(weight)[mask[name].flatten()].sort().values, expected)


def test_principal_and_non_principal_are_the_ends_of_the_low_rank_approximation(base: Checkpoint) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    u, s, vh = torch.linalg.svd(base.tensor(name).double(), full_matrices=False)
    order = ((u[:, :2] * s[:2]) @ vh[:2]).abs().flatten().argsort()
    for kind, expected in (("principal", order[-205:]), ("non_principal", order[:205])):
        mask = base_mask(base, kind, density=0.1, rank=2)
        assert set(mask[name].flatten().nonzero().flatten().tolist()) == set(expected.tolist())


def test_uniform_has_one_density_per_tensor_or_one_for_all(base: Checkpoint) -> None:
    per_tensor, overall, again, other = (
        base_mask(base, "uniform", density=0.25, seed=seed, scope=scope)
        for scope, seed in (("tensor", 1), ("global", 1), ("global", 1), ("global", 2))
    )
    assert all(tensor.count == round(0.25 * tensor.num_elements) for tensor in per_tensor.tensors.values())
    assert overall.num_trainable == round(0.25 * overall.num_parameters)
    assert overall.density_by_kind() != per_tensor.density_by_kind()
    assert overall == again != other


def test_draws_of_one_seed_are_independent(base: Checkpoint) -> None:
    """Masks that share an order of draws would overlap beyond chance, and their runs would look alike."""
    drawn = [base_mask(base, "uniform", density=0.2, seed=1, scope=scope) for scope in ("tensor", "global")]
    of = base_mask(base, "uniform", density=0.2, seed=9)
    drawn += [control_mask(of, kind, seed=1) for kind in ("uniform", "inverted")]
    # The two scopes are one order, cut per tensor and as a whole.
    for first, second in ((0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        overlap = (drawn[first] & drawn[second]).num_trainable / of.num_trainable
        assert overlap == pytest.approx(0.2, abs=0.03), (first, second)


def test_predicted_is_one_threshold_on_the_spacing(base: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    keys = torch.cat([torch.from_numpy(reach_keys(weight.flatten())) for _, weight in base.tensors()])
    with caplog.at_level(logging.INFO, logger="subnet_ft"):
        mask = base_mask(base, "predicted", density=0.2, seed=1)
    chosen = torch.cat([mask[name].flatten() for name in mask.names])
    assert chosen.sum() == round(0.2 * keys.numel())
    threshold = keys[chosen].max()
    assert (keys[~chosen] >= threshold).all()
    assert 0 < (keys[chosen] == threshold).sum() < (keys == threshold).sum()
    assert f"{reach_of(int(threshold)):.3g} itself {(keys == threshold).sum()} more" in caplog.text
    assert f"of which {(keys[chosen] == threshold).sum()} are chosen" in caplog.text
    assert (
        base_mask(base, "predicted", density=0.2, seed=1) == mask != base_mask(base, "predicted", density=0.2, seed=2)
    )


def test_predicted_by_reach_is_what_a_drift_of_that_size_changes(base: Checkpoint) -> None:
    for reach in (1e-5, 7e-5, 3e-4):
        mask = base_mask(base, "predicted", reach=reach)
        for name, weight in base.tensors():
            master = weight.float()
            changed = ((master + 1.001 * reach).bfloat16() != weight) | ((master - 1.001 * reach).bfloat16() != weight)
            assert torch.equal(mask[name], changed)
        assert 0 < mask.num_trainable < mask.num_parameters
        assert mask.provenance.source == {"kind": "predicted", "seed": 0, "reach": reach}
    assert base_mask(base, "predicted", reach=1e-12).num_trainable == 0


def test_predicted_foretells_which_masters_of_equal_drift_change(base: Checkpoint) -> None:
    """Drift of one size in every weight, as Adam's: nothing that knows the weights alone has a better recall."""
    drift, changed, chances = torch.Generator().manual_seed(3), {}, []
    for name, weight in base.tensors():
        changed[name] = (weight.float() + 1e-4 * torch.randn(weight.shape, generator=drift)).bfloat16() != weight
        reach = torch.tensor([reach_of(int(key)) for key in reach_keys(weight.flatten())])
        chances.append(torch.erfc(reach / (1e-4 * 2**0.5)))
    mask = SubnetMask.from_dense(changed)
    recall = {
        kind: (base_mask(base, kind, density=mask.density) & mask).num_trainable / mask.num_trainable
        for kind in ("predicted", "uniform")
    }
    ranked = torch.cat(chances).sort(descending=True).values
    best = float(ranked[: mask.num_trainable].sum() / ranked.sum())
    assert 0.6 < best - 0.02 < recall["predicted"]
    assert abs(recall["uniform"] - mask.density) < 0.03
    assert 0.1 < mask.density < 0.5


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_base_mask_belongs_to_the_base_as_it_is_trained(kind: str, tmp_path: Path) -> None:
    folder, other = (save_tiny("llama", tmp_path / str(seed), seed=seed, dtype=torch.float32) for seed in (0, 1))
    mask = base_mask(folder, kind, density=0.2, dtype="bfloat16")
    assert mask.provenance.base == extract(folder, other, dtype="bfloat16").provenance.base
    assert mask.provenance.compare_dtype == "bfloat16"
    mask.check(load_model(folder, dtype="bfloat16")[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "lowmagnitude", "density": 0.1}, "`lowmagnitude` is not a mask of base weights; choose one of low_"),
        ({"kind": "uniform"}, r"`density` must be in \(0, 1\] for a mask of kind `uniform`, got None"),
        ({"kind": "uniform", "density": 0.0}, "got 0.0"),
        ({"kind": "uniform", "density": 1.5}, "got 1.5"),
        ({"kind": "uniform", "density": float("nan")}, "got nan"),
        ({"kind": "uniform", "density": 0.1, "scope": "layer"}, "`scope` must be one of tensor, global, got 'layer'"),
        ({"kind": "predicted", "density": 0.1, "scope": "global"}, "`scope` must be `tensor` for `predicted`"),
        ({"kind": "low_magnitude", "density": 0.1, "rank": 3}, "`low_magnitude` has no `rank`"),
        ({"kind": "principal", "density": 0.1, "rank": 0}, "`rank` must be >= 1, got 0"),
        ({"kind": "uniform", "reach": 0.1}, "`reach` is for `predicted`"),
        ({"kind": "predicted", "density": 0.1, "reach": 0.1}, "instead of a density.*density=0.1"),
        ({"kind": "predicted", "reach": -1.0}, "`reach` must be > 0, got -1.0"),
        ({"kind": "uniform", "density": 0.1, "seed": -1}, "`seed` must be >= 0, got -1"),
        ({"kind": "uniform", "density": 0.1, "dtype": "int8"}, "`dtype` must be one of bfloat16, .*got 'int8'"),
    ],
)
def test_base_mask_names_a_bad_argument(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(MaskError, match=message):
        base_mask("no-such-model", **arguments)  # type: ignore[arg-type]
