"""A reward run's base is one stored checkpoint: made once, replaced only while nothing has started from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from subnet_ft.base_stage import make_base
from subnet_ft.errors import StageError
from subnet_ft.inputs import RunInputs
from subnet_ft.pipeline import load_checked_recipe
from subnet_ft.recipe.methods import METHODS


def inputs_of(name: str, folder: Path, *overrides: str) -> RunInputs:
    return RunInputs(load_checked_recipe(f"tiny/{name}", [f"output={folder}", *overrides]))


def test_make_base_gives_the_same_checkpoint_from_one_seed(tmp_path: Path) -> None:
    digests = []
    for name, override in (("a", "seed=0"), ("b", "seed=0"), ("c", "seed=1"), ("d", "model.dtype=float32")):
        inputs = inputs_of("reward", tmp_path / name, override)
        make_base(inputs, tmp_path / name, overwrite=False)
        assert "score.weight" in inputs.base.specs
        digests.append(inputs.base_sha256)
    assert digests[0] == digests[1]
    assert len({digests[0], *digests[2:]}) == 3


def test_make_base_makes_nothing_where_the_model_is_the_base(tmp_path: Path) -> None:
    inputs = inputs_of("dpo", tmp_path)
    make_base(inputs, tmp_path, overwrite=False)
    assert not list(tmp_path.iterdir())
    assert inputs.base.folder == inputs.language_model.folder


@pytest.mark.parametrize("file", ["started.json", "stage.json"])
@pytest.mark.parametrize(
    "started", [*METHODS, "control-uniform", "probe-4", "seed-7/full", "seed-7/control-uniform", "seed-7/probe-4"]
)
def test_make_base_replaces_no_base_that_a_run_started_from(started: str, file: str, tmp_path: Path) -> None:
    make_base(inputs_of("reward", tmp_path), tmp_path, overwrite=False)
    make_base(inputs_of("reward", tmp_path, "seed=1"), tmp_path, overwrite=False)
    (tmp_path / started).mkdir(parents=True)
    (tmp_path / started / file).write_text("{}")
    before = inputs_of("reward", tmp_path).base_sha256
    with pytest.raises(StageError, match="seed: was 1, is 2"):
        make_base(inputs_of("reward", tmp_path, "seed=2"), tmp_path, overwrite=False)
    assert inputs_of("reward", tmp_path).base_sha256 == before
    make_base(inputs_of("reward", tmp_path, "seed=2"), tmp_path, overwrite=True)
    assert inputs_of("reward", tmp_path).base_sha256 != before


def test_make_base_notices_another_checkpoint_in_its_place(tmp_path: Path) -> None:
    make_base(inputs_of("reward", tmp_path), tmp_path, overwrite=False)
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace("0.02", "0.03"))
    with pytest.raises(StageError, match="not the one that this stage saved"):
        make_base(inputs_of("reward", tmp_path), tmp_path, overwrite=False)
