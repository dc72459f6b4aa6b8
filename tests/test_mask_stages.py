"""Masks that need no finished run: the probe is the beginning of the full run, and every source trains."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import same_bits
from safetensors.torch import load_file
from test_pipeline import recipe

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.errors import StageError, TrainerError
from subnet_ft.inputs import RunVariant
from subnet_ft.masks import SubnetMask
from subnet_ft.pipeline import Pipeline

PROBED = ("early", "forecast", "gradient", "fisher")
FROM_BASE = ("low_magnitude", "predicted", "principal", "non_principal", "uniform")


def source(kind: str) -> list[str]:
    fields = f"kind: {kind}"
    fields += ", steps: 2" if kind in PROBED else ""
    fields += ", criterion: absolute, tolerance: 0.0005" if kind == "early" else ", density: 0.3"
    return [f"subnet.source={{{fields}}}", "method=subnet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a full run of four steps whose checkpoints were kept, and the probe of two."""
    found = tmp_path_factory.mktemp("runs") / "grpo"
    pipeline = Pipeline(recipe("grpo", found, "keep_checkpoints=true", "evaluation.enabled=false"))
    pipeline.start()
    pipeline.full_run()
    pipeline.probe(RunVariant(stop_after=2))
    return found


def test_pipeline_probes_the_first_steps_of_the_full_run(folder: Path) -> None:
    """The schedule is that of the whole run, so the weights are those which it had at that step."""
    probe, then = (
        load_file(path / "model.safetensors") for path in (folder / "probe-2", folder / "full/trainer/checkpoint-2")
    )
    assert all(same_bits(probe[name], then[name]) for name in then)
    assert (folder / "probe-2" / "trainer" / "checkpoint-2" / "optimizer.pt").is_file()


def test_pipeline_resumes_a_probe_that_was_killed_after_its_last_save(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "grpo"
    shutil.copytree(folder / "probe-2", copy / "probe-2")
    (copy / "probe-2" / "stage.json").rename(copy / "probe-2" / "started.json")
    pipeline = Pipeline(recipe("grpo", copy, "evaluation.enabled=false"))
    pipeline.start()
    stage = pipeline.probe(RunVariant(stop_after=2))
    assert stage.results["num_steps"] == 2
    ours, theirs = (load_file(path / "probe-2" / "model.safetensors") for path in (copy, folder))
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)


def test_pipeline_refuses_a_probe_longer_than_training(tmp_path: Path) -> None:
    short = ["training.max_steps=-1", "training.num_train_epochs=1", "task.num_train=4", "evaluation.enabled=false"]
    pipeline = Pipeline(recipe("grpo", tmp_path / "run", *short))
    pipeline.start()
    with pytest.raises(TrainerError, match=r"Training ended after .* and its first 50 were asked for"):
        pipeline.probe(RunVariant(stop_after=50))


def test_pipeline_holds_a_probe_at_the_base_still(folder: Path) -> None:
    pipeline = Pipeline(recipe("grpo", folder, "evaluation.enabled=false"))
    pipeline.start()
    stage = pipeline.probe(RunVariant(stop_after=1, at_base=True))
    assert stage.folder.name == "probe-at-base-1"
    base = dict(open_checkpoint("tiny:llama").tensors())
    assert all(same_bits(weight, base[name]) for name, weight in open_checkpoint(stage.folder).tensors())


@pytest.mark.parametrize("kind", [*PROBED, *FROM_BASE])
def test_train_makes_the_mask_of_every_source_without_a_finished_run(kind: str, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / kind
    if kind in PROBED[:2]:
        shutil.copytree(folder / "probe-2", output / "probe-2")
    stage = Pipeline(recipe("grpo", output, "evaluation.enabled=false", *source(kind))).train()
    mask = SubnetMask.load(output / "mask.subnet.safetensors", base="tiny:llama")
    assert mask.provenance.source["kind"] == kind
    assert not (output / "full").exists()
    if kind != "early":
        assert mask.density == pytest.approx(0.3, abs=0.02)
    base = dict(open_checkpoint("tiny:llama").tensors())
    changed = 0
    for name, weight in open_checkpoint(stage.folder).tensors():
        assert same_bits(weight[~mask[name]], base[name][~mask[name]])
        changed += int((weight != base[name]).sum())
    assert changed > 0


def test_pipeline_refuses_a_mask_of_another_source_for_a_run_that_is_there(tmp_path: Path) -> None:
    output = tmp_path / "run"
    Pipeline(recipe("grpo", output, "evaluation.enabled=false", *source("uniform"))).train()
    with pytest.raises(StageError, match=r"source\.kind: was \"uniform\", is \"low_magnitude\""):
        Pipeline(recipe("grpo", output, "evaluation.enabled=false", *source("low_magnitude"))).train()


def test_pipeline_refuses_a_mask_of_first_steps_before_it_takes_them(tmp_path: Path) -> None:
    output = tmp_path / "run"
    Pipeline(recipe("grpo", output, "evaluation.enabled=false", *source("uniform"))).train()
    with pytest.raises(StageError, match=r"source\.kind: was \"uniform\", is \"early\""):
        Pipeline(recipe("grpo", output, "evaluation.enabled=false", *source("early"))).train()
    assert not (output / "probe-2").exists()


@pytest.mark.parametrize("kind", FROM_BASE)
def test_of_source_draws_with_the_seed_of_a_repeat_only_what_is_drawn(kind: str, tmp_path: Path) -> None:
    pipeline = Pipeline(recipe("grpo", tmp_path / "run", "evaluation.enabled=false", *source(kind)))
    spec = pipeline.recipe.subnet.source
    first = pipeline.masks.of_source(spec)
    repeat = pipeline.masks.of_source(spec, "seed-1/mask", user="seed-1/subnet", seed=1)
    assert (repeat != first) == (kind == "uniform")
    assert repeat.provenance.source.get("seed", 0) == (1 if kind == "uniform" else 0)


def test_pipeline_repeats_runs_with_other_seeds_on_the_same_data(tmp_path: Path) -> None:
    output = tmp_path / "run"
    repeats = ["repeats={seeds: [1], runs: all}", "controls=[uniform]", "evaluation.enabled=false"]
    pipeline = Pipeline(recipe("grpo", output, *repeats))
    pipeline.start()
    full, again = pipeline.full_run(), pipeline.repeat(1)
    assert set(again) == {"full", "subnet", "control-uniform"}
    weights = [dict(open_checkpoint(stage.folder).tensors()) for stage in (full, again["full"])]
    assert any(not same_bits(weights[0][name], weights[1][name]) for name in weights[0])
    assert again["subnet"].mask == SubnetMask.load(output / "seed-1" / "mask.subnet.safetensors", base="tiny:llama")
    inputs: list[dict[str, Any]] = [pipeline.inputs.of_training(None, "full", RunVariant(seed=s)) for s in (0, 1)]
    assert {key for key in inputs[0] if inputs[0][key] != inputs[1][key]} == {"seed"}
