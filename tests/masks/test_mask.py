"""SubnetMask: polarity, algebra, checks against a model."""

from __future__ import annotations

import pytest
import torch
from helpers import random_bits

import subnet_kernels
from subnet_ft.checkpoints import undo_upcasts
from subnet_ft.errors import MaskError, MaskMismatchError
from subnet_ft.masks import ModelRecord, Provenance, SubnetMask, TensorMask, layer_and_kind

SHAPES = {"model.layers.0.up.weight": (3, 5), "model.layers.1.up.weight": (3, 5), "model.norm.weight": (7,)}


def make(density: float, seed: int, provenance: Provenance | None = None) -> SubnetMask:
    return SubnetMask.from_dense(
        {n: random_bits(torch.Size(s).numel(), density, seed + i).view(s) for i, (n, s) in enumerate(SHAPES.items())},
        provenance,
    )


def record(model: torch.nn.Module, name: str = "base") -> ModelRecord:
    fingerprints = {}
    for parameter_name, parameter in model.named_parameters():
        a, b = subnet_kernels.fingerprint(parameter.detach())
        fingerprints[parameter_name] = f"{a:016x}{b:016x}"
    dtypes = {n: str(p.dtype).removeprefix("torch.") for n, p in model.named_parameters()}
    return ModelRecord(name, dtypes=dtypes, fingerprints=fingerprints)


def test_subnet_mask_returns_the_dense_tensors_it_was_built_from() -> None:
    dense = {name: random_bits(torch.Size(shape).numel(), 0.4).view(shape) for name, shape in SHAPES.items()}
    mask = SubnetMask.from_dense(dense)
    assert all(torch.equal(mask[name], dense[name]) for name in SHAPES)
    assert mask.names == list(SHAPES)
    assert mask.num_trainable == sum(int(value.sum()) for value in dense.values())
    assert mask.num_parameters == 37
    assert mask.density == mask.num_trainable / 37


def test_subnet_mask_keeps_empty_tensors_without_bits() -> None:
    mask = SubnetMask.from_dense({"a": torch.zeros(9, dtype=torch.bool), "b": torch.ones(2, dtype=torch.bool)})
    assert mask.tensors["a"].bits.numel() == 0
    assert not mask["a"].any()
    assert mask.num_parameters == 11


def test_subnet_mask_algebra_is_that_of_sets() -> None:
    a, b = make(0.5, 1), make(0.5, 11)
    for name in SHAPES:
        assert torch.equal((a & b)[name], a[name] & b[name])
        assert torch.equal((a | b)[name], a[name] | b[name])
        assert torch.equal((a - b)[name], a[name] & ~b[name])
        assert torch.equal((~a)[name], ~a[name])
    assert ~~a == a
    assert a != b
    assert (a & ~a).num_trainable == 0
    assert (a | ~a) == SubnetMask.full(SHAPES)


def test_subnet_mask_algebra_refuses_other_shapes_and_other_bases() -> None:
    with pytest.raises(MaskMismatchError, match="different parameters"):
        make(0.5, 1) & SubnetMask.full({"other": (3,)})
    bases = [Provenance(base=ModelRecord(name, fingerprints={"a": name})) for name in ("one", "two")]
    with pytest.raises(MaskMismatchError, match="different bases, one and two"):
        make(0.5, 1, bases[0]) | make(0.5, 2, bases[1])


def test_subnet_mask_algebra_keeps_the_dtype_of_the_comparison() -> None:
    base = ModelRecord("base", None, dict.fromkeys(SHAPES, "bfloat16"), dict.fromkeys(SHAPES, "ab" * 16))
    cast, stored = (make(0.5, 1, Provenance(base=base, compare_dtype=dtype)) for dtype in ("bfloat16", None))
    baseless = make(0.5, 2)
    for combined in (~cast, cast & cast, cast | baseless, baseless - cast, cast & stored, stored & cast):
        assert combined.provenance.compare_dtype == "bfloat16"
        assert combined.provenance.base == base
    assert (stored | baseless).provenance.compare_dtype is None
    assert (stored | make(0.5, 2, Provenance(compare_dtype="float16"))).provenance.compare_dtype is None


def test_subnet_mask_algebra_refuses_one_base_compared_in_two_dtypes() -> None:
    sides = [
        Provenance(
            base=ModelRecord("base", None, dict.fromkeys(SHAPES, dtype), dict.fromkeys(SHAPES, "ab" * 16)),
            compare_dtype=dtype,
        )
        for dtype in ("bfloat16", "float16")
    ]
    with pytest.raises(MaskMismatchError, match=r"base and base, compared in bfloat16 and float16; .* one `dtype`"):
        make(0.5, 1, sides[0]) & make(0.5, 2, sides[1])


def test_subnet_mask_fingerprint_takes_any_name_that_json_has() -> None:
    masks = [SubnetMask.from_dense({name: torch.ones(3, dtype=torch.bool)}) for name in ("\ud800", "\ud801", "?")]
    assert len({mask.fingerprint for mask in masks}) == 3


def test_subnet_mask_fingerprint_depends_on_bits_names_and_shapes_alone() -> None:
    mask = make(0.5, 1)
    same = SubnetMask(mask.tensors, Provenance(source={"kind": "other"}))
    renamed = SubnetMask({name + "x": tensor for name, tensor in mask.tensors.items()})
    assert mask.fingerprint == same.fingerprint
    assert len({mask.fingerprint, renamed.fingerprint, make(0.5, 2).fingerprint}) == 3


def test_subnet_mask_densities_by_layer_and_kind() -> None:
    dense = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    dense["model.layers.1.up.weight"][0] = True
    dense["model.norm.weight"][:] = True
    mask = SubnetMask.from_dense(dense)
    assert mask.density_by_layer() == {"0": 0.0, "1": 5 / 15, "other": 1.0}
    assert mask.density_by_kind() == {"up.weight": 5 / 30, "model.norm.weight": 1.0}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.mlp.up_proj.weight", ("12", "mlp.up_proj.weight")),
        ("gpt_neox.layers.0.attention.dense.bias", ("0", "attention.dense.bias")),
        ("transformer.h.3.ln_1.weight", ("3", "ln_1.weight")),
        ("model.layers.1.mlp.experts.gate_up_proj", ("1", "mlp.experts.gate_up_proj")),
        ("lm_head.weight", ("other", "lm_head.weight")),
    ],
)
def test_layer_and_kind_splits_names_of_real_families(name: str, expected: tuple[str, str]) -> None:
    assert layer_and_kind(name) == expected


def test_subnet_mask_check_accepts_its_base_and_names_what_differs() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    dense = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    mask = SubnetMask.from_dense(dense, Provenance(base=record(model, "my/base")))
    mask.check(model)
    with torch.no_grad():
        model[0].bias[1] += 1e-6
    with pytest.raises(MaskMismatchError, match=r"`0\.bias` are not those that the mask was made for \(`my/base`\)"):
        mask.check(model)


def test_subnet_mask_check_refuses_another_dtype_by_name() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    dense = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    mask = SubnetMask.from_dense(dense, Provenance(base=record(model)))
    with pytest.raises(MaskMismatchError, match=r"`0\.weight` is bfloat16 but the mask was compared in float32"):
        mask.check(model.to(torch.bfloat16))


def test_subnet_mask_check_says_what_to_do_about_a_weight_kept_in_float32() -> None:
    """transformers keeps some weights in float32 in a model that is loaded in bfloat16."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(torch.bfloat16)
    dense = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    mask = SubnetMask.from_dense(dense, Provenance(base=record(model)))
    model[1].float()
    with pytest.raises(
        MaskMismatchError, match=r"`1\.weight` is float32 .* in bfloat16 .*undo_upcasts\(model, dtype='bfloat16'\)`"
    ):
        mask.check(model)
    undo_upcasts(model, dtype="bfloat16")
    mask.check(model)


def test_subnet_mask_check_refuses_a_base_that_it_cannot_check() -> None:
    model = torch.nn.Linear(4, 3)
    mask = SubnetMask.full({"weight": (3, 4), "bias": (3,)}, Provenance(base=ModelRecord("my/base")))
    with pytest.raises(MaskMismatchError, match="names `my/base` as its base but has no fingerprint of `weight`"):
        mask.check(model)


def test_subnet_mask_check_names_both_shapes() -> None:
    mask = SubnetMask.full({"weight": (3, 4), "bias": (3,)})
    with pytest.raises(MaskMismatchError, match=r"`weight` has shape \(3, 4\) but the parameter has shape \(3, 5\)"):
        mask.check(torch.nn.Linear(5, 3))


def test_subnet_mask_refuses_bits_of_a_wrong_size() -> None:
    with pytest.raises(MaskError, match=r"shape \(2,\)"):
        SubnetMask({"a": TensorMask(torch.zeros(1, dtype=torch.uint8), (9,), 3)})


def test_subnet_mask_from_dense_wants_booleans() -> None:
    with pytest.raises(MaskError, match=r"mask of `a` is torch\.float32"):
        SubnetMask.from_dense({"a": torch.ones(3)})
