"""Several methods on one recipe: equal data and steps, nothing trained twice, every figure that of its own run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.cli import main
from subnet_ft.comparison import compare
from subnet_ft.errors import MethodError, RecipeError, StageError
from subnet_ft.evidence.comparison import MethodComparison
from subnet_ft.masks import extract
from subnet_ft.pipeline import Pipeline, load_checked_recipe

METHODS = ["full", "subnet", "last_layers", "lora"]
SHORT = [
    "training.max_steps=4", "training.save_steps=2", "task.num_train=120", "task.num_eval=40",
    "subnet.source.tolerance=0.002", "methods.lora.training.learning_rate=5e-3", "methods.lora.config.r=4",
    "methods.last_layers.config.num_layers=1",
]  # fmt: skip


def pipeline(folder: Path, *overrides: str) -> Pipeline:
    return Pipeline(load_checked_recipe("tiny/grpo", [*SHORT, f"output={folder}", *overrides]))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MethodComparison]:
    folder = tmp_path_factory.mktemp("runs") / "compare"
    return folder, compare(pipeline(folder), METHODS, quantizations=["int8"])


def test_compare_trains_every_method_alike(compared: tuple[Path, MethodComparison]) -> None:
    folder, result = compared
    assert [entry.method for entry in result.methods] == METHODS
    assert [entry.num_steps for entry in result.methods] == [4] * 4
    first = [json.loads((folder / name / "log.json").read_text())[0] for name in METHODS]
    # Every method starts as the base and sees the same first batch, so its first rewards are the same.
    assert len({entry["reward"] for entry in first}) == 1
    assert len({entry["loss"] for entry in first}) == 1
    assert first[0]["learning_rate"] != first[3]["learning_rate"] == 5e-3


def test_compare_measures_each_method_by_its_own_run(compared: tuple[Path, MethodComparison]) -> None:
    folder, result = compared
    full, subnet, last_layers, lora = result.methods
    base = open_checkpoint("tiny:llama")
    assert full.num_trainable == full.num_parameters == sum(math.prod(spec.shape) for spec in base.specs.values())
    assert 0 < subnet.num_trainable < full.num_trainable
    assert last_layers.num_trainable == sum(
        math.prod(spec.shape) for name, spec in base.specs.items() if name.startswith("model.layers.1.")
    )
    adapter = load_file(folder / "lora" / "adapter_model.safetensors")
    assert lora.num_trainable == sum(tensor.numel() for tensor in adapter.values())
    assert lora.patch_bytes == lora.checkpoint_bytes == (folder / "lora" / "adapter_model.safetensors").stat().st_size
    assert lora.config == {"r": 4}
    for entry in (full, subnet, last_layers):
        changed = extract(base, folder / entry.method)
        bits = sum(-(-tensor.num_elements // 8) for tensor in changed.tensors.values() if tensor.count)
        assert entry.patch_bytes == bits + 2 * changed.num_trainable
        assert entry.checkpoint_bytes == (folder / entry.method / "model.safetensors").stat().st_size
    assert all(entry.step_seconds > 0 for entry in result.methods if entry.step_seconds is not None)
    assert subnet.memory["moments"] == 8 * subnet.num_trainable
    assert lora.memory["moments"] == 8 * lora.num_trainable


def test_compare_judges_quantized_copies_of_every_result(compared: tuple[Path, MethodComparison]) -> None:
    folder, result = compared
    assert [(copy.method, copy.quantization) for copy in result.quantized] == [(name, "int8") for name in METHODS]
    full, lora = result.quantized[0], result.quantized[3]
    assert full.checkpoint_bytes < result.methods[0].checkpoint_bytes
    assert (
        full.checkpoint_bytes < lora.checkpoint_bytes < full.checkpoint_bytes + 2 * result.methods[3].checkpoint_bytes
    )
    stored = json.loads((folder / "evaluation" / "lora-int8" / "records.json").read_text())
    assert lora.accuracy is not None
    assert lora.accuracy.correct == sum(record["correct"] for record in stored)


def test_compare_does_nothing_twice(compared: tuple[Path, MethodComparison], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = compared

    def fail(*args: Any, **keywords: Any) -> Any:
        raise AssertionError("a finished stage was repeated")

    for name in ("subnet_ft.pipeline.train", "subnet_ft.pipeline.judge", "subnet_ft.comparison.extract"):
        monkeypatch.setattr(name, fail)
    assert compare(pipeline(folder), METHODS, quantizations=["int8"]) == result


def test_compare_shares_its_stages_with_a_run(
    compared: tuple[Path, MethodComparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = compared
    trained: list[Path] = []
    monkeypatch.setattr("subnet_ft.pipeline.train", lambda *args, folder, **options: trained.append(folder) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline(folder).run()
    assert [path.name for path in trained] == ["control-uniform"]


def test_compare_refuses_another_rate_for_a_finished_method(compared: tuple[Path, MethodComparison]) -> None:
    folder, _ = compared
    with pytest.raises(StageError, match=r"`.*lora` was made with other settings: training.learning_rate"):
        compare(pipeline(folder, "methods.lora.training.learning_rate=1e-3"), ["lora"])
    # The other methods have other settings of their own, which changed nothing for them.
    compare(pipeline(folder, "methods.lora.training.learning_rate=1e-3"), ["full", "last_layers"])


def test_compare_knows_what_cannot_serve_the_model_before_it_trains(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="`tiny:llama` has no bias"):
        compare(pipeline(tmp_path / "run"), ["full", "bitfit"])
    assert not (tmp_path / "run" / "full").exists()


@pytest.mark.parametrize("name", ["full", "subnet"])
def test_recipe_has_one_setting_for_full_run_subnetwork_and_controls(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"methods.{name}: full run, subnetwork and controls share one setting"):
        pipeline(tmp_path, f"methods.{name}.training.learning_rate=1e-3")


def test_compare_refuses_what_an_older_version_trained(compared: tuple[Path, MethodComparison]) -> None:
    folder, _ = compared
    path = folder / "last_layers" / "stage.json"
    whole = path.read_text()
    stage = json.loads(whole)
    del stage["results"]["num_trainable"]
    path.write_text(json.dumps(stage))
    try:
        with pytest.raises(StageError, match="made by an older subnet-ft"):
            compare(pipeline(folder), ["last_layers"])
    finally:
        path.write_text(whole)


def test_compare_command_prints_the_keys_that_scripts_rely_on(
    compared: tuple[Path, MethodComparison], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = compared
    arguments = ["compare", "tiny/grpo", *SHORT, f"output={folder}", "--methods", "full,lora", "-q"]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"version", "num_prompts", "base_accuracy", "methods", "quantized", "output"} <= set(printed)
    assert [entry["method"] for entry in printed["methods"]] == ["full", "lora"]
    assert printed["methods"][1]["num_trainable"] == result.methods[3].num_trainable
    assert main(arguments) == 0
    assert "comparison.html" in capsys.readouterr().out
    assert {path.name for path in folder.glob("comparison.*")} == {
        "comparison.html", "comparison.md", "comparison.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "full,lroa"], "`lroa` is no method; did you mean `lora`?"),
        (["--methods", "full", "--quantized", "int9"], "`int9` is no quantization; did you mean `int8`?"),
        (["--methods", "full,full"], "`full` is listed twice"),
        (["--methods", "full,"], "names are separated by single commas"),
    ],
)
def test_compare_command_refuses_wrong_names(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["compare", "tiny/grpo", f"output={tmp_path / 'run'}", *words])
    except SystemExit as stopped:  # argparse's own refusals
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
