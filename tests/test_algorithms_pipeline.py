"""Every algorithm trains in full, in a subnetwork and with an adapter: each test is a cell of `docs/algorithms.md`."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from feature_table import read_table
from helpers import same_bits
from peft import PeftModel
from safetensors.torch import load_file
from training.masked_runs import check_weights, same_weights, weights_of
from transformers import PreTrainedModel

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.checkpoints.models import load_model
from subnet_ft.masks import SubnetMask
from subnet_ft.methods.adapters import ADAPTER, adapter_mask, adapter_parameters, attach
from subnet_ft.methods.saved import load_trained
from subnet_ft.pipeline import Pipeline, load_checked_recipe
from subnet_ft.recipe import Recipe
from subnet_ft.stages import TrainedStage
from subnet_ft.training import ALGORITHMS, restrict

RECIPES = Path(__file__).parents[1] / "recipes" / "tiny"
METHODS = ("full", "subnet", "lora")
# Without it they have no reference model.
KL = {"grpo": "beta=0.04", "rloo": "beta=0.04", "ppo": "kl_coef=0.05"}
SHORT = [
    "training.max_steps=3", "task.num_train=60", "task.num_eval=0", "evaluation.enabled=false", "seed=1",
    "training.learning_rate=2e-3", "subnet.source.tolerance=0.004",
]  # fmt: skip


def recipe(name: str, output: Path, *overrides: str) -> Recipe:
    """Return the shipped tiny recipe with few steps on little data."""
    section = {"prompts": None, "demonstrations": None, "rationales": "rationales"}.get(
        ALGORITHMS[name].learns_from, "pairs"
    )
    own = [f"task.{section}.num_prompts=60"] if section else []
    own += [f"training.{KL[name]}"] if name in KL else []
    if ALGORITHMS[name].judge == "teacher":
        own += ["teacher.name=tiny:qwen3", "training.per_device_train_batch_size=16"]
    if section == "rationales":
        # Whatever a random teacher writes is a rationale and its last character the answer.
        found = ["answer_pattern='(.)$'", "rationale_pattern='(?s)(.+)'", "keep=all", "temperature=1.0"]
        own += ["teacher.name=tiny:qwen3", *(f"task.rationales.{one}" for one in found)]
    return load_checked_recipe(f"tiny/{name}", [*SHORT, *own, f"output={output}", *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what trains an algorithm once with every method, and keeps the trainers."""
    patch = pytest.MonkeyPatch()
    trainers: list[Any] = []

    def keep(trainer: Any, *args: Any, **options: Any) -> Any:
        trainers.append(trainer)
        return restrict(trainer, *args, **options)

    patch.setattr("subnet_ft.training.run.restrict", keep)

    @cache
    def run(name: str, method: str) -> tuple[Any, Any]:
        if method == "subnet":
            run(name, "full")
        stage = Pipeline(recipe(name, folder / name, f"method={method}")).train()
        return stage, trainers[-1]

    folder = tmp_path_factory.mktemp("runs")
    yield run
    patch.undo()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_train_with(name: str, method: str, trained: Any, record_property: Any) -> None:
    row, column = list(ALGORITHMS).index(name), METHODS.index(method)
    record_property("corner", "algorithm")
    record_property("cell", [row, name, column, method, len(ALGORITHMS) * len(METHODS)])
    stage, trainer = trained(name, method)
    assert stage.results["num_steps"] == 3
    own_base = stage.folder.parent / "base"  # of what adds a head to the model
    base = open_checkpoint(own_base if ALGORITHMS[name].model_kind == "reward_model" else "tiny:llama")
    if method == "lora":
        _check_adapter(trainer, base, stage, name)
    else:
        _check_weights(base, stage, method)
    losses = [entry["loss"] for entry in json.loads((stage.folder / "log.json").read_text())[:-1]]
    assert len(losses) == 3
    _check_references(name, trainer, stage.results["memory"], base)
    record_property("outcome", "yes")


def _check_weights(base: Checkpoint, stage: TrainedStage, method: str) -> None:
    """Outside the mask not a bit has moved, inside it most has."""
    tuned = load_file(stage.folder / "model.safetensors")
    assert tuned.keys() == base.specs.keys()
    mask = stage.mask or SubnetMask.full({key: tuple(spec.shape) for key, spec in base.specs.items()})
    moved = 0
    for key, weight in base.tensors():
        assert same_bits(tuned[key][~mask[key]], weight[~mask[key]])
        moved += int((tuned[key] != weight).sum())
    assert mask.density == 1.0 if method == "full" else 0.0 < mask.density < 0.9
    assert moved > 0.5 * mask.num_trainable


def _check_adapter(trainer: Any, base: Checkpoint, stage: TrainedStage, algorithm: str) -> None:
    """Under the adapter not a bit has moved, every tensor of it has, and it is saved as it ended."""
    kind = ALGORITHMS[algorithm].model_kind
    started, tokenizer = load_model(base.folder, dtype="bfloat16", kind=kind)
    start = attach(started, tokenizer, "lora", seed=trainer.args.seed)
    check_weights(trainer.model, adapter_mask(start), weights_of(start))
    saved, _ = load_trained(stage.folder, base.folder, dtype="bfloat16", kind=kind)
    same_weights(weights_of(saved), weights_of(trainer.model))
    assert stage.results["num_trainable"] == sum(p.numel() for p in adapter_parameters(start).values())


def _check_references(name: str, trainer: Any, memory: dict[str, int], base: Checkpoint) -> None:
    """Every model that the trainer holds beside its own is in the table, in the policy's dtype, and in the ledger.

    Under an adapter the reference is the policy's own base: no second model, no second adapter, and nothing counted.
    """
    references, is_adapter = ALGORITHMS[name].references, isinstance(trainer.model, PeftModel)
    others = {key for key, value in vars(trainer).items() if isinstance(value, (PreTrainedModel, PeftModel))}
    extras = getattr(trainer, "checkpoint_extras", dict)()
    judge = {"teacher_model"} if ALGORITHMS[name].judge == "teacher" else set()
    mine = {"model", "model_wrapped", "_own_model"}
    assert others - mine <= {*(() if is_adapter else references), *extras, *judge}
    assert judge <= others & set(memory)
    held = [getattr(trainer, key) for key in references if key in others]
    assert len(held) == (0 if is_adapter else len(references))
    assert not is_adapter or list(trainer.model.peft_config) == [ADAPTER]
    assert all(model.dtype == trainer.model.dtype for model in held)
    size = sum(weight.nbytes for _, weight in base.tensors())
    assert memory["weights"] >= size
    assert memory.get("reference_model", 0) == size * len(held)
    for key, part in extras.items():
        assert memory[key] > 0
        assert not hasattr(part, "parameters") or memory[key] >= size


def test_the_table_names_every_cell_with_its_outcome() -> None:
    page = Path(__file__).parents[1] / "docs" / "algorithms.md"
    expected = {(name, method): "yes" for name in ALGORITHMS for method in METHODS}
    assert read_table(page.read_text(encoding="utf-8")) == expected


def test_the_page_names_every_algorithm_with_its_trainer_and_data() -> None:
    page = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    found = {row[0].strip("| `"): (row[1].strip("`"), row[2]) for row in rows}
    expected = {name: (entry.trainer.rpartition(":")[2], entry.learns_from) for name, entry in ALGORITHMS.items()}
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in ("dpo", "grpo")])
def test_tiny_recipe_gives_the_report_of_its_head(name: str, tmp_path: Path) -> None:
    own = []
    if ALGORITHMS[name].has_teacher:
        explaining = ["task.completion=letter {target_letter} occurs {answer}", "training.max_steps=150"]
        more = explaining if ALGORITHMS[name].learns_from == "rationales" else []
        teacher = load_checked_recipe("tiny/sft", [f"output={tmp_path / 'teacher'}", "method=full", *more])
        own = [f"teacher.name={Pipeline(teacher).train().folder}"]
    report = Pipeline(load_checked_recipe(f"tiny/{name}", [f"output={tmp_path}", *own])).run()
    assert report.verdict == "recovered"
    head = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").partition("\nmodel:")[0]
    head = " ".join(line.lstrip("# ") for line in head.splitlines())
    numbers = re.findall(
        r"accuracy (\S+) \(base\), (\S+) \(full\), (\S+) \(subnetwork, density (\S+)\), "
        r"(\S+) \(matched control\), (\S+) \(uniform\)", head
    )  # fmt: skip
    (expected,) = [list(map(float, row)) for row in numbers]
    density = expected.pop(3)
    runs = ("base", "full", "subnet", "control-magnitude_matched", "control-uniform")
    # Numbers of one machine: on another one the draws may differ.
    assert expected == pytest.approx([report.accuracy[run].accuracy for run in runs], abs=0.1)
    assert density == pytest.approx(SubnetMask.load(tmp_path / "mask.subnet.safetensors").density, abs=0.05)
    assert [weights.off_mask_changed for weights in report.weights.values()] == [0, 0, 0]
    assert (tmp_path / "report.html").is_file()
