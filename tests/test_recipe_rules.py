from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from recipe_texts import DPO, GRPO, PREFERENCES, REWARD, STEP_BY_STEP, load_text, problems_of

from subnet_ft.errors import RecipeError
from subnet_ft.recipe import load_recipe


class Scheduler(str, Enum):
    LINEAR = "linear"
    CONSTANT = "constant"


ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {
        "seed": 42,
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
            ["subnet.optimizer.master=none", "model.dtype=float16"],
            "subnet.optimizer.master",
            "`none` rounds a bfloat16 weight, but `model.dtype` is float16",
        ),
        (
            GRPO,
            ["subnet.optimizer.master=remainder", "model.dtype=float32"],
            "subnet.optimizer.master",
            "`model.dtype` is float32",
        ),
        (
            GRPO,
            ["subnet.optimizer.clip_norm=full", "training.gradient_accumulation_steps=4"],
            "subnet.optimizer.clip_norm",
            "`training.gradient_accumulation_steps` is 4",
        ),
        (
            GRPO,
            ["subnet.log_norms=true", "training.gradient_accumulation_steps=2"],
            "subnet.log_norms",
            "set it to 1",
        ),
        (GRPO, ["subnet.audit_steps=0"], "subnet.audit_steps", "must be >= 1"),
        (GRPO, ["subnet.save_total_bytes=0"], "subnet.save_total_bytes", "must be >= 1, or null for no limit, got 0"),
        (
            GRPO,
            ["subnet.save_only_delta=true", "training.save_strategy='no'"],
            "subnet.save_only_delta",
            "saves no checkpoints",
        ),
        (
            GRPO,
            ["subnet.save_total_bytes=9", "training.save_strategy='no'"],
            "subnet.save_total_bytes",
            "saves no checkpoints",
        ),
        (
            GRPO,
            ["subnet.save_only_delta=true", "training.push_to_hub=true"],
            "subnet.save_only_delta",
            "no dense weights to push; set that to `end` or `checkpoint`",
        ),
        (GRPO, ["task.pairs.num_prompts=10"], "task.pairs", "not used by `grpo`"),
        (GRPO, ["algorithm=dpo"], "task.pairs", "learns from preferences: sample them"),
        (GRPO, ["algorithm=orpo"], "task.pairs", "or use `name: dataset` with a preference dataset"),
        (GRPO, ["algorithm=simpo"], "task.pairs", "learns from preferences"),
        (GRPO, ["algorithm=kto"], "task.pairs", "a dataset of labelled completions or of preferences"),
        (GRPO, ["algorithm=raft"], "task.pairs", "learns from right completions of the base: sample them with `pairs`"),
        (PREFERENCES, ["algorithm=raft"], "task.pairs", "missing; `raft`"),
        (DPO, ["algorithm=rloo"], "task.pairs", "not used by `rloo`, which samples its own"),
        (DPO, ["algorithm=sft"], "task.pairs", "not used by `sft`, which copies reference answers"),
        (DPO, ["task.pairs.max_right=2"], "task.pairs.max_right", "not used by `dpo`, only by `raft`"),
        (DPO, ["algorithm=kto", "task.pairs.max_right=1"], "task.pairs.max_right", "not used by `kto`"),
        (DPO, ["algorithm=raft", "task.pairs.max_right=0"], "task.pairs.max_right", ">= 1"),
        (GRPO, ["algorithm=distillation"], "teacher", "missing; `distillation` learns from another model"),
        (
            GRPO,
            ["teacher.name=tiny:qwen3"],
            "teacher",
            "not used by `grpo`, only by `distillation`, `distilling_step_by_step`; remove it",
        ),
        (GRPO, ["algorithm=distillation", "teacher={}"], "teacher.name", "missing, and required"),
        (
            GRPO,
            ["algorithm=distillation", "teacher.name=a/b", "training.beta=1.5"],
            "training.beta",
            "must be >= 0 and <= 1",
        ),
        (
            GRPO,
            ["algorithm=distillation", "teacher.name=a/b", "training.teacher_model_name_or_path=a/b"],
            "training.teacher_model_name_or_path",
            "loaded from `teacher`",
        ),
        (GRPO, ["task.completion='{answer}'"], "task.completion", "not used by `grpo`, only by `sft`"),
        (DPO, ["task.completion='{answer}'"], "task.completion", "not used by `dpo`"),
        (GRPO, ["algorithm=sft", "task.completion='{answer'"], "task.completion", "not a format template"),
        (
            PREFERENCES,
            ["evaluation.task.completion='{answer}'"],
            "evaluation.task.completion",
            "not used in evaluation",
        ),
        (PREFERENCES, ["algorithm=kto", "evaluation.task="], "evaluation.task", "preferences and labels have no right"),
        (PREFERENCES, ["algorithm=sft", "evaluation={}"], "task.num_eval", ">= 1"),
        (DPO, ["algorithm=simpo", "training.loss_type=sigmoid"], "training.loss_type", '"simpo" makes it `simpo`'),
        (DPO, ["algorithm=simpo", "training.cpo_alpha=1.0"], "training.cpo_alpha", "choose another algorithm"),
        (DPO, ["algorithm=simpo", "training.beta=0"], "training.beta", "must be > 0, got 0"),
        (
            DPO,
            ["algorithm=kto", "training.per_device_train_batch_size=1"],
            "training.per_device_train_batch_size",
            ">= 2",
        ),
        (
            DPO,
            ["algorithm=kto", "training.train_sampling_strategy=random"],
            "training.train_sampling_strategy",
            '"sequential" makes it `kto`',
        ),
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
    load_text(tmp_path, text)
    (problem,) = problems_of(tmp_path, text, *overrides)
    assert problem.startswith(f"{key}: ")
    assert reason in problem


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (GRPO, ["subnet.source.criterion=absolute"]),
        (GRPO, ["subnet.source={criterion: relative, tolerance: 1e-3}"]),
        (GRPO, ["subnet.source={kind: file, path: m}", "controls=[uniform]"]),
        (GRPO, ["subnet.optimizer.master=remainder"]),
        (GRPO, ["subnet.optimizer={name: sgd, clip_norm: full, nonfinite: skip}", "subnet.audit_steps=10"]),
        (GRPO, ["subnet={save_only_delta: true, save_total_bytes: 1}", "training.save_strategy=epoch"]),
        (GRPO, ["subnet.save_only_delta=true", "training={push_to_hub: true, hub_strategy: end}"]),
        (GRPO, ["subnet.audit_steps=null", "training.gradient_accumulation_steps=2"]),
        (GRPO, ["task.num_eval=0", "evaluation.enabled=false"]),
        (GRPO, ["training.bf16=false", "training.fp16=false", "training.cast_lm_head_to_fp32=false"]),
        (GRPO, ["training.fsdp=", "training.deepspeed=null", "training.save_only_model=false"]),
        (GRPO, ["training.eval_strategy=no", "training.remove_unused_columns=false", "training.max_grad_norm=0"]),
        (DPO, ["training.remove_unused_columns=true"]),
        (DPO, ["algorithm=simpo", "training={loss_type: simpo, cpo_alpha: 0, simpo_gamma: 1.0, beta: 2.0}"]),
        (DPO, ["training.beta=0", "training.per_device_train_batch_size=1", "training.loss_type=hinge"]),
        (DPO, ["algorithm=orpo"]),
        (DPO, ["algorithm=kto", "training={desirable_weight: 2, train_sampling_strategy: sequential}"]),
        (DPO, ["algorithm=raft", "task.pairs.max_right=3", "training.completion_only_loss=false"]),
        (GRPO, ["algorithm=rloo"]),
        (GRPO, ["algorithm=distillation", "teacher.name=a/b", "training.beta=0.5"]),
        (GRPO, ["algorithm=sft", "task.completion=' {answer}'", "training={packing: false}"]),
        (PREFERENCES, ["algorithm=kto"]),
        (PREFERENCES, ["algorithm=sft", "task.completion=' {answer}'"]),
        (GRPO, ["task.rewards=[correct, score, my.rewards:short]"]),
        (PREFERENCES, ["evaluation={enabled: false}"]),
        (PREFERENCES, ["task.pairs.num_prompts=20", "task.num_eval=5", "evaluation="]),
    ],
)
def test_load_recipe_allows_what_can_run(tmp_path: Path, text: str, overrides: list[str]) -> None:
    load_text(tmp_path, text, *[item if item != "evaluation=" else "evaluation={}" for item in overrides])


def test_load_recipe_draws_no_conclusions_from_a_misspelled_key(tmp_path: Path) -> None:
    """`pairs` is required by dpo: once its misspelling is named, its absence is not a second problem."""
    assert problems_of(tmp_path, DPO.replace("pairs:", "piars:")) == [
        "task.piars: unknown key; did you mean `pairs`?",
    ]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("training.output_dir=runs", "set `output` at the top level"),
        ("training.seed=1", "set `seed` at the top level"),
        ("training.bf16=true", "would upcast"),
        ("training.fp16=true", "GradScaler"),
        ("training.cast_lm_head_to_fp32=true", "weights are compared with the base's in `model.dtype`"),
        ("training.optim=adamw_torch", "`subnet.optimizer`"),
        ("training.peft_config={r: 8}", "PEFT"),
        ("training.deepspeed=ds.json", "this release trains in one process"),
        ("training.fsdp=full_shard", "this release trains in one process"),
        ("training.fsdp_config={version: 2}", "this release trains in one process"),
        ("training.save_only_model=true", "empty optimizer state"),
        ("training.remove_unused_columns=true", "from which rewards find"),
        ("training.eval_strategy=steps", "gets no evaluation set"),
        ("training.eval_on_start=true", "gets no evaluation set"),
        ("training.load_best_model_at_end=true", "gets no evaluation set"),
        ("training.max_grad_norm=null", "must be a number, got null; 0 switches clipping off"),
        ("training.model_init_kwargs={dtype: float32}", "`model.dtype`"),
        ("training.learning_rate='fast'", 'must be a number, got "fast"'),
        ("training.learning_rate=.inf", "must be >= 0, got Infinity"),
        ("training.max_steps=0", "must be >= 1, or -1"),
        ("training.num_generations=1", "must be >= 2, got 1"),
        ("training.generate_during_eval=true", "gets no evaluation set"),
        ("training.chat_template_path=x.jinja", "own tokenizer"),
        ("training.eos_token='</s>'", "own tokenizer"),
        ("training.kl_coef=-1", "must be >= 0, got -1"),
        ("training.lam=1.5", "must be >= 0 and <= 1, got 1.5"),
        ("training.label_smoothing=0.5", "must be >= 0 and < 0.5, got 0.5"),
        ("training.simpo_gamma=-1", "must be >= 0, got -1"),
        ("training.desirable_weight=-1", "must be >= 0, got -1"),
        ("training.epsilon=0", "must be > 0, got 0"),
        ("training.steps_per_generation=0", "must be >= 1, got 0"),
        ("training.per_device_train_batch_size=8.0", "must be an integer, got 8.0"),
    ],
)
def test_load_recipe_checks_training_without_knowing_its_fields(tmp_path: Path, override: str, reason: str) -> None:
    (problem,) = problems_of(tmp_path, GRPO, override)
    assert problem.startswith(override.partition("=")[0] + ": ")
    assert reason in problem


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.num_generation=4", "unknown key; did you mean `num_generations`?"),
        ("training.sede=1", "unknown key; known: learning_rate, max_completion_length"),
        ("training.use_vllm=1", "must be true or false, got 1"),
        ("training.max_completion_length=a", 'must be an integer, got "a"'),
        ("training.loss_type=3", "must be a string, got 3"),
        ("training.report_to=3", "must be a string or a list or null, got 3"),
        ("training.lr_scheduler_type=constan", "must be one of linear, constant, got "),
        ("training.seed=1", "not allowed here, got 1"),
    ],
)
def test_load_recipe_checks_training_against_injected_fields(tmp_path: Path, override: str, expected: str) -> None:
    (problem,) = problems_of(tmp_path, GRPO, override, algorithms=ALGORITHMS)
    assert problem.startswith(f"{override.partition('=')[0]}: {expected}")


def test_load_recipe_takes_the_algorithms_from_the_injected_table(tmp_path: Path) -> None:
    assert load_text(tmp_path, GRPO, "algorithm=ppo", algorithms={**ALGORITHMS, "ppo": ALGORITHMS["grpo"]})
    assert problems_of(tmp_path, GRPO, algorithms={"dpo": {}}) == ['algorithm: unknown, got "grpo"; known: dpo']


def test_load_recipe_allows_every_field_that_the_config_has(tmp_path: Path) -> None:
    overrides = ["training.top_k=5", "training.report_to=[tensorboard]", "training.num_generations=4"]
    recipe = load_text(tmp_path, GRPO, *overrides, "training.lr_scheduler_type=constant", algorithms=ALGORITHMS)
    assert recipe.training == {
        "learning_rate": 2e-5,
        "max_completion_length": 4,
        "top_k": 5,
        "report_to": ["tensorboard"],
        "num_generations": 4,
        "lr_scheduler_type": "constant",
    }


def test_load_recipe_lists_what_the_config_refuses_with_all_other_problems(tmp_path: Path) -> None:
    asked: list[tuple[str, Mapping[str, Any]]] = []

    def check(algorithm: str, training: Mapping[str, Any]) -> list[tuple[str, str]]:
        asked.append((algorithm, training))
        return [("training", "no")]

    path = tmp_path / "recipe.yaml"
    path.write_text(GRPO, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["evaluation.margin=4"], check_config=check)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["evaluation.margin", "training"]
    assert asked == [("grpo", {"learning_rate": 2e-5, "max_completion_length": 4})]
    with pytest.raises(RecipeError, match="1 problem"):  # a default in place of a bad value proves nothing
        load_recipe(path, ["training.num_generations=1"], check_config=check)
    assert len(asked) == 1


REWARD_ON_DATASET = PREFERENCES.partition("evaluation:")[0].replace("dpo", "reward") + "output: runs/x"


@pytest.mark.parametrize(
    ("text", "override", "key", "reason"),
    [
        (REWARD, "task.rewards=[score]", "task.rewards", "which learns a reward from pairs"),
        (REWARD, "evaluation.task={name: reasoning_gym/chain_sum, num_eval: 5}", "evaluation.task", "held-out prompts"),
        (REWARD, "task.num_eval=0", "task.num_eval", "missing"),
        (REWARD, "task.pairs=null", "task.pairs", "`reward` learns from preferences"),
        (REWARD, "teacher={name: tiny:llama}", "teacher", "not used by `reward`"),
        (REWARD, "task.completion=x", "task.completion", "not used by `reward`"),
        (REWARD_ON_DATASET, "task.num_eval=0", "task.num_eval", "missing"),
        (
            REWARD_ON_DATASET.replace("num_train", "num_eval: 5, num_train"),
            "evaluation.task={name: reasoning_gym/chain_sum, num_eval: 5}",
            "evaluation.task",
            "rows of `dataset.eval_split`",
        ),
    ],
)
def test_load_recipe_refuses_what_makes_no_reward_model(
    text: str, override: str, key: str, reason: str, tmp_path: Path
) -> None:
    (problem,) = problems_of(tmp_path, text, override)
    assert problem.startswith(f"{key}: ")
    assert reason in problem


def test_load_recipe_judges_a_reward_model_by_pairs_alone(tmp_path: Path) -> None:
    assert load_text(tmp_path, REWARD).evaluation.task is None
    rows = REWARD_ON_DATASET.replace("num_train", "num_eval: 5, num_train")
    assert load_text(tmp_path, rows).task.num_eval == 5
    assert not load_text(tmp_path, REWARD_ON_DATASET, "evaluation.enabled=false").evaluation.enabled


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (["teacher=null"], "teacher", "learns from another model"),
        (["task.rationales=null"], "task.rationales", "say how the teacher is made to reason"),
        (["task.pairs={num_prompts: 5}"], "task.pairs", "learns what its teacher writes"),
        (
            ["task.rationales.num_prompts=101"],
            "task.rationales.num_prompts",
            "must be <= task.num_train (100), got 101",
        ),
        (["task.rationales.answer_pattern=null"], "task.rationales.answer_pattern", "no rationale is left"),
        (["task.rationales.answer_pattern='so .'"], "task.rationales.answer_pattern", "around the answer, got 0"),
        (["task.rationales.rationale_pattern='('"], "task.rationales.rationale_pattern", "not a regular expression"),
        (["task.rationales.rationale_pattern='(a)(b)'"], "task.rationales.rationale_pattern", "the rationale, got 2"),
        (["task.rationales.prompt='{a'"], "task.rationales.prompt", "not a format template"),
        (["task.rationales.completion='a}'"], "task.rationales.completion", "not a format template"),
        (["task.rationales.rationale_prefix='[label] '"], "task.rationales.rationale_prefix", "must differ"),
        (["task.rationales.keep=rihgt"], "task.rationales.keep", "did you mean `right`?"),
        (["task.rationales.num_promts=3"], "task.rationales.num_promts", "unknown key"),
        (["task.rationales.temperature=-1"], "task.rationales.temperature", "must be >= 0"),
        (
            ["evaluation.task={name: reasoning_gym/chain_sum, num_eval: 3, rationales: {prompt: a, num_prompts: 1}}"],
            "evaluation.task.rationales",
            "not used in evaluation",
        ),
    ],
)
def test_load_recipe_refuses_rationales_that_cannot_be(
    overrides: list[str], key: str, reason: str, tmp_path: Path
) -> None:
    (problem,) = problems_of(tmp_path, STEP_BY_STEP, *overrides)
    assert problem.startswith(f"{key}: ")
    assert reason in problem


def test_load_recipe_wants_rationales_from_no_other_algorithm(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, GRPO, "task.rationales={prompt: a, num_prompts: 1, rationale_pattern: (.)}")
    assert problems == ["task.rationales: not used by `grpo`, only by `distilling_step_by_step`; remove it"]
    assert load_text(tmp_path, STEP_BY_STEP, "task.completion=' {answer}'").task.completion == " {answer}"


def test_load_recipe_lists_all_problems_of_rationales_at_once(tmp_path: Path) -> None:
    wrong = ["task.rationales.prompt='{a'", "task.rationales.answer_pattern='so'", "task.rationales.num_prompts=500"]
    assert len(problems_of(tmp_path, STEP_BY_STEP, *wrong)) == 3
