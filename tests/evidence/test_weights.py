import pytest
import torch
from memory_checkpoint import MemoryCheckpoint

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.errors import CheckpointMismatchError, MaskMismatchError
from subnet_ft.evidence import weights as weights_module
from subnet_ft.evidence.weights import RunWeights, compare_weights
from subnet_ft.masks import SubnetMask

SHAPES = {"embed.weight": (50, 8), "layers.0.mlp.weight": (8, 8, 3), "layers.0.norm.weight": (8,), "scale": ()}


def random_model(seed: int, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) / 8).to(dtype) for name, shape in SHAPES.items()}


def moved(values: dict[str, torch.Tensor], mask: dict[str, torch.Tensor], *, seed: int, by: float):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(
            mask[name], (value.float() + by * torch.randn(value.shape, generator=generator)).to(value.dtype), value
        )
        for name, value in values.items()
    }


def random_mask(seed: int, share: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < share for name, shape in SHAPES.items()}


def flat(values: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk", [7, 4_194_304])
def test_compare_weights_equals_three_lines_of_torch(dtype, chunk, monkeypatch):
    monkeypatch.setattr(weights_module, "_CHUNK", chunk)
    base = random_model(0, dtype=dtype)
    run_mask = random_mask(2, 0.3)
    full = moved(base, random_mask(1, 0.4), seed=3, by=1e-4)
    run = moved(base, run_mask, seed=4, by=1e-4)
    run["scale"] = base["scale"] + 1
    run_mask["scale"] = torch.tensor(False)

    result = compare_weights(
        MemoryCheckpoint("base", base),
        MemoryCheckpoint("full", full),
        {"subnet": RunWeights(MemoryCheckpoint("run", run), run_mask)},
    )["subnet"]

    b, f, r, own = flat(base), flat(full), flat(run), flat(run_mask)
    m = b != f
    assert result.num_parameters == len(b)
    assert result.num_in_mask == int(m.sum())
    assert result.off_mask_changed == int(((r != b) & ~own).sum()) == 1
    assert result.off_mask_tensors == ["scale"]
    assert result.mask_changed_share == pytest.approx(((r != b) & own).sum().item() / own.sum().item())
    for key, tolerance in {"0": 0.0, "1e-06": 1e-6, "1e-05": 1e-5, "0.0001": 1e-4}.items():
        close, base_close = ((x.float() - f.float()).abs() <= tolerance for x in (r, b))
        assert result.identical[key] == pytest.approx(close.float().mean().item())
        assert result.in_mask_identical[key] == pytest.approx(close[m].float().mean().item())
        assert result.base_identical[key] == pytest.approx(base_close.float().mean().item())
        assert result.base_in_mask_identical[key] == pytest.approx(base_close[m].float().mean().item())
    expected = (r.float() - f.float()).double().norm() / (b.float() - f.float()).double().norm()
    assert result.relative_distance == pytest.approx(expected.item(), rel=1e-12)


def test_compare_weights_takes_the_weights_whose_bits_the_full_run_changed():
    base = random_model(0)
    full = moved(base, random_mask(1, 0.4), seed=3, by=1e-2)
    result = compare_weights(
        MemoryCheckpoint("base", base),
        MemoryCheckpoint("full", full),
        {"full": RunWeights(MemoryCheckpoint("full", full))},
    )["full"]
    assert result.num_in_mask == int((flat(base) != flat(full)).sum())
    assert result.base_in_mask_identical["0"] == 0.0
    assert result.in_mask_identical["0"] == 1.0
    assert result.relative_distance == 0.0
    assert result.off_mask_changed is None
    assert result.mask_changed_share is None


def test_compare_weights_when_the_full_run_changed_nothing():
    base = random_model(0)
    empty = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    result = compare_weights(
        MemoryCheckpoint("base", base),
        MemoryCheckpoint("full", base),
        {"subnet": RunWeights(MemoryCheckpoint("run", random_model(5)), empty)},
    )["subnet"]
    assert result.relative_distance is None
    assert result.in_mask_identical is None
    assert result.base_in_mask_identical is None
    assert result.mask_changed_share is None
    assert result.base_identical["0"] == 1.0
    assert result.off_mask_changed > 0


def test_compare_weights_compares_bits_not_values():
    base = {"w": torch.tensor([0.0, 0.0, float("nan"), float("inf")])}
    run = {"w": torch.tensor([-0.0, -0.0, float("nan"), float("inf")])}
    outside = {"w": torch.zeros(4, dtype=torch.bool)}
    result = compare_weights(
        MemoryCheckpoint("base", base),
        MemoryCheckpoint("full", base),
        {"run": RunWeights(MemoryCheckpoint("run", run), outside)},
    )["run"]
    assert result.off_mask_changed == 2
    assert result.identical == {"0": 0.5, "1e-06": 1.0, "1e-05": 1.0, "0.0001": 1.0}


def test_compare_weights_subtracts_in_fp32():
    # In bf16 the difference of these neighbours rounds to a value above the tolerance; in fp32 it is 2^-14 = 6.1e-5.
    base = {"w": torch.tensor([0.0], dtype=torch.bfloat16)}
    full = {"w": torch.tensor([0.015625], dtype=torch.bfloat16)}
    run = {"w": torch.tensor([0.01556396484375], dtype=torch.bfloat16)}
    result = compare_weights(
        MemoryCheckpoint("base", base),
        MemoryCheckpoint("full", full),
        {"run": RunWeights(MemoryCheckpoint("run", run))},
    )["run"]
    assert result.identical["0.0001"] == 1.0
    assert result.identical["1e-05"] == 0.0


def test_compare_weights_reads_every_checkpoint_once():
    base, full, one, two = (MemoryCheckpoint(str(seed), random_model(seed)) for seed in range(4))
    compare_weights(base, full, {"one": RunWeights(one), "two": RunWeights(two)})
    for checkpoint in (base, full, one, two):
        assert checkpoint.reads == dict.fromkeys(SHAPES, 1)


def test_compare_weights_reads_real_checkpoints_and_masks(tmp_path):
    folders = {name: save_tiny("llama", tmp_path / name, seed=seed) for seed, name in enumerate(["base", "full"])}
    base, full = (open_checkpoint(folders[name]) for name in ("base", "full"))
    mask = SubnetMask.from_dense({name: value != full.tensor(name) for name, value in base.tensors()})
    result = compare_weights(base, full, {"full": RunWeights(full, mask)})["full"]
    assert result.num_parameters == mask.num_parameters
    assert result.num_in_mask == mask.num_trainable > 0
    assert result.off_mask_changed == 0
    assert result.mask_changed_share == 1.0
    assert result.base_identical["0"] == pytest.approx(1 - mask.density)


def test_compare_weights_names_few_offending_tensors():
    base = {f"w{index}": torch.zeros(2) for index in range(9)}
    run = {name: value + 1 for name, value in base.items()}
    outside = {name: torch.zeros(2, dtype=torch.bool) for name in base}
    result = compare_weights(
        MemoryCheckpoint("base", base),
        MemoryCheckpoint("full", base),
        {"run": RunWeights(MemoryCheckpoint("run", run), outside)},
    )["run"]
    assert result.off_mask_changed == 18
    assert result.off_mask_tensors == ["w0", "w1", "w2", "w3", "w4"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values.pop("scale"), "`scale` is missing"),
        (lambda values: values.update(extra=torch.zeros(1)), "`extra` is not in the base"),
        (lambda values: values.update(scale=torch.zeros(2, dtype=torch.bfloat16)), r"has shape \(2,\)"),
        (lambda values: values.update(scale=torch.zeros(())), "is stored in torch.float32"),
    ],
)
@pytest.mark.parametrize("place", ["full", "run"])
def test_compare_weights_refuses_checkpoints_of_another_model(change, words, place):
    models = {name: random_model(0) for name in ("base", "full", "run")}
    change(models[place])
    checkpoints = {name: MemoryCheckpoint(f"folder/{name}", values) for name, values in models.items()}
    with pytest.raises(CheckpointMismatchError, match=words) as caught:
        compare_weights(checkpoints["base"], checkpoints["full"], {"run": RunWeights(checkpoints["run"])})
    assert f"folder/{place}" in str(caught.value)


@pytest.mark.parametrize("bad", [{}, {"w": torch.ones(3, dtype=torch.bool)}])
def test_compare_weights_refuses_a_mask_of_another_model(bad):
    model = MemoryCheckpoint("model", {"w": torch.zeros(2)})
    with pytest.raises(MaskMismatchError, match="`w`"):
        compare_weights(model, model, {"subnet": RunWeights(model, bad)})


def test_compare_weights_casts_to_a_dtype():
    """The base is stored in float32 and holds what bfloat16 cannot; both runs start from its cast, one saved wider."""
    stored = {name: value + 1e-5 for name, value in random_model(0, dtype=torch.float32).items()}
    start = {name: value.bfloat16() for name, value in stored.items()}
    run_mask = random_mask(2, 0.3)
    full, run = (moved(start, mask, seed=3, by=1e-2) for mask in (random_mask(1, 0.4), run_mask))
    wide = {name: value.float() for name, value in run.items()}
    cast, plain = (
        compare_weights(
            MemoryCheckpoint("base", base),
            MemoryCheckpoint("full", full),
            {"subnet": RunWeights(MemoryCheckpoint("run", values), run_mask)},
            dtype=dtype,
        )["subnet"]
        for base, values, dtype in ((stored, wide, "bfloat16"), (start, run, None))
    )
    assert cast == plain
    assert cast.off_mask_changed == 0
    assert 0 < cast.num_in_mask < cast.num_parameters


def test_compare_weights_names_the_cast_that_different_dtypes_need():
    base, full = (
        MemoryCheckpoint("base", random_model(0, dtype=torch.float32)),
        MemoryCheckpoint("full", random_model(0)),
    )
    for first, second in ((base, full), (full, base)):
        with pytest.raises(CheckpointMismatchError, match="after a cast with dtype='bfloat16'"):
            compare_weights(first, second, {})
    with pytest.raises(ValueError, match="`dtype` must be one of bfloat16, float16, float32, got 'int8'"):
        compare_weights(base, full, {}, dtype="int8")
