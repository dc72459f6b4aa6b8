"""What a recipe says of its methods is checked before anything is loaded, all problems at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from subnet_ft.errors import RecipeError
from subnet_ft.pipeline import load_checked_recipe
from subnet_ft.recipe.methods import METHODS


def problems_of(*overrides: str, recipe: str = "tiny/sft", methods: Sequence[str] = ()) -> list[str]:
    try:
        load_checked_recipe(recipe, overrides, methods=methods)
    except RecipeError as error:
        return error.problems
    return []


@pytest.mark.parametrize("name", METHODS)
def test_method_problems_accepts_every_method_as_it_is(name: str) -> None:
    own = [] if METHODS[name].config is None else [f"methods.{name}.training.learning_rate=1e-4"]
    assert problems_of(f"method={name}", *own) == []


@pytest.mark.parametrize(
    "settings",
    [
        "lora.config={r: 8, lora_dropout: 0.1, target_modules: [q_proj, v_proj], init_lora_weights: gaussian}",
        "eva.config={r: 8, eva_config: {rho: 1.5, tau: 0.9}}",
        "ia3.config={target_modules: [k_proj, down_proj], feedforward_modules: [down_proj]}",
        "prompt_tuning.config={prompt_tuning_init: TEXT, prompt_tuning_init_text: Add up, num_virtual_tokens: 4}",
        "adapters.config={bottleneck_size: 8, activation: relu}",
        "last_layers.config={num_layers: 1, final_norm_and_head: true}",
        "lora.training={lr_scheduler_type: cosine, warmup_steps: 3, adam_beta2: 0.95, max_grad_norm: 0.3}",
    ],
)
def test_method_problems_accepts(settings: str) -> None:
    assert problems_of(f"methods.{settings}") == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("method=loraa", 'method: unknown, got "loraa"; did you mean `lora`?'),
        ("methods.lorra={}", "methods.lorra: unknown method; did you mean `lora`?"),
        ("methods.lora.config.lora_alfa=1", "methods.lora.config.lora_alfa: unknown key; did you mean `lora_alpha`?"),
        ("methods.lora.config.r=x", 'methods.lora.config.r: must be an integer, got "x"'),
        ("methods.lora.config.r=0", "methods.lora.config.r: must be >= 1, got 0"),
        ("methods.lora.config.target_modules=3", "methods.lora.config.target_modules: must be a"),
        ("methods.lora.config.init_lora_weights=pissa", "methods.lora.config.init_lora_weights: must be true, false,"),
        ("methods.lora.config.bias=all", 'methods.lora.config.bias: not allowed here, got "all": it trains or changes'),
        ("methods.lora.config.task_type=SEQ_CLS", "methods.lora.config.task_type: not allowed here"),
        ("methods.dora.config.use_dora=false", "methods.dora.config.use_dora: not allowed here, got false: true"),
        ("methods.eva.config.eva_config={rhoo: 2}", "methods.eva.config.eva_config.rhoo: unknown key; did you mean"),
        ("methods.eva.config.eva_config={rho: 0.5}", "methods.eva.config.eva_config: refused: `rho` must be >= 1.0"),
        ("methods.full.training.learning_rate=1", "methods.full: full run, subnetwork and controls share one setting"),
        ("methods.bitfit.config.terms=bia", "methods.bitfit.config.terms: must be one of bias, bias_and_norm"),
        (
            "methods.last_layers.config.num_layers=0",
            "methods.last_layers.config: LastLayersConfig refuses these settings: `num_layers` must be >= 1, got 0",
        ),
        (
            "methods.prompt_tuning.config={prompt_tuning_init: TEXT}",
            "methods.prompt_tuning.config: PromptTuningConfig refuses these settings:",
        ),
        ("methods.lora.training.learning_rate=-1", "methods.lora.training.learning_rate: must be >= 0, got -1"),
        ("methods.lora.training.adam_beta1=1.5", "methods.lora.training.adam_beta1: must be >= 0 and < 1, got 1.5"),
        ("methods.lora.training.max_steps=3", "methods.lora.training.max_steps: not a setting of one method; data,"),
        (
            "methods.lora.training.learning_rat=1",
            "methods.lora.training.learning_rat: not a setting of one method; data, batches and steps are those of the "
            "recipe; did you mean `learning_rate`?",
        ),
        ("methods.lora.training=3", "methods.lora.training: must be a map of keys to values, got 3"),
    ],
)  # fmt: skip
def test_method_problems_names(override: str, expected: str) -> None:
    (problem,) = problems_of(override)
    assert problem.startswith(expected)


def test_method_problems_are_listed_all_at_once() -> None:
    settings = "methods={lora: {config: {r: 0, rr: 1}, training: {max_steps: 1}}, eva: 3, ia3: {config: {r: 1}}}"
    keys = [problem.partition(":")[0] for problem in problems_of("method=nope", settings)]
    assert sorted(keys) == sorted(
        [
            "method", "methods.eva", "methods.lora.config.r", "methods.lora.config.rr",
            "methods.lora.training.max_steps", "methods.ia3.config.r",
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [name for name in METHODS if name not in ("last_layers", "prompt_tuning", "prefix_tuning", "adaption_prompt")],
)
def test_method_problems_accepts_a_reward_model_with(name: str) -> None:
    assert problems_of(f"method={name}", recipe="tiny/reward") == []


def test_method_problems_wants_the_head_of_a_reward_model_trained() -> None:
    (problem,) = problems_of("method=last_layers", recipe="tiny/reward")
    assert problem.startswith("method: `last_layers` leaves the new head of a reward model as it was drawn")
    assert (
        problems_of("methods.last_layers.config.final_norm_and_head=true", "method=last_layers", recipe="tiny/reward")
        == []
    )


@pytest.mark.parametrize(("recipe", "key"), [("tiny/ppo", "value_trains"), ("tiny/prime", "prm_trains")])
def test_method_problems_names_an_adapter_whose_mask_a_second_model_would_get(recipe: str, key: str) -> None:
    both = [f"training.{key}=subnet", "method=lora"]
    (problem,) = problems_of(*both, recipe=recipe)
    assert problem.startswith("method: `lora` trains an adapter, ")
    assert f"`training.{key}: subnet`" in problem
    (compared,) = problems_of(f"training.{key}=subnet", recipe=recipe, methods=["full", "bitfit", "lora"])
    assert compared.startswith("methods.lora: `lora` trains an adapter, ")
    assert problems_of("method=lora", recipe=recipe) == problems_of(f"training.{key}=subnet", recipe=recipe) == []


@pytest.mark.parametrize("setting", ["method=lora", "baselines=[lora]"])
def test_method_problems_of_what_is_trained(setting: str) -> None:
    both = ["training.value_trains=subnet", setting]
    assert problems_of(*both, recipe="tiny/ppo", methods=["full", "bitfit"]) == []
    assert len(problems_of(*both, recipe="tiny/ppo")) == 1


@pytest.mark.parametrize("recipe", ["tiny/dpo", "tiny/kto"])
@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].trains == "adapter"])
def test_method_problems_names_an_adapter_whose_reference_would_not_be_the_base(name: str, recipe: str) -> None:
    precomputed = "training.precompute_ref_log_probs=true"
    (problem,) = problems_of(precomputed, f"method={name}", recipe=recipe)
    assert problem.startswith(f"method: `{name}` trains an adapter, whose reference is the base")
    (baseline,) = problems_of(precomputed, f"baselines=[{name}]", recipe=recipe)
    (compared,) = problems_of(precomputed, recipe=recipe, methods=["full", name])
    assert baseline == compared == problem.replace("method:", f"methods.{name}:")
    assert problems_of("training.precompute_ref_log_probs=false", f"method={name}", recipe=recipe) == []
    assert problems_of(precomputed, recipe=recipe, methods=["full", "subnet", "last_layers"]) == []


@pytest.mark.parametrize("section", ["model", "methods", "reference", "subnet.optimizer", "teacher", "training"])
def test_load_checked_recipe_reports_a_section_that_is_no_map(section: str) -> None:
    expected = [f"{section}: must be a map of keys to values, got 3"]
    assert problems_of(f"{section}=3", "method=lora", recipe="tiny/ppo") == expected


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ("tiny/orpo", "prompt_tuning"),
        ("tiny/simpo", "prompt_tuning"),
        ("tiny/distillation", "prompt_tuning"),
        ("tiny/distillation", "prefix_tuning"),
        ("tiny/ppo", "qlora"),
        ("tiny/prime", "qlora"),
        ("tiny/reward", "prompt_tuning"),
        ("tiny/reward", "prefix_tuning"),
        ("tiny/reward", "adaption_prompt"),
    ],
)
def test_method_problems_names_what_does_not_go_with_an_algorithm(recipe: str, method: str) -> None:
    teacher = ["teacher.name=tiny:qwen3"] if recipe == "tiny/distillation" else []
    (problem,) = problems_of(f"method={method}", *teacher, recipe=recipe)
    assert problem.startswith(f"method: `{method}` ")
    (compared,) = problems_of(*teacher, recipe=recipe, methods=["full", method])
    assert compared.startswith(f"methods.{method}: `{method}` ")
    # Settings of a method that is not trained are none of the algorithm's business.
    unused: Any = problems_of(f"methods.{method}.training.learning_rate=1e-3", *teacher, recipe=recipe)
    assert unused == []
