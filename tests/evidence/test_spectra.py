"""Spectra of deltas: torch's own figures, planted low rank, and controls that are full of rank for no reason."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_bits
from memory_checkpoint import MemoryCheckpoint

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.errors import CheckpointMismatchError
from subnet_ft.evidence import spectra as spectra_module
from subnet_ft.evidence.plain import from_plain
from subnet_ft.evidence.spectra import Spectra, Spectrum, delta_spectra, shuffled_delta
from subnet_ft.masks.magnitude import magnitude_bins


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spectrum_of(delta: torch.Tensor, weight: torch.Tensor | None = None) -> Spectrum:
    """Return the spectrum of a delta on a weight of zeros, so that the addition rounds nothing, or on another."""
    base = torch.zeros_like(delta) if weight is None else weight
    found = delta_spectra(MemoryCheckpoint("base", {"w": base}), MemoryCheckpoint("run", {"w": base + delta}))
    return found.matrices[0]


def low_rank(rank: int, rows: int, columns: int) -> torch.Tensor:
    return gaussian(rows, rank, seed=1) @ gaussian(rank, columns, seed=2)


@pytest.mark.parametrize(
    "delta",
    [
        gaussian(40, 60),
        gaussian(60, 40) * random_bits(2400, 0.05, 9).view(60, 40),
        low_rank(3, 50, 70),
        low_rank(7, 64, 64) + 1e-5 * gaussian(64, 64),
        gaussian(1, 9),
        gaussian(300, 20),
        low_rank(5, 20, 300),
        torch.diag(torch.tensor([1.0, *[2e-5] * 39])) @ torch.eye(40, 250),
    ],
    ids=["dense", "sparse", "rank 3", "rank 7 and noise", "row", "elongated", "elongated, rank 5", "at the tolerance"],
)
def test_spectrum_equals_three_lines_of_torch(delta: torch.Tensor) -> None:
    found = spectrum_of(delta)
    values = torch.linalg.svdvals(delta.double())
    energy = values.square().cumsum(0) / values.square().sum()
    assert found.rank == int(torch.linalg.matrix_rank(delta))
    assert found.rank_share == found.rank / min(delta.shape)
    expected = torch.linalg.matrix_norm(delta.double()) ** 2 / torch.linalg.matrix_norm(delta.double(), 2) ** 2
    assert found.stable_rank == pytest.approx(float(expected), rel=1e-5)
    assert found.energy_rank_99 == int((energy < 0.99).sum()) + 1
    assert found.num_changed == int((delta != 0).sum())
    places = np.linspace(0, len(values) - 1, min(33, len(values))).round().astype(int)
    assert found.profile == pytest.approx((values / values[0])[places].tolist(), abs=1e-5)
    assert found.shape == list(delta.shape)
    assert found.method == ("gram" if max(delta.shape) >= 8 * min(delta.shape) else "svd")


def test_rank_is_full_for_sparse_noise_where_stable_rank_tells_a_planted_direction() -> None:
    """The trap: any sparse random delta has nearly full rank, so a full rank says nothing."""
    places = random_bits(200 * 300, 0.2, 9).view(200, 300)
    noise = spectrum_of(gaussian(200, 300) * places)
    planted = spectrum_of((low_rank(2, 200, 300) + 0.1 * gaussian(200, 300)) * places)
    assert noise.rank_share > 0.99
    assert planted.rank_share > 0.99
    assert noise.stable_rank > 4 * planted.stable_rank
    assert planted.control.stable_rank > 4 * planted.stable_rank
    assert planted.control.num_changed == planted.num_changed


@pytest.mark.parametrize("shape", [(80, 120), (120, 80), (400, 40), (40, 400)])
def test_principal_overlap_is_one_inside_zero_outside_and_as_expected_at_random(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    leading = round(0.05 * min(shape))

    def part(chosen: slice) -> torch.Tensor:
        return left[:, chosen] @ torch.diag(values[chosen]) @ right[chosen]

    inside = spectrum_of(part(slice(0, leading)), weight)
    assert inside.principal_rank == leading
    assert inside.principal_overlap == pytest.approx(1, abs=1e-3)
    outside = spectrum_of(part(slice(leading, 3 * leading)), weight)
    assert outside.principal_overlap == pytest.approx(0, abs=1e-3)
    random = [spectrum_of(gaussian(*shape, seed=seed), weight).principal_overlap for seed in range(5, 25)]
    assert outside.principal_expected == pytest.approx((leading / shape[0] + leading / shape[1]) / 2)
    deviation = np.std(random) / len(random) ** 0.5
    assert np.mean(random) == pytest.approx(outside.principal_expected, abs=4 * deviation)


def test_principal_overlap_leaves_undefined_directions_out() -> None:
    weight = gaussian(100, 100)
    left, values, right = torch.linalg.svd(weight)
    first = values[0] * left[:, :1] @ right[:1]
    found = spectrum_of(first, weight)
    assert found.principal_rank == 5
    assert found.rank == int(torch.linalg.matrix_rank((weight + first) - weight))
    exact = spectrum_of(torch.outer(torch.eye(100)[0], torch.eye(100)[1]), torch.diag(torch.arange(100.0, 0, -1)))
    assert exact.rank == 1
    assert exact.principal_overlap == pytest.approx(1)


def test_gram_matrix_and_svd_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, delta = gaussian(90, 70, seed=3), low_rank(4, 90, 70) + 0.05 * gaussian(90, 70, seed=4)
    by_svd = spectrum_of(delta, weight)
    monkeypatch.setattr(spectra_module, "_ELONGATED", 1)
    monkeypatch.setattr(spectra_module, "_GRAM_ROWS", 16)
    by_gram = spectrum_of(delta, weight)
    assert (by_svd.method, by_gram.method) == ("svd", "gram")
    assert (by_svd.rank, by_svd.energy_rank_99) == (by_gram.rank, by_gram.energy_rank_99)
    assert by_svd.stable_rank == pytest.approx(by_gram.stable_rank, rel=1e-5)
    assert by_svd.principal_overlap == pytest.approx(by_gram.principal_overlap, abs=1e-5)
    assert by_svd.profile == pytest.approx(by_gram.profile, abs=1e-5)


def test_shuffled_delta_moves_entries_inside_bins_of_the_weight() -> None:
    weight = 0.02 * gaussian(60, 70)
    delta = gaussian(60, 70, seed=1) * random_bits(4200, 0.2, 9).view(60, 70) * (weight.abs() < 0.02)
    first, again, other = (shuffled_delta(delta, weight, [seed]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first != 0, delta != 0)
    bins = torch.from_numpy(magnitude_bins(weight.view(-1)).astype(np.int64))
    for bin_ in bins.unique():
        inside = bins == bin_
        assert torch.equal(first.view(-1)[inside].sort().values, delta.view(-1)[inside].sort().values)


def test_shuffled_delta_reaches_every_place_equally_often() -> None:
    weight = torch.tensor([[1.0, 1.05, 2.0, 2.1, 2.2]])
    delta = torch.tensor([[1.0, 0.0, 5.0, 0.0, 0.0]])
    hits = torch.stack([shuffled_delta(delta, weight, [seed]) for seed in range(2000)]).mean(0)
    # Five standard deviations of a binomial share of 1/2 and 1/3, times the entry.
    assert hits[0, :2].tolist() == pytest.approx([1 / 2] * 2, abs=5 * (0.25 / 2000) ** 0.5)
    assert hits[0, 2:].tolist() == pytest.approx([5 / 3] * 3, abs=5 * 5 * (2 / 9 / 2000) ** 0.5)


def test_delta_spectra_takes_a_control_run() -> None:
    base, run, control = (
        MemoryCheckpoint(name, {"w": gaussian(30, 20, seed=seed)}) for seed, name in enumerate(("base", "run", "other"))
    )
    found = delta_spectra(base, run, control=control)
    alone = delta_spectra(base, control).matrices[0]
    assert found.control == "run"
    assert found.matrices[0].control is not None
    assert {**asdict(found.matrices[0].control), "control": None} == {**asdict(alone), "control": None}
    assert delta_spectra(base, run).control == "shuffled"
    assert from_plain(Spectra, json.loads(json.dumps(asdict(found)))) == found


def test_delta_spectra_of_no_change_is_empty() -> None:
    found = spectrum_of(torch.zeros(6, 5))
    assert (found.rank, found.rank_share, found.num_changed, found.profile) == (0, 0, 0, [])
    assert (found.stable_rank, found.energy_rank_99, found.principal_overlap) == (None, None, None)


def test_delta_spectra_samples_the_first_middle_and_last_layer_and_expert() -> None:
    values = {f"model.layers.{layer}.mlp.weight": gaussian(4, 4, seed=layer) for layer in range(6)}
    values |= {f"model.layers.{layer}.experts.weight": gaussian(5, 4, 3, seed=layer) for layer in range(1)}
    values |= {"embed.weight": gaussian(9, 4), "norm.weight": gaussian(4), "conv.weight": gaussian(2, 2, 2, 2)}
    base = MemoryCheckpoint("base", values)
    run = MemoryCheckpoint("run", {name: value + 1 for name, value in values.items()})
    sampled, everything = delta_spectra(base, run), delta_spectra(base, run, which="all")
    assert [entry.name for entry in sampled.matrices] == [
        *(f"model.layers.{layer}.mlp.weight" for layer in (0, 3, 5)),
        *(f"model.layers.0.experts.weight[{expert}]" for expert in (0, 2, 4)),
        "embed.weight",
    ]
    assert (sampled.sampled, everything.sampled) == (True, False)
    assert len(everything.matrices) == 6 + 5 + 1
    assert {entry.name for entry in sampled.matrices} < {entry.name for entry in everything.matrices}
    assert sampled.skipped == everything.skipped == {"conv.weight": "has 4 axes"}


def test_delta_spectra_says_what_it_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra_module, "_LARGEST", 100)
    values = {"large": gaussian(11, 10), "broken": gaussian(5, 5), "none": torch.empty(0, 3), "fine": gaussian(5, 6)}
    run = {name: value + 1 for name, value in values.items()}
    run["broken"][2, 2] = torch.nan
    found = delta_spectra(MemoryCheckpoint("base", values), MemoryCheckpoint("run", run))
    assert [entry.name for entry in found.matrices] == ["fine"]
    assert found.skipped == {
        "large": "is too large to decompose here: 110 weights, the limit is 100",
        "none": "is empty",
        "broken": "holds NaN or infinite weights",
    }


def test_delta_spectra_reads_checkpoints_and_casts_them(tmp_path: Path) -> None:
    base, run = (
        open_checkpoint(save_tiny("mixtral", tmp_path / str(seed), seed=seed, dtype=dtype))
        for seed, dtype in enumerate((torch.bfloat16, torch.float32))
    )
    with pytest.raises(CheckpointMismatchError, match=r"stored in torch\.float32"):
        delta_spectra(base, run)
    found = delta_spectra(base, run, dtype="bfloat16")
    assert not found.skipped
    stacked = next(entry for entry in found.matrices if entry.name.endswith("[0]"))
    name = stacked.name.removesuffix("[0]")
    delta = run.tensor(name)[0].bfloat16().float() - base.tensor(name)[0].float()
    assert stacked.rank == int(torch.linalg.matrix_rank(delta))
    assert stacked.num_changed == int((delta != 0).sum())


def test_delta_spectra_refuses_wrong_words() -> None:
    model = MemoryCheckpoint("model", {"w": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="`which` must be `sampled` or `all`, got 'some'"):
        delta_spectra(model, model, which="some")
    with pytest.raises(ValueError, match="`dtype` must be one of"):
        delta_spectra(model, model, dtype="int8")
