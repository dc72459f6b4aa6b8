from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from recipe_texts import DPO, GRPO, PREFERENCES, load_text, problems_of

from subnet_ft.errors import RecipeError
from subnet_ft.recipe import (
    DatasetSpec,
    EvaluationSpec,
    ModelSpec,
    PairsSpec,
    Recipe,
    SourceSpec,
    SubnetSpec,
    TaskSpec,
    load_recipe,
    recipe_to_dict,
    save_recipe,
)

ROOT = Path(__file__).resolve().parent.parent


def test_load_recipe_fills_the_dataclasses(tmp_path: Path) -> None:
    assert load_text(tmp_path, PREFERENCES) == Recipe(
        model=ModelSpec(name="tiny:llama", revision=None, dtype="bfloat16"),
        task=TaskSpec(name="dataset", dataset=DatasetSpec(path="some/preferences"), num_train=100),
        algorithm="dpo",
        training={},
        subnet=SubnetSpec(source=SourceSpec(kind="extract", criterion="exact", tolerance=0.0)),
        controls=["uniform", "magnitude_matched"],
        evaluation=EvaluationSpec(
            task=TaskSpec(name="dataset", dataset=DatasetSpec(path="openai/gsm8k", name="main"), num_eval=10)
        ),
        output="runs/x",
        seed=0,
        method="full",
        keep_checkpoints=False,
    )


def test_load_recipe_reports_every_problem_at_once(tmp_path: Path) -> None:
    text = GRPO.replace("learning_rate: 2e-5", "learning_rate: -1e-06") + "subnet: {sorce: {kind: extract}}\nsede: 3\n"
    with pytest.raises(RecipeError) as caught:
        load_text(tmp_path, text)
    assert str(caught.value).splitlines() == [
        f"Recipe `{tmp_path / 'recipe.yaml'}` has 3 problems:",
        "  sede: unknown key; did you mean `seed`?",
        "  subnet.sorce: unknown key; did you mean `source`?",
        "  training.learning_rate: must be >= 0, got -1e-06",
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("task.num_train=many", 'task.num_train: must be an integer, got "many"'),
        ("task.num_train=1.5", "task.num_train: must be an integer, got 1.5"),
        ("task.num_train=true", "task.num_train: must be an integer, got true"),
        ("task.num_train=-1", "task.num_train: must be >= 0, got -1"),
        ("task.chat=yes", 'task.chat: must be true or false, got "yes"'),
        ("task.rewards=correct", 'task.rewards: must be a list, got "correct"'),
        ("task.rewards=[1]", "task.rewards[0]: must be a string, got 1"),
        ("task.params=3", "task.params: must be a map of keys to values, got 3"),
        ("model=tiny:llama", 'model: must be a map of keys to values, got "tiny:llama"'),
        ("model.name=3", "model.name: must be a string, got 3"),
        ("model.revision=3", "model.revision: must be a string, got 3"),
        ("model.dtype=int8", 'model.dtype: must be one of bfloat16, float32, float16, got "int8"'),
        (
            "controls=[unifrom]",
            "controls[0]: must be one of uniform, magnitude_matched, inverted, layer_permuted, low_magnitude, "
            'principal, non_principal, got "unifrom"; did you mean `uniform`?',
        ),
        ("controls=[uniform, uniform]", "controls: `uniform` is listed 2 times; once is enough"),
        ("evaluation.margin=0", "evaluation.margin: must be > 0 and < 1, got 0"),
        ("evaluation.margin=1", "evaluation.margin: must be > 0 and < 1, got 1"),
        ("evaluation.margin=.nan", "evaluation.margin: must be > 0 and < 1, got NaN"),
        ("evaluation.confidence=0.5", "evaluation.confidence: must be > 0.5 and < 1, got 0.5"),
        ("evaluation.batch_size=0", "evaluation.batch_size: must be >= 1, got 0"),
        ("evaluation=", "evaluation: must be a map of keys to values, got null"),
        ("subnet.source.tolerance=-0.1", "subnet.source.tolerance: must be >= 0, got -0.1"),
        ("seed=-1", "seed: must be >= 0, got -1"),
        ("output=' '", 'output: must name a folder, got " "'),
        ("method=3", "method: must be a string, got 3"),
        ("algorithm=grop", 'algorithm: unknown, got "grop"; did you mean `grpo`?'),
        (
            "algorithm=xyz",
            'algorithm: unknown, got "xyz"; '
            "known: dpo, kto, orpo, simpo, grpo, rloo, ppo, prime, distillation, sft, raft, distilling_step_by_step, "
            "reward",
        ),
        ("subnet.source.a=1", "subnet.source.a: unknown key; known: kind, criterion, tolerance, path, steps, density"),
        (
            "task.name=reasoning-gym/chain_sum",
            'task.name: must be `reasoning_gym/DATASET` or `dataset`, got "reasoning-gym/chain_sum"; '
            "did you mean `reasoning_gym/chain_sum`?",
        ),
    ],
)
def test_load_recipe_names_the_value_and_what_was_expected(tmp_path: Path, override: str, problem: str) -> None:
    assert problems_of(tmp_path, GRPO, override) == [problem]


@pytest.mark.parametrize("key", ["model", "task", "algorithm", "output", "model.name", "task.name"])
def test_load_recipe_reports_a_missing_key(tmp_path: Path, key: str) -> None:
    tree = yaml.safe_load(GRPO)
    *sections, name = key.split(".")
    section = tree[sections[0]] if sections else tree
    del section[name]
    assert problems_of(tmp_path, yaml.safe_dump(tree)) == [f"{key}: missing, and required"]


def test_load_recipe_reads_yaml_1_2_scalars(tmp_path: Path) -> None:
    params = "{a: 2e-5, b: 1E3, c: 010, d: on, e: 1:30, f: .5, g: '2e-5', h: 2026-01-02, i: null, j: ~, k: true}"
    assert load_text(tmp_path, GRPO, f"task.params={params}").task.params == {
        "a": 2e-5,
        "b": 1000.0,
        "c": 10,
        "d": "on",
        "e": "1:30",
        "f": 0.5,
        "g": "2e-5",
        "h": "2026-01-02",
        "i": None,
        "j": None,
        "k": True,
    }


def test_load_recipe_reports_duplicate_keys_with_their_lines(tmp_path: Path) -> None:
    text = "seed: 1\n" + GRPO + "seed: 2\nevaluation:\n  margin: 0.1\n  margin: 0.2\n  batch_sise: 3\n"
    assert problems_of(tmp_path, text) == [
        "seed: set 2 times, on lines 1 and 8; keep one",
        "evaluation.margin: set 2 times, on lines 10 and 11; keep one",
        "evaluation.batch_sise: unknown key; did you mean `batch_size`?",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the file is empty; see `recipes/README.md` for examples"),
        ("- a\n", 'must be a map of keys to values, got ["a"]'),
        ("a: [1\nb: 2\n", "line 2, column 2: not valid YAML, expected ',' or ']', but got ':'"),
    ],
)
def test_load_recipe_reports_a_file_that_is_no_recipe(tmp_path: Path, text: str, problem: str) -> None:
    assert problems_of(tmp_path, text) == [problem]


def test_load_recipe_refuses_yaml_that_builds_objects(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, GRPO + "x: !!python/object/apply:os.getcwd []\n")
    assert "not valid YAML, could not determine a constructor" in problem


def test_load_recipe_applies_overrides_in_order(tmp_path: Path) -> None:
    recipe = load_text(
        tmp_path,
        GRPO,
        "training.learning_rate=1e-3",
        "training.learning_rate=3e-4",
        "training.new_field=1",
        "controls=[]",
        "evaluation.margin=0.1",
        "task.prompt=a = {expression}",
        "task.params={min_terms: 2}",
    )
    assert recipe.training == {"learning_rate": 3e-4, "max_completion_length": 4, "new_field": 1}
    assert recipe.controls == []
    assert recipe.evaluation.margin == 0.1
    assert recipe.task.prompt == "a = {expression}"
    assert recipe.task.params == {"min_terms": 2}


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("trainin.learning_rate=1", "trainin: unknown key; did you mean `training`?"),
        ("evaluation.margn=0.1", "evaluation.margn: unknown key; did you mean `margin`?"),
        ("learning_rate", "override `learning_rate`: must be `key=value`, such as `training.learning_rate=1e-6`"),
        ("a..b=1", "override `a..b=1`: must be `key=value`, such as `training.learning_rate=1e-6`"),
        ("output.x=1", 'override `output.x=1`: `output` is "runs/x", which has no keys; set it as a whole'),
        (
            "controls=[",
            "override `controls=[`: line 1, column 2: not valid YAML, expected the node content, "
            "but found '<stream end>'",
        ),
    ],
)
def test_load_recipe_checks_overrides_like_the_file(tmp_path: Path, override: str, problem: str) -> None:
    assert problems_of(tmp_path, GRPO, override) == [problem]


def test_load_recipe_overrides_one_of_two_aliased_sections(tmp_path: Path) -> None:
    text = GRPO.replace("task: {", "task: &task {") + "evaluation: {task: *task}\n"
    recipe = load_text(tmp_path, text, "evaluation.task.num_eval=77")
    assert recipe.evaluation.task is not None
    assert (recipe.task.num_eval, recipe.evaluation.task.num_eval) == (10, 77)


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (GRPO, [], 4),
        (DPO, [], 7),
        (PREFERENCES, [], 256),
        (GRPO, ["evaluation.max_new_tokens=9"], 9),
    ],
)
def test_load_recipe_evaluates_with_as_many_tokens_as_training(
    tmp_path: Path, text: str, overrides: list[str], expected: int
) -> None:
    assert load_text(tmp_path, text, *overrides).evaluation.max_new_tokens == expected


def test_load_recipe_warns_that_float32_makes_an_exact_mask_dense(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_text(tmp_path, GRPO)
    assert not caplog.records
    load_text(tmp_path, GRPO, "model.dtype=float32")
    assert "nearly dense" in caplog.text


def test_load_recipe_reports_a_folder_and_a_file_that_is_not_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path)
    (tmp_path / "mask.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "mask.yaml")


@pytest.mark.parametrize("text", [GRPO, DPO, PREFERENCES])
def test_save_recipe_keeps_everything(tmp_path: Path, text: str) -> None:
    awkward = ["task.params={a: '2e-5', b: 'yes', c: 'null', d: '010', e: '', f: 2e-5, g: 1.0}"]
    overrides = ['task.prompt="5 + 9 = 14\\n{x} ="', "seed=7", "keep_checkpoints=true"]
    recipe = load_text(tmp_path, text, *overrides, *(awkward if text != PREFERENCES else []))
    save_recipe(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_recipe_to_dict_spells_out_every_default(tmp_path: Path) -> None:
    tree = recipe_to_dict(load_text(tmp_path, DPO))
    assert tree["task"]["pairs"] == {
        "num_prompts": 50,
        "num_samples": PairsSpec(num_prompts=1).num_samples,
        "temperature": 0.8,
        "max_new_tokens": 7,
        "batch_size": 64,
        "max_right": None,
    }
    assert tree["subnet"]["optimizer"] == {
        "name": "adamw",
        "master": "fp32",
        "clip_norm": "masked",
        "nonfinite": "raise",
    }


def test_import_of_recipe_needs_no_torch() -> None:
    code = "import sys, subnet_ft.recipe; sys.exit(bool({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
