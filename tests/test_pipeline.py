"""The main job on a tiny model: every stage, nothing twice, resumed to the same bits, refused when it must be."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from old_versions import needs_trl_1_16
from safetensors.torch import load_file

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.deltas import DeltaFile, apply_delta
from subnet_ft.errors import MaskFileError, MaskMismatchError, StageError, TrainerError
from subnet_ft.masks import SubnetMask, control_mask, extract
from subnet_ft.optim import MaskedAdamW
from subnet_ft.pipeline import Pipeline, load_checked_recipe
from subnet_ft.recipe import Recipe
from subnet_ft.training.delta_checkpoints import DELTA
from subnet_ft.verification import has_failed, verify

SHORT = [
    "training.max_steps=4", "training.save_steps=2", "task.num_train=120", "task.num_eval=40",
    "subnet.source.tolerance=0.002",
]  # fmt: skip
STAGES = ["full", "subnet", "control-uniform", "control-magnitude_matched"]


def recipe(algorithm: str, output: Path, *overrides: str) -> Recipe:
    pairs = ["task.pairs.num_prompts=60", "task.num_train=60"] if algorithm == "dpo" else []
    return load_checked_recipe(f"tiny/{algorithm}", [*SHORT, *pairs, f"output={output}", *overrides])


@pytest.fixture(scope="module")
def grpo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "grpo"
    Pipeline(recipe("grpo", folder)).run()
    return folder


@pytest.fixture(scope="module")
def dpo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dpo"
    Pipeline(recipe("dpo", folder)).run()
    return folder


def _stop_at_step(patch: pytest.MonkeyPatch, number: int) -> None:
    """Interrupt training in its optimizer step of that number."""
    step, calls = MaskedAdamW.step, []

    def interrupted(self: MaskedAdamW, closure: Any = None) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return step(self, closure)

    patch.setattr(MaskedAdamW, "step", interrupted)


def _assert_same_full_run(folder: Path, other: Path) -> None:
    ours, theirs = (load_file(run / "full" / "model.safetensors") for run in (folder, other))
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)


def _results(run: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((run / "subnet" / "stage.json").read_text())["results"]
    return results


@pytest.fixture(params=["grpo", "dpo"])
def run_folder(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{request.param}_run")
    return folder


def test_pipeline_leaves_what_the_design_names(run_folder: Path) -> None:
    for stage in STAGES:
        names = {path.name for path in (run_folder / stage).iterdir()}
        assert {
            "model.safetensors", "config.json", "tokenizer.json", "log.json", "recipe.resolved.yaml", "stage.json",
        } <= names  # fmt: skip
        assert not list((run_folder / stage / "trainer").glob("checkpoint-*"))
    files = {path.name for path in run_folder.iterdir() if path.is_file()}
    assert {
        "recipe.resolved.yaml", "environment.json", "mask.subnet.safetensors", "control-uniform.subnet.safetensors",
        "subnet.delta.safetensors", "report.html", "report.md", "report.json",
    } <= files  # fmt: skip


def test_pipeline_changes_no_weight_outside_any_mask(run_folder: Path) -> None:
    report = json.loads((run_folder / "report.json").read_text())
    assert {name: report["weights"][name]["off_mask_changed"] for name in STAGES[1:]} == dict.fromkeys(STAGES[1:], 0)
    base = open_checkpoint("tiny:llama")
    for stage, mask_file in [
        ("subnet", "mask.subnet.safetensors"),
        ("control-uniform", "control-uniform.subnet.safetensors"),
        ("control-magnitude_matched", "control-magnitude_matched.subnet.safetensors"),
    ]:
        mask, tuned = SubnetMask.load(run_folder / mask_file, base=base), open_checkpoint(run_folder / stage)
        for name, weight in base.tensors():
            assert same_bits(tuned.tensor(name)[~mask[name]], weight[~mask[name]])


def test_pipeline_extracts_the_mask_of_its_own_full_run(run_folder: Path) -> None:
    mask = SubnetMask.load(run_folder / "mask.subnet.safetensors")
    source = Pipeline(recipe("grpo" if run_folder.name == "grpo" else "dpo", run_folder)).recipe.subnet.source
    again = extract("tiny:llama", run_folder / "full", criterion=source.criterion, tolerance=source.tolerance)
    assert mask == again
    assert 0.0 < mask.density < 1.0


def test_pipeline_does_nothing_twice(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a finished stage was repeated")

    for name in ("pipeline.train", "pipeline.judge", "mask_stages.extract"):
        monkeypatch.setattr(f"subnet_ft.{name}", never)
    monkeypatch.setattr("subnet_ft.training_data.build_once", never)
    before = (run_folder / "full" / "stage.json").read_text()
    Pipeline(recipe(run_folder.name, run_folder)).run()
    assert (run_folder / "full" / "stage.json").read_text() == before


def test_pipeline_refuses_a_folder_of_other_settings(grpo_run: Path) -> None:
    with pytest.raises(StageError, match=r"training\.learning_rate: was 0\.001, is 0\.5"):
        Pipeline(recipe("grpo", grpo_run, "training.learning_rate=0.5")).run()


def test_pipeline_judges_again_when_only_the_evaluation_changed(grpo_run: Path) -> None:
    before = (grpo_run / "full" / "stage.json").read_text()
    report = Pipeline(recipe("grpo", grpo_run, "evaluation.max_new_tokens=1", "evaluation.margin=0.3")).run()
    assert (report.num_prompts, report.margin) == (40, 0.3)
    assert (grpo_run / "full" / "stage.json").read_text() == before
    Pipeline(recipe("grpo", grpo_run)).run()


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_pipeline_resumes_an_interrupted_run_to_the_same_bits(
    algorithm: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted: Path = request.getfixturevalue(f"{algorithm}_run")
    with monkeypatch.context() as patch:
        _stop_at_step(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            Pipeline(recipe(algorithm, tmp_path / "run")).run()
    assert (tmp_path / "run" / "full" / "trainer" / "checkpoint-2").is_dir()
    resumed = Pipeline(recipe(algorithm, tmp_path / "run", "method=full")).train()
    assert resumed.results["resumed_from"] == "checkpoint-2"
    _assert_same_full_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("grpo", ["subnet.optimizer.master=remainder"]),
        pytest.param(
            "dpo",
            ["reference.source=policy"],
            marks=needs_trl_1_16("the reference model has its buffers in bfloat16"),
        ),
    ],
)
def test_pipeline_resumes_from_checkpoints_that_hold_a_delta_to_the_same_bits(
    algorithm: str, options: list[str], request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside dense ones of the full run, and with a mask that leaves most weights out."""
    finished: Path = request.getfixturevalue(f"{algorithm}_run")
    mask = control_mask(SubnetMask.load(finished / "mask.subnet.safetensors"), "uniform", seed=3)
    assert 0 < mask.density < 1
    source = f"subnet.source={{kind: file, path: {mask.save(tmp_path / 'm.subnet.safetensors')}}}"
    method = ["method=subnet", source, "training.save_steps=1", *options]
    straight = Pipeline(recipe(algorithm, tmp_path / "straight", *method)).train()
    delta, run = ["subnet.save_only_delta=true", "subnet.save_total_bytes=1"], tmp_path / "run"
    with monkeypatch.context() as patch:
        _stop_at_step(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            Pipeline(recipe(algorithm, run, *method, *delta)).train()
    (checkpoint,) = (run / "subnet" / "trainer").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-3"
    assert [path.name for path in checkpoint.glob("*.safetensors")] == [DELTA]
    resumed = Pipeline(recipe(algorithm, run, *method, *delta)).train()
    assert resumed.results["resumed_from"] == "checkpoint-3"
    assert resumed.results["sha256"] == straight.results["sha256"]
    assert resumed.results["delta"]["density"] == straight.results["delta"]["density"]


def test_train_in_full_and_of_adapters_keeps_dense_checkpoints_under_save_only_delta(tmp_path: Path) -> None:
    options = ["subnet.save_only_delta=true", "keep_checkpoints=true", "training.max_steps=2", "training.save_steps=1"]
    with_buffers = ["model.name=tiny:deepseek_v3", "methods.lora.config.target_modules=[o_proj]"]
    for method, model, file in (
        ("full", [], "model.safetensors"),
        ("lora", with_buffers, "adapter_model.safetensors"),
    ):
        stage = Pipeline(recipe("dpo", tmp_path / method, *options, *model, f"method={method}")).train()
        assert [path.name for path in (stage.folder / "trainer" / "checkpoint-1").glob("*.safetensors")] == [file]


def test_train_refuses_save_only_delta_before_the_full_run_where_the_subnetwork_run_would(tmp_path: Path) -> None:
    options = ["model.name=tiny:deepseek_v3", "subnet.save_only_delta=true", "method=full"]
    with pytest.raises(TrainerError, match=r"the model saves \d other tensors: .*e_score_correction_bias"):
        Pipeline(recipe("dpo", tmp_path / "run", *options)).train()
    assert not (tmp_path / "run" / "full" / "trainer").exists()


@pytest.mark.parametrize("algorithm", ["reward", "distilling_step_by_step"])
def test_pipeline_resumes_an_algorithm_with_data_of_its_own_to_the_same_bits(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = "pairs" if algorithm == "reward" else "rationales"
    options = ["method=full", f"task.{section}.num_prompts=60"]
    if section == "rationales":
        # Whatever a random teacher writes is a rationale, and its last character the answer.
        own = {"answer_pattern": "'(.)$'", "rationale_pattern": "'(?s)(.+)'", "keep": "all", "temperature": "1.0"}
        options += ["teacher.name=tiny:qwen3", *(f"task.rationales.{name}={value}" for name, value in own.items())]
    Pipeline(recipe(algorithm, tmp_path / "straight", *options)).train()
    with monkeypatch.context() as patch:
        _stop_at_step(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            Pipeline(recipe(algorithm, tmp_path / "run", *options)).train()
    resumed = Pipeline(recipe(algorithm, tmp_path / "run", *options)).train()
    assert resumed.results["resumed_from"] == "checkpoint-2"
    _assert_same_full_run(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("broken", ["optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_pipeline_never_resumes_from_a_broken_checkpoint(
    broken: str, grpo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _stop_at_step(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            Pipeline(recipe("grpo", tmp_path / "run", "training.save_steps=1", "training.save_total_limit=9")).run()
    (tmp_path / "run" / "full" / "trainer" / "checkpoint-3" / broken).unlink()
    resumed = Pipeline(recipe("grpo", tmp_path / "run", "method=full")).train()
    assert resumed.results["resumed_from"] == "checkpoint-2"
    _assert_same_full_run(tmp_path / "run", grpo_run)


def test_pipeline_does_not_train_on_when_it_was_killed_after_the_last_step(
    grpo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("subnet_ft.training.run.save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            Pipeline(recipe("grpo", tmp_path / "run")).run()
    resumed = Pipeline(recipe("grpo", tmp_path / "run", "method=full")).train()
    assert (resumed.results["resumed_from"], resumed.results["num_steps"]) == ("checkpoint-2", 4)
    _assert_same_full_run(tmp_path / "run", grpo_run)


def test_pipeline_resumes_in_a_later_epoch_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four prompts a step and ten in all: two steps an epoch, each epoch in an order of its own.
    options = ["method=full", "task.num_train=10", "training.max_steps=7", "training.save_steps=5"]
    options += ["training.learning_rate=0.01", "task.rewards=[score, 'random_rewards:by_prompt']"]
    (tmp_path / "random_rewards.py").write_text(
        "import zlib\n\n\ndef by_prompt(prompts, completions, **kwargs):\n"
        "    return [zlib.crc32((p + c).encode()) / 2**32 for p, c in zip(prompts, completions)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    Pipeline(recipe("grpo", tmp_path / "whole", *options)).train()
    with monkeypatch.context() as patch:
        _stop_at_step(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            Pipeline(recipe("grpo", tmp_path / "run", *options)).train()
    resumed = Pipeline(recipe("grpo", tmp_path / "run", *options)).train()
    assert resumed.results["resumed_from"] == "checkpoint-5"
    logs = [json.loads((tmp_path / name / "full" / "log.json").read_text()) for name in ("run", "whole")]
    assert [entry["reward"] for entry in logs[0][:-1]] == [entry["reward"] for entry in logs[1][:-1]]
    _assert_same_full_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.beta=0.5", r"training\.beta: was 0\.0, is 0\.5"),
        ("subnet.source.tolerance=0.001", r"source\.tolerance: was 0\.002, is 0\.001"),
    ],
)
def test_pipeline_leaves_everything_alone_when_it_refuses(grpo_run: Path, override: str, message: str) -> None:
    files = [grpo_run / name for name in ("recipe.resolved.yaml", "environment.json", "mask.subnet.safetensors")]
    before = [path.read_bytes() for path in files]
    with pytest.raises(StageError, match=message):
        Pipeline(recipe("grpo", grpo_run, override)).run()
    assert [path.read_bytes() for path in files] == before


def test_train_of_a_subnetwork_checks_the_full_run_first(grpo_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(grpo_run, copy)
    shutil.rmtree(copy / "mask")
    path = copy / "full" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(StageError, match="is not the one that this stage saved"):
        Pipeline(recipe("grpo", copy, "method=subnet")).train()


def test_pipeline_notices_changed_samples(dpo_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(dpo_run, copy)
    path = copy / "samples" / "samples.json"
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))
    with pytest.raises(StageError, match="rows: was"):
        Pipeline(recipe("dpo", copy)).run()


def test_pipeline_notices_changed_data_and_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} is ", "answer": str(i % 10)}) + "\n" for i in range(40)))
    reward = tmp_path / "my_rewards.py"
    reward.write_text("def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = [
        f"task={{name: dataset, dataset: {{path: {rows}, eval_split: train}}, num_train: 20, num_eval: 10, "
        "rewards: ['my_rewards:length']}",
        "training.max_steps=1", "method=full",
    ]  # fmt: skip

    def train_again() -> None:
        Pipeline(load_checked_recipe("tiny/grpo", [f"output={tmp_path / 'run'}", *options])).train()

    train_again()
    train_again()
    text = rows.read_text()
    rows.write_text(text.replace("is", "was"))
    with pytest.raises(StageError, match="data: was"):
        train_again()
    rows.write_text(text)
    reward.write_text(reward.read_text() + "# changed\n")
    with pytest.raises(StageError, match=r"rewards\.my_rewards:length: was"):
        train_again()


def test_pipeline_compares_in_the_dtype_of_the_recipe(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", dtype=torch.float32)
    report = Pipeline(recipe("grpo", tmp_path / "run", f"model.name={base}", "evaluation.enabled=false")).run()
    assert report.verdict == "not_assessed"
    assert [weights.off_mask_changed for weights in report.weights.values()] == [0, 0, 0]
    mask = SubnetMask.load(tmp_path / "run" / "mask.subnet.safetensors", base=base)
    assert mask.provenance.compare_dtype == "bfloat16"
    assert mask.provenance.base is not None
    assert mask.provenance.base.name == str(base)
    assert report.delta is None
    assert " ".join(report.not_measured).count("is float32 in the base") == 1


def test_pipeline_keeps_the_subnetwork_as_a_delta_too(run_folder: Path, tmp_path: Path) -> None:
    file, results = run_folder / "subnet.delta.safetensors", _results(run_folder)
    report = json.loads((run_folder / "report.json").read_text())
    assert report["delta"] == results["delta"]
    assert results["delta"]["bytes"] == file.stat().st_size
    assert results["delta"]["density"] == report["density"]["overall"]
    shutil.copytree(open_checkpoint("tiny:llama").folder, tmp_path / "base")
    made = load_file(apply_delta(tmp_path / "base", file, tmp_path / "made") / "model.safetensors")
    trained = load_file(run_folder / "subnet" / "model.safetensors")
    assert made.keys() == trained.keys()
    assert all(same_bits(made[name], trained[name]) for name in trained)


def test_pipeline_adds_a_delta_to_a_run_from_before_there_were_any(
    grpo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(grpo_run, tmp_path / "run")
    stage, whole = json.loads((run / "subnet" / "stage.json").read_text()), _results(run)
    del stage["results"]["delta"]
    (run / "subnet" / "stage.json").write_text(json.dumps(stage))
    (run / "subnet.delta.safetensors").unlink()
    monkeypatch.setattr("subnet_ft.pipeline.train", None)
    Pipeline(recipe("grpo", run)).run()
    for name in ("density", "dense_bytes"):
        assert _results(run)["delta"][name] == whole["delta"][name]
    assert _results(run)["sha256"] == whole["sha256"]
    assert DeltaFile(run / "subnet.delta.safetensors").sha256 == _results(run)["delta"]["sha256"]


def test_pipeline_leaves_no_delta_of_an_older_run_beside_one_in_training(
    grpo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(grpo_run, tmp_path / "run")
    old, trained = (run / "subnet.delta.safetensors").read_bytes(), _results(run)["sha256"]
    # The full run takes four steps.
    other = recipe("grpo", run, "training.learning_rate=0.002", "controls=[]")
    with monkeypatch.context() as patch:
        _stop_at_step(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            Pipeline(other, overwrite=True).run()
    assert (run / "subnet" / "started.json").exists()
    assert not (run / "subnet.delta.safetensors").exists()
    Pipeline(other, overwrite=True).run()
    assert _results(run)["sha256"] != trained
    assert (run / "subnet.delta.safetensors").read_bytes() != old


def test_train_of_a_subnetwork_leaves_its_delta_and_that_of_the_full_run_none(grpo_run: Path, tmp_path: Path) -> None:
    source = f"subnet.source={{kind: file, path: {grpo_run / 'mask.subnet.safetensors'}}}"
    stage = Pipeline(recipe("grpo", tmp_path / "run", source, "method=subnet")).train()
    assert stage.results["delta"]["density"] == _results(grpo_run)["delta"]["density"]
    Pipeline(recipe("grpo", tmp_path / "run", source, "method=full")).train()
    assert [path.name for path in (tmp_path / "run").glob("*.delta.safetensors")] == ["subnet.delta.safetensors"]


def test_pipeline_knows_what_is_missing_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("trained although the mask file is missing")

    monkeypatch.setattr("subnet_ft.pipeline.train", never)
    source = f"subnet.source={{kind: file, path: {tmp_path / 'no.subnet.safetensors'}}}"
    with pytest.raises(MaskFileError, match="no mask file"):
        Pipeline(recipe("grpo", tmp_path / "run", source)).run()


def test_train_of_a_subnetwork_extracts_from_the_full_run_before_it(grpo_run: Path, tmp_path: Path) -> None:
    Pipeline(recipe("grpo", tmp_path / "run", "method=full")).train()
    stage = Pipeline(recipe("grpo", tmp_path / "run", "method=subnet")).train()
    ours, theirs = (load_file(folder / "subnet" / "model.safetensors") for folder in (stage.folder.parent, grpo_run))
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)


def test_pipeline_notices_a_checkpoint_that_somebody_changed(grpo_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(grpo_run, copy)
    path = copy / "full" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StageError, match="is not the one that this stage saved"):
        Pipeline(recipe("grpo", copy)).run()


def test_pipeline_says_when_the_full_run_changed_nothing(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"changed no weight by the criterion `absolute` with tolerance 0\.5"):
        Pipeline(recipe("grpo", tmp_path / "run", "training.max_steps=1", "subnet.source.tolerance=0.5")).run()


def test_train_of_a_subnetwork_needs_a_mask(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="holds no finished one"):
        Pipeline(recipe("grpo", tmp_path / "run", "method=subnet")).train()


def test_train_of_a_subnetwork_takes_a_mask_file(grpo_run: Path, tmp_path: Path) -> None:
    source = f"subnet.source={{kind: file, path: {grpo_run / 'mask.subnet.safetensors'}}}"
    stage = Pipeline(recipe("grpo", tmp_path / "run", "method=subnet", source)).train()
    ours, theirs = (load_file(folder / "subnet" / "model.safetensors") for folder in (tmp_path / "run", grpo_run))
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)
    assert stage.results["memory"]["moments"] == 8 * SubnetMask.load(grpo_run / "mask.subnet.safetensors").num_trainable


def test_train_keeps_the_logs_of_report_to(tmp_path: Path) -> None:
    overrides = ["training.report_to=tensorboard", "training.max_steps=1", "method=full"]
    stage = Pipeline(recipe("grpo", tmp_path / "run", *overrides)).train()
    assert list(stage.folder.glob("trainer/runs/*/events.out.tfevents.*"))


def test_train_keeps_checkpoints_when_asked_to(tmp_path: Path) -> None:
    overrides = ["keep_checkpoints=true", "training.max_steps=3", "method=full"]
    stage = Pipeline(recipe("grpo", tmp_path / "run", *overrides)).train()
    assert [path.name for path in stage.folder.glob("trainer/checkpoint-*")] == ["checkpoint-2"]


def test_train_refuses_a_mask_of_another_base(grpo_run: Path, tmp_path: Path) -> None:
    source = f"subnet.source={{kind: file, path: {grpo_run / 'mask.subnet.safetensors'}}}"
    with pytest.raises(MaskMismatchError):
        Pipeline(recipe("grpo", tmp_path / "run", "method=subnet", source, "model.name=tiny:qwen3")).train()


def test_verify_agrees_with_the_pipeline(grpo_run: Path, tmp_path: Path) -> None:
    report = json.loads((grpo_run / "report.json").read_text())
    models = ["tiny:llama", str(grpo_run / "full"), str(grpo_run / "subnet")]
    again = verify(
        *models, grpo_run / "mask.subnet.safetensors", recipe=recipe("grpo", tmp_path), output=tmp_path / "r"
    )
    assert again.verdict == report["verdict"]
    assert {n: a.accuracy for n, a in again.accuracy.items()} == {
        name: report["accuracy"][name]["accuracy"] for name in ("base", "full", "subnet")
    }
    assert again.weights["subnet"].identical == report["weights"]["subnet"]["identical"]
    assert (tmp_path / "r" / "report.html").is_file()


def test_verify_fails_when_a_weight_outside_the_mask_changed(grpo_run: Path) -> None:
    paths = ["tiny:llama", str(grpo_run / "full"), str(grpo_run / "full"), grpo_run / "mask.subnet.safetensors"]
    report = verify(*paths)  # type: ignore[arg-type]
    changed = report.weights["subnet"].off_mask_changed
    mask, base, full = SubnetMask.load(paths[3]), open_checkpoint(paths[0]), open_checkpoint(paths[1])
    expected = sum(int(((base.tensor(n) != full.tensor(n)) & ~mask[n]).sum()) for n in mask.names)
    assert changed == expected > 0
    assert report.verdict == "not_assessed"
    assert has_failed(report)
    assert not has_failed(dataclasses.replace(report, weights={}))


def test_full_and_subnet_runs_see_the_same_first_batch(grpo_run: Path) -> None:
    logs = [json.loads((grpo_run / stage / "log.json").read_text())[0] for stage in STAGES]
    assert len({(log["reward"], log["entropy"]) for log in logs}) == 1
    assert torch.tensor([log["grad_norm"] for log in logs]).argmax() == 0
