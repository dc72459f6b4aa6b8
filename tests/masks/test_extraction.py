"""Extraction equals a comparison of two loaded models, streams, and refuses what cannot be compared."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import subnet_kernels
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import FAMILIES, tiny_model
from subnet_ft.errors import CheckpointMismatchError, MaskError, MaskMismatchError
from subnet_ft.masks import SubnetMask, extract, extraction
from subnet_ft.masks.provenance import format_fingerprint

EMBEDDING = "model.embed_tokens.weight"


def perturb(model: PreTrainedModel, seed: int = 3) -> PreTrainedModel:
    """Change about a tenth of the weights of every other parameter, by amounts from below 1e-8 to above 1e-3."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in list(model.parameters())[::2]:
            chosen = torch.rand(parameter.shape, generator=generator) < 0.1
            exponent = torch.rand(parameter.shape, generator=generator) * 7 - 9
            moved = parameter.float() + 10.0**exponent
            parameter.copy_(torch.where(chosen, moved.to(parameter.dtype), parameter))
            parameter.view(-1)[0] = 1e-9  # an absolute change below every tolerance, where the base is 0
    return model


def save_pair(tmp_path: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    model = tiny_model(family, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[0] = 0.0
    model.save_pretrained(tmp_path / "base")
    perturb(model).save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    return tmp_path / "base", tmp_path / "tuned"


def load_pair(base: Path, tuned: Path) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (base, tuned))
    changed = dict(after.named_parameters())
    return [(name, old.detach(), changed[name].detach()) for name, old in before.named_parameters()]


def norm_pair(tmp_path: Path, old: list[float], new: list[float], dtype: torch.dtype = torch.bfloat16) -> list[Path]:
    """Save two checkpoints that differ in the first elements of the last norm only."""
    folders = [tmp_path / "base", tmp_path / "tuned"]
    for folder, values in zip(folders, (old, new), strict=True):
        model = tiny_model("llama", dtype=dtype)
        with torch.no_grad():
            model.model.norm.weight[: len(values)] = torch.tensor(values)
        model.save_pretrained(folder)
    return folders


@pytest.mark.parametrize("family", FAMILIES)
def test_extract_equals_comparing_loaded_models(family: str, tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, family)
    mask = extract(base, tuned)
    pairs = load_pair(base, tuned)
    assert mask.names == [name for name, _, _ in pairs]
    assert 0.0 < mask.density < 0.5
    for name, old, new in pairs:
        # In float32, too, where transformers keeps a stored bfloat16 so: widening is one to one.
        integers = torch.int16 if old.dtype == torch.bfloat16 else torch.int32
        assert torch.equal(mask[name], old.view(integers) != new.view(integers)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("criterion", "tolerance"),
    [("exact", 0.0), ("absolute", 0.0), ("absolute", 1e-5), ("relative", 0.0), ("relative", 1e-2)],
)
def test_extract_equals_the_criterion_in_torch(
    criterion: str, tolerance: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, tuned = save_pair(tmp_path, dtype=dtype)
    mask = extract(base, tuned, criterion=criterion, tolerance=tolerance)
    assert 0 < mask.num_trainable < mask.num_parameters
    for name, old, new in load_pair(base, tuned):
        delta = (new.float() - old.float()).abs()
        threshold = tolerance * old.float().abs() if criterion == "relative" else tolerance
        assert torch.equal(mask[name], old != new if criterion == "exact" else delta > threshold), name
    assert (mask.provenance.criterion, mask.provenance.tolerance) == (criterion, tolerance)


def test_extract_reports_density_by_absolute_tolerance(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path)
    mask = extract(base, tuned, criterion="relative", tolerance=0.5)
    pairs = load_pair(base, tuned)
    delta = torch.cat([(new.float() - old.float()).abs().view(-1) for _, old, new in pairs])
    expected = {"0": (delta > 0).double().mean().item()}
    for tolerance in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        expected[f"{tolerance:g}"] = (delta > tolerance).double().mean().item()
    assert mask.provenance.density_by_tolerance == pytest.approx(expected, rel=1e-12)
    assert list(mask.provenance.density_by_tolerance) == ["0", "1e-08", "1e-07", "1e-06", "1e-05", "0.0001", "0.001"]
    assert len(set(expected.values())) >= 5, "the perturbation does not tell the tolerances apart"


def test_extract_counts_tied_weights_once(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path)
    mask = extract(base, tuned)
    assert EMBEDDING in mask
    assert "lm_head.weight" not in mask
    assert mask.num_parameters == AutoModelForCausalLM.from_pretrained(base).num_parameters()


def test_extract_exact_compares_bits(tmp_path: Path) -> None:
    nan = math.nan
    base, tuned = norm_pair(tmp_path, [0.0, nan, nan, 1.0, 1.0], [-0.0, nan, 1.0, nan, 1.0])
    assert extract(base, tuned)["model.norm.weight"][:5].tolist() == [True, False, True, True, False]


@pytest.mark.parametrize("criterion", ["absolute", "relative"])
def test_extract_counts_a_nan_on_one_side_as_a_change(criterion: str, tmp_path: Path) -> None:
    nan = math.nan
    base, tuned = norm_pair(tmp_path, [0.0, nan, nan, 1.0, 1.0], [-0.0, nan, 1.0, nan, 1.0])
    mask = extract(base, tuned, criterion=criterion, tolerance=1e-3)
    assert mask["model.norm.weight"][:5].tolist() == [False, False, True, True, False]
    curve = mask.provenance.density_by_tolerance
    assert [round(curve[key] * mask.num_parameters) for key in ("0", "0.001")] == [3, 2]


def test_extract_subtracts_in_float32(tmp_path: Path) -> None:
    # 256 - 0.5 is 255.5 in float32 and rounds to 256 in bfloat16, on the other side of the tolerance.
    base, tuned = norm_pair(tmp_path, [0.5], [256.0])
    assert extract(base, tuned, criterion="absolute", tolerance=255.75).num_trainable == 0
    assert extract(base, tuned, criterion="absolute", tolerance=255.25).num_trainable == 1


def test_extract_subtracts_in_float32_for_the_curve(tmp_path: Path) -> None:
    # In units of 2**-17, 132 - 0.80078125 is above 1e-3 (131.07) and rounds in bfloat16 to 131, below it.
    base, tuned = norm_pair(tmp_path, [0.80078125 * 2**-17], [132 * 2**-17])
    mask = extract(base, tuned)
    assert mask.provenance.density_by_tolerance["0.001"] == 1 / mask.num_parameters


def test_extract_records_both_models(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path)
    provenance = extract(base, open_checkpoint(tuned)).provenance
    assert provenance.source == {"kind": "extract"}
    assert provenance.compare_dtype is None
    for record, folder, side in ((provenance.base, base, 1), (provenance.tuned, tuned, 2)):
        assert record is not None
        assert (record.name, record.revision) == (str(folder), None)
        assert set(record.dtypes.values()) == {"bfloat16"}
        assert record.fingerprints == {
            pair[0]: format_fingerprint(subnet_kernels.fingerprint(pair[side])) for pair in load_pair(base, tuned)
        }


def test_extract_makes_a_mask_that_fits_the_base_only(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path)
    mask = extract(base, tuned)
    assert SubnetMask.load(mask.save(tmp_path / "run.subnet.safetensors"), base=base) == mask
    mask.check(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
    with pytest.raises(MaskMismatchError, match="not those that the mask was made for"):
        mask.check(AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.bfloat16))


def test_extract_does_not_depend_on_the_chunk_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = save_pair(tmp_path)
    whole = extract(base, tuned)
    monkeypatch.setattr(extraction, "_CHUNK", 24)
    chunked = extract(base, tuned)
    assert chunked == whole
    assert chunked.provenance == whole.provenance


def test_extract_casts_both_to_a_dtype(tmp_path: Path) -> None:
    base, tuned = norm_pair(tmp_path, [1.0, 1.0, 1.0], [1.0001, 1.01, 1.0], dtype=torch.float32)
    assert extract(base, tuned)["model.norm.weight"][:3].tolist() == [True, True, False]
    mask = extract(base, tuned, dtype="bfloat16")
    assert mask["model.norm.weight"][:3].tolist() == [False, True, False]
    assert mask.provenance.compare_dtype == "bfloat16"
    mask.check(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
    with pytest.raises(MaskMismatchError, match="is float32 but the mask was compared in bfloat16"):
        mask.check(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))


def test_extract_refuses_different_dtypes_unless_cast(tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    tiny_model("llama").save_pretrained(base)
    tiny_model("llama", dtype=torch.float32).save_pretrained(tuned)
    with pytest.raises(CheckpointMismatchError) as caught:
        extract(base, tuned)
    message = str(caught.value)
    assert f"`{base}` and `{tuned}` are stored in different dtypes" in message
    assert f"`{EMBEDDING}` bfloat16 and float32" in message
    assert "and 17 more" in message
    assert "dtype='bfloat16' (`--dtype bfloat16`)" in message
    assert extract(base, tuned, dtype="bfloat16").num_trainable == 0


def test_extract_recommends_the_narrower_dtype_of_a_wider_base(tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(base)
    model.bfloat16().save_pretrained(tuned)
    with pytest.raises(CheckpointMismatchError, match=r"dtype='bfloat16' \(`--dtype bfloat16`\)"):
        extract(base, tuned)
    assert extract(base, tuned, dtype="bfloat16").num_trainable == 0


def test_extract_refuses_different_parameters(tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    tiny_model("llama").save_pretrained(base)
    tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=False).save_pretrained(tuned)
    with pytest.raises(CheckpointMismatchError) as caught:
        extract(base, tuned)
    message = str(caught.value)
    assert "`model.layers.1.self_attn.q_proj.weight`" in message
    assert "and 6 more only in the base" in message
    assert "`lm_head.weight` only in the tuned checkpoint" in message
    assert "same tied embeddings" in message


def test_extract_refuses_different_shapes(tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    model = tiny_model("llama")
    model.save_pretrained(base)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 8, mean_resizing=False)
    model.save_pretrained(tuned)
    expected = (
        rf"base against tuned: `model\.embed_tokens\.weight` \({rows}, 32\) and \({rows + 8}, 32\)\. .*resize the base"
    )
    with pytest.raises(CheckpointMismatchError, match=expected):
        extract(base, tuned)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "close"}, "`criterion` must be one of exact, absolute, relative, got 'close'"),
        ({"criterion": "absolute", "tolerance": -1e-5}, "`tolerance` must be a finite number >= 0, got -1e-05"),
        ({"criterion": "absolute", "tolerance": math.nan}, "`tolerance` must be a finite number >= 0, got nan"),
        ({"tolerance": 1e-5}, "`exact` compares bits and has no tolerance, got 1e-05. Choose `absolute`"),
        ({"dtype": "int8"}, "`dtype` must be one of bfloat16, float16, float32, got 'int8'"),
    ],
)
def test_extract_refuses_invalid_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(MaskError) as caught:
        extract("tiny:llama", "tiny:llama", **options)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_extract_warns_of_an_empty_mask(caplog: pytest.LogCaptureFixture) -> None:
    mask = extract("tiny:llama", "tiny:llama")
    assert mask.num_trainable == 0
    assert all(tensor.bits.numel() == 0 for tensor in mask.tensors.values())
    assert "the mask is empty" in caplog.text


def test_extract_warns_of_a_dense_float32_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed, name in enumerate(("base", "tuned")):
        tiny_model("llama", dtype=torch.float32, seed=seed).save_pretrained(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        extract(tmp_path / "base", tmp_path / "tuned")
    assert "In float32 nearly every optimizer step changes nearly every weight" in caplog.text


def test_extract_shows_progress_only_when_asked(capfd: pytest.CaptureFixture[str]) -> None:
    extract("tiny:llama", "tiny:llama")
    capfd.readouterr()
    extract("tiny:llama", "tiny:llama", progress=True)
    output = capfd.readouterr()
    assert output.out == ""
    assert "Comparing weights: 100%" in output.err
