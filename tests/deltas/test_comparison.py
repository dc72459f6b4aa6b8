"""`compose_deltas` and `diff_deltas`, weight by weight beside plain torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from delta_checkpoints import save_pair, unchanged, weights
from safetensors.torch import load_file

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints import resolve as resolve_module
from subnet_ft.deltas import Delta, apply_delta, compose_deltas, diff_deltas, export_delta, verify_delta
from subnet_ft.errors import DeltaError, DeltaMismatchError

SUFFIX = ".delta.safetensors"
Files = dict[str, Path]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """A base, two checkpoints tuned from it that change some of the same weights, and their deltas."""
    base, first = save_pair(tmp_path / "1", seed=1, density=0.3)
    second = save_pair(tmp_path / "2", seed=2, density=0.3)[1]
    one = export_delta(base, first, tmp_path / f"1{SUFFIX}").path
    two = export_delta(base, second, tmp_path / f"2{SUFFIX}").path
    return {"base": base, "first": first, "second": second, "one": one, "two": two, "out": tmp_path / f"c{SUFFIX}"}


def bits(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight.view(torch.int16) for name, weight in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("policy", ["first", "second"])
def test_compose_takes_the_value_that_the_policy_names(policy: str, files: Files, tmp_path: Path) -> None:
    composed = compose_deltas(files["one"], files["two"], files["out"], base=files["base"], on_conflict=policy)
    out = bits(apply_delta(files["base"], composed, tmp_path / "out"))
    base, winner = bits(files["base"]), bits(files[policy])
    loser = bits(files["second" if policy == "first" else "first"])
    conflicts = 0
    for name, weight in base.items():
        changed = winner[name] != weight
        assert torch.equal(out[name], torch.where(changed, winner[name], loser[name])), name
        conflicts += int((changed & (loser[name] != weight) & (loser[name] != winner[name])).sum())
    assert conflicts > 100
    assert verify_delta(files["base"], composed, tmp_path / "out").is_fine


def test_compose_refuses_conflicts_with_their_number_and_writes_nothing(files: Files, tmp_path: Path) -> None:
    found = diff_deltas(files["one"], files["two"])
    name, first = next((name, entry) for name, entry in found.items() if entry.shared > entry.equal)
    with unchanged(tmp_path), pytest.raises(DeltaMismatchError) as refused:
        compose_deltas(files["one"], files["two"], files["out"], base=files["base"])
    assert f"{first.shared - first.equal:,} of the {first.shared:,} weights of `{name}`" in str(refused.value)


def test_compose_needs_no_policy_where_shared_weights_get_equal_values(files: Files, tmp_path: Path) -> None:
    composed = compose_deltas(files["one"], files["one"], files["out"])
    assert composed.entries == Delta.load(files["one"]).entries
    assert weights(apply_delta(files["base"], composed, tmp_path / "out")) == weights(files["first"])


@pytest.mark.parametrize("policy", ["error", "first", "second"])
def test_compose_of_a_chain_gives_its_end_under_every_policy(policy: str, files: Files, tmp_path: Path) -> None:
    then = export_delta(files["first"], files["second"], tmp_path / f"3{SUFFIX}")
    composed = compose_deltas(files["one"], then, files["out"], base=files["base"], on_conflict=policy)
    assert weights(apply_delta(files["base"], composed, tmp_path / "out")) == weights(files["second"])
    with unchanged(tmp_path):
        with pytest.raises(DeltaMismatchError, match="different bases"):
            compose_deltas(then, files["one"], tmp_path / f"x{SUFFIX}", base=files["base"])
        with pytest.raises(DeltaMismatchError, match="not those that the deltas were made for"):
            compose_deltas(files["one"], then, tmp_path / f"x{SUFFIX}", base=files["first"])
        with pytest.raises(DeltaError, match="`on_conflict` must be one of error, first, second, got 'third'"):
            compose_deltas(files["one"], then, tmp_path / f"x{SUFFIX}", on_conflict="third")


@pytest.mark.parametrize(
    "name", ["owner/model", "package:json/x.gguf", "tiny:llama", "x.gguf", "~/x", "", "\0", "x" * 4096]
)
def test_compose_opens_nothing_that_only_a_file_names(
    name: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a stranger's word was followed")

    delta = Delta.load(files["one"])
    delta = Delta(delta.tensors, replace(delta.base, name=name), delta.result)
    for function in ("_from_hub", "gguf_checkpoint", "_tiny_checkpoint"):
        monkeypatch.setattr(resolve_module, function, refuse)
    with unchanged(tmp_path), pytest.raises(DeltaError, match=r"never fetched. Name its base \(`--base`\)"):
        compose_deltas(delta, delta, files["out"])
    made = compose_deltas(delta, delta, files["out"], base=open_checkpoint(files["base"]))
    assert made.base.name == name


def test_diff_counts_what_plain_torch_counts(files: Files, tmp_path: Path) -> None:
    base, first, second = (bits(files[name]) for name in ("base", "first", "second"))
    with unchanged(tmp_path):
        found = diff_deltas(files["one"], files["two"])
    assert sum(entry.shared for entry in found.values()) > 100
    for name, entry in found.items():
        one, two = first[name] != base[name], second[name] != base[name]
        same = one & two & (first[name] == second[name])
        expected = [int(marked.sum()) for marked in (one, two, one & two, same)]
        assert [entry.first, entry.second, entry.shared, entry.equal] == expected, name
    for entry in diff_deltas(files["one"], files["one"]).values():
        assert entry.first == entry.second == entry.shared == entry.equal
