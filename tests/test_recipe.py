from __future__ import annotations

import re
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml

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
    shipped_recipes,
)

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"

GRPO = """
model: {name: tiny:llama}
task: {name: reasoning_gym/chain_sum, num_train: 100, num_eval: 10}
algorithm: grpo
training: {learning_rate: 2e-5, max_completion_length: 4}
output: runs/x
"""
DPO = """
model: {name: tiny:llama}
task: {name: reasoning_gym/chain_sum, num_train: 100, num_eval: 10, pairs: {num_prompts: 50, max_new_tokens: 7}}
algorithm: dpo
output: runs/x
"""
PREFERENCES = """
model: {name: tiny:llama}
task: {name: dataset, dataset: {path: some/preferences}, num_train: 100}
algorithm: dpo
evaluation:
  task: {name: dataset, dataset: {path: openai/gsm8k, name: main}, num_eval: 10}
output: runs/x
"""


class Scheduler(str, Enum):
    LINEAR = "linear"
    CONSTANT = "constant"


ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {
        "learning_rate": float,
        "max_completion_length": int | None,
        "num_generations": 8,
        "lr_scheduler_type": Scheduler | str,
        "report_to": str | list[str] | None,
        "top_k": None,
        "use_vllm": bool,
        "loss_type": "dapo",
    },
    "dpo": {"beta": float},
}


def _load(folder: Path, text: str, *overrides: str, algorithms: Any = None) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides, algorithms=algorithms)


def _problems(folder: Path, text: str, *overrides: str, algorithms: Any = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        _load(folder, text, *overrides, algorithms=algorithms)
    return caught.value.problems


def test_load_recipe_fills_the_dataclasses(tmp_path: Path) -> None:
    assert _load(tmp_path, PREFERENCES) == Recipe(
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
        _load(tmp_path, text)
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
            'controls[0]: must be one of uniform, magnitude_matched, got "unifrom"; did you mean `uniform`?',
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
        ("method=lora", 'method: must be one of full, subnet, got "lora"'),
        ("algorithm=grop", 'algorithm: unknown, got "grop"; did you mean `grpo`?'),
        ("algorithm=xyz", 'algorithm: unknown, got "xyz"; known: dpo, grpo'),
        ("subnet.source.a=1", "subnet.source.a: unknown key; known: kind, criterion, tolerance, path"),
        (
            "task.name=reasoning-gym/chain_sum",
            'task.name: must be `reasoning_gym/DATASET` or `dataset`, got "reasoning-gym/chain_sum"; '
            "did you mean `reasoning_gym/chain_sum`?",
        ),
    ],
)
def test_load_recipe_names_the_value_and_what_was_expected(tmp_path: Path, override: str, problem: str) -> None:
    assert _problems(tmp_path, GRPO, override) == [problem]


@pytest.mark.parametrize(
    ("text", "overrides", "key", "reason"),
    [
        (GRPO, ["subnet.source.kind=file"], "subnet.source.path", "needs the path"),
        (GRPO, ["subnet.source.path=m"], "subnet.source.path", "only for `kind: file`"),
        (
            GRPO,
            ["subnet.source={kind: file, path: m, criterion: absolute}"],
            "subnet.source.kind",
            "remove `criterion`",
        ),
        (GRPO, ["subnet.source.tolerance=1e-5"], "subnet.source.tolerance", "must be 0 with `criterion: exact`"),
        (
            GRPO,
            ["subnet.optimizer.master=remainder", "model.dtype=float32"],
            "subnet.optimizer.master",
            "`model.dtype` is float32",
        ),
        (GRPO, ["task.pairs.num_prompts=10"], "task.pairs", "not used by `grpo`"),
        (GRPO, ["algorithm=dpo"], "task.pairs", "learns from preferences"),
        (GRPO, ["task.num_train=0"], "task.num_train", ">= 1"),
        (GRPO, ["task.num_eval=0"], "task.num_eval", ">= 1"),
        (GRPO, ["task.dataset.path=a/b"], "task.dataset", "only for `name: dataset`"),
        (GRPO, ["task.answer='{a}'"], "task.answer", "only for `name: dataset`"),
        (GRPO, ["task.system_prompt=Hi"], "task.system_prompt", "needs `chat: true`"),
        (GRPO, ["task.prompt='{a'"], "task.prompt", "not a format template"),
        (GRPO, ["task.answer_pattern='('"], "task.answer_pattern", "not a regular expression"),
        (GRPO, [r"task.answer_pattern='\d+'"], "task.answer_pattern", "got 0"),
        (GRPO, [r"task.answer_pattern='(-)?(\d+)'"], "task.answer_pattern", "got 2"),
        (GRPO, ["task.rewards=[]"], "task.rewards", "at least one"),
        (GRPO, ["task.rewards=[corect]"], "task.rewards", "did you mean `correct`?"),
        (DPO, ["task.pairs.num_prompts=101"], "task.pairs.num_prompts", "<= task.num_train (100), got 101"),
        (DPO, ["task.pairs.num_samples=1"], "task.pairs.num_samples", ">= 2"),
        (PREFERENCES, ["evaluation.task="], "evaluation.task", "no right answer"),
        (PREFERENCES, ["evaluation.task.num_eval=0"], "evaluation.task.num_eval", ">= 1"),
        (PREFERENCES, ["evaluation.task.pairs={num_prompts: 3}"], "evaluation.task.pairs", "not used in evaluation"),
        (PREFERENCES, ["evaluation.task.answer_pattern='#'"], "evaluation.task.answer_pattern", "one group"),
        (PREFERENCES, ["task.dataset="], "task.dataset", "needs `dataset: {path: ...}`"),
        (PREFERENCES, ["task.params={min_terms: 2}"], "task.params", "only for `reasoning_gym/...`"),
    ],
)
def test_load_recipe_refuses_an_impossible_combination(
    tmp_path: Path, text: str, overrides: list[str], key: str, reason: str
) -> None:
    _load(tmp_path, text)
    (problem,) = _problems(tmp_path, text, *overrides)
    assert problem.startswith(f"{key}: ")
    assert reason in problem


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (GRPO, ["subnet.source.criterion=absolute"]),
        (GRPO, ["subnet.source={criterion: relative, tolerance: 1e-3}"]),
        (GRPO, ["subnet.source={kind: file, path: m}", "controls=[uniform]"]),
        (GRPO, ["subnet.optimizer.master=remainder"]),
        (GRPO, ["task.num_eval=0", "evaluation.enabled=false"]),
        (GRPO, ["training.bf16=false", "training.fp16=false"]),
        (GRPO, ["task.rewards=[correct, score, my.rewards:short]"]),
        (PREFERENCES, ["evaluation={enabled: false}"]),
        (PREFERENCES, ["task.pairs.num_prompts=20", "task.num_eval=5", "evaluation="]),
    ],
)
def test_load_recipe_allows_what_can_run(tmp_path: Path, text: str, overrides: list[str]) -> None:
    _load(tmp_path, text, *[item if item != "evaluation=" else "evaluation={}" for item in overrides])


@pytest.mark.parametrize("key", ["model", "task", "algorithm", "output", "model.name", "task.name"])
def test_load_recipe_reports_a_missing_key(tmp_path: Path, key: str) -> None:
    tree = yaml.safe_load(GRPO)
    *sections, name = key.split(".")
    section = tree[sections[0]] if sections else tree
    del section[name]
    assert _problems(tmp_path, yaml.safe_dump(tree)) == [f"{key}: missing, and required"]


def test_load_recipe_draws_no_conclusions_from_a_misspelled_key(tmp_path: Path) -> None:
    """`pairs` is required by dpo: once its misspelling is named, its absence is not a second problem."""
    assert _problems(tmp_path, DPO.replace("pairs:", "piars:")) == [
        "task.piars: unknown key; did you mean `pairs`?",
    ]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("training.output_dir=runs", "set `output` at the top level"),
        ("training.seed=1", "set `seed` at the top level"),
        ("training.bf16=true", "would upcast"),
        ("training.fp16=true", "GradScaler"),
        ("training.optim=adamw_torch", "`subnet.optimizer`"),
        ("training.peft_config={r: 8}", "PEFT"),
        ("training.deepspeed=ds.json", "ZeRO flattens"),
        ("training.model_init_kwargs={dtype: float32}", "`model.dtype`"),
        ("training.learning_rate='fast'", 'must be a number, got "fast"'),
        ("training.learning_rate=.inf", "must be >= 0, got Infinity"),
        ("training.max_steps=0", "must be >= 1, or -1"),
        ("training.num_generations=1", "must be >= 2, got 1"),
        ("training.per_device_train_batch_size=8.0", "must be an integer, got 8.0"),
    ],
)
def test_load_recipe_checks_training_without_knowing_its_fields(tmp_path: Path, override: str, reason: str) -> None:
    (problem,) = _problems(tmp_path, GRPO, override)
    assert problem.startswith(override.partition("=")[0] + ": ")
    assert reason in problem


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.num_generation=4", "unknown key; did you mean `num_generations`?"),
        ("training.use_vllm=1", "must be true or false, got 1"),
        ("training.max_completion_length=a", 'must be an integer, got "a"'),
        ("training.loss_type=3", "must be a string, got 3"),
        ("training.report_to=3", "must be a string or a list or null, got 3"),
        ("training.lr_scheduler_type=constan", "must be one of linear, constant, got "),
        ("training.seed=1", "not allowed here, got 1"),
    ],
)
def test_load_recipe_checks_training_against_injected_fields(tmp_path: Path, override: str, expected: str) -> None:
    (problem,) = _problems(tmp_path, GRPO, override, algorithms=ALGORITHMS)
    assert problem.startswith(f"{override.partition('=')[0]}: {expected}")


def test_load_recipe_takes_the_algorithms_from_the_injected_table(tmp_path: Path) -> None:
    assert _load(tmp_path, GRPO, "algorithm=ppo", algorithms={**ALGORITHMS, "ppo": ALGORITHMS["grpo"]})
    assert _problems(tmp_path, GRPO, algorithms={"dpo": {}}) == ['algorithm: unknown, got "grpo"; known: dpo']


def test_load_recipe_allows_every_field_that_the_config_has(tmp_path: Path) -> None:
    overrides = ["training.top_k=5", "training.report_to=[tensorboard]", "training.num_generations=4"]
    recipe = _load(tmp_path, GRPO, *overrides, "training.lr_scheduler_type=constant", algorithms=ALGORITHMS)
    assert recipe.training == {
        "learning_rate": 2e-5,
        "max_completion_length": 4,
        "top_k": 5,
        "report_to": ["tensorboard"],
        "num_generations": 4,
        "lr_scheduler_type": "constant",
    }


def test_load_recipe_reads_yaml_1_2_scalars(tmp_path: Path) -> None:
    params = "{a: 2e-5, b: 1E3, c: 010, d: on, e: 1:30, f: .5, g: '2e-5', h: 2026-01-02, i: null, j: ~, k: true}"
    assert _load(tmp_path, GRPO, f"task.params={params}").task.params == {
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
    assert _problems(tmp_path, text) == [
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
    assert _problems(tmp_path, text) == [problem]


def test_load_recipe_refuses_yaml_that_builds_objects(tmp_path: Path) -> None:
    (problem,) = _problems(tmp_path, GRPO + "x: !!python/object/apply:os.getcwd []\n")
    assert "not valid YAML, could not determine a constructor" in problem


def test_load_recipe_applies_overrides_in_order(tmp_path: Path) -> None:
    recipe = _load(
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
    assert _problems(tmp_path, GRPO, override) == [problem]


def test_load_recipe_overrides_one_of_two_aliased_sections(tmp_path: Path) -> None:
    text = GRPO.replace("task: {", "task: &task {") + "evaluation: {task: *task}\n"
    recipe = _load(tmp_path, text, "evaluation.task.num_eval=77")
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
    assert _load(tmp_path, text, *overrides).evaluation.max_new_tokens == expected


def test_load_recipe_warns_that_float32_makes_an_exact_mask_dense(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _load(tmp_path, GRPO)
    assert not caplog.records
    _load(tmp_path, GRPO, "model.dtype=float32")
    assert "nearly dense" in caplog.text


def test_load_recipe_lists_shipped_recipes_when_there_is_no_such_file() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("smollm2_135m/grpo_aritmetic")
    (problem,) = caught.value.problems
    assert caught.value.where == "smollm2_135m/grpo_aritmetic"
    assert "Did you mean `smollm2_135m/grpo_arithmetic`" in problem
    assert "tiny/dpo, tiny/grpo" in problem


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
    recipe = _load(tmp_path, text, *overrides, *(awkward if text != PREFERENCES else []))
    save_recipe(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_recipe_to_dict_spells_out_every_default(tmp_path: Path) -> None:
    tree = recipe_to_dict(_load(tmp_path, DPO))
    assert tree["task"]["pairs"] == {
        "num_prompts": 50,
        "num_samples": PairsSpec(num_prompts=1).num_samples,
        "temperature": 0.8,
        "max_new_tokens": 7,
        "batch_size": 64,
    }
    assert tree["subnet"]["optimizer"] == {"name": "adamw", "master": "fp32"}


def test_import_of_recipe_needs_no_torch() -> None:
    code = "import sys, subnet_ft.recipe; sys.exit(bool({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


NAMES = sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def test_shipped_recipes_lists_the_folder() -> None:
    assert [name for name, _ in shipped_recipes()] == NAMES
    assert all(len(summary) > 20 for _, summary in shipped_recipes())


@pytest.mark.parametrize("name", NAMES)
def test_load_recipe_reads_every_shipped_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    assert recipe.model.dtype == "bfloat16"
    save_recipe(recipe, "resolved.yaml")
    assert load_recipe("resolved.yaml") == recipe


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_is_a_document(name: str) -> None:
    head = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").partition("\nmodel:")[0]
    labels = re.findall(r"^# (\w+): ", head, re.MULTILINE)
    assert labels == ["Shows", "Needs", "Launch", "Hardware", "Expected"]
    assert name in re.findall(r"^# Launch: +(.+)$", head, re.MULTILINE)[0].split()


def test_recipes_readme_table_equals_the_folder() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (RECIPES / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| [")
    ]
    assert sorted(row[0] for row in rows) == [f"[{name}]({name}.yaml)" for name in NAMES]
    for row in rows:
        head = (RECIPES / f"{row[0].split(']')[0][1:]}.yaml").read_text(encoding="utf-8")
        launch = re.findall(r"^# Launch: +(.+)$", head, re.MULTILINE)[0]
        assert row[3] == f"`{launch}`"
        assert all(row)
        assert "tests/test_recipe.py" in row[5]
