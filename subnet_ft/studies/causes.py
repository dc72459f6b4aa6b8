"""The study `causes`: one recipe, and in every cell one thing changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from subnet_ft.recipe import Recipe, shipped_recipes
from subnet_ft.recipe.algorithms import ALGORITHMS, trains_reward_model
from subnet_ft.studies.plan import AS_WRITTEN, Cell, Plan, Recipes, config_default, own_cell

REWORDED = " {completion}, says the reference solution that was given with this problem."
"""What a reference answer becomes whose wording the base would rarely choose; the answer still comes first."""

_KL = 0.04  # the weight that GRPO was published with, arXiv 2402.03300
_CLIP = 1.0
_SAMPLED_PROMPTS = 2000
_TRIED_PER_ROW = 2  # about half of the prompts give a right sample
# SGD has no learning rate of AdamW's: AdamW moves a weight by about the rate at every step, SGD by the rate times the
# gradient, which is orders of magnitude smaller. So the rate is swept, to at most 1.
_SGD_FACTORS = (1, 1_000, 10_000)
_MOST_SGD = 1.0


def plan_causes(recipes: Recipes) -> Plan:
    """Return the recipe's own full run, the same with another seed, and one run for every cause."""
    own = recipes.own
    cells, notes = [own_cell(own)], []
    cells.append(
        Cell(
            name="seed",
            label="another seed",
            group="seed",
            settings=(f"training seed {own.seed + 1}",),
            recipe=own,
            seed=own.seed + 1,
        )
    )
    causes: list[Callable[[Recipes], Iterator[Cell | str]]] = [
        _kl,
        _clipping,
        _data,
        _steps,
        _learning_rate,
        _masters,
        _optimizer,
        _precision,
    ]
    for cause in causes:
        for found in cause(recipes):
            if isinstance(found, str):
                notes.append(found)
            else:
                cells.append(found)
    return Plan(study=recipes.study, recipe=own, cells=cells, notes=notes)


def _changed(recipes: Recipes, name: str, label: str, group: str, *changes: str) -> Cell:
    return Cell(name=name, label=label, group=group, settings=changes, recipe=recipes.derived(name, *changes))


def _kl(recipes: Recipes) -> Iterator[Cell | str]:
    field = ALGORITHMS[recipes.own.algorithm].reference_weight
    if field is None:
        yield f"KL: `{recipes.own.algorithm}` has no weight that switches it on or off."
    elif config_default(recipes.own, field):
        yield _changed(recipes, "kl_off", "KL off", "KL", f"training.{field}=0.0")
    else:
        yield _changed(recipes, "kl_on", "KL on", "KL", f"training.{field}={_KL}")


def _clipping(recipes: Recipes) -> Iterator[Cell | str]:
    if config_default(recipes.own, "max_grad_norm"):
        yield _changed(recipes, "clipping_off", "no clipping", "gradient clipping", "training.max_grad_norm=0.0")
    else:
        yield _changed(recipes, "clipping_on", "clipping", "gradient clipping", f"training.max_grad_norm={_CLIP}")


def _data(recipes: Recipes) -> Iterator[Cell | str]:
    """Copy right samples of the base itself, reference answers, and reference answers in unlikely words."""
    own = recipes.own
    if own.task.name == "dataset" and ALGORITHMS[own.algorithm].learns_from in ("preferences", "labelled"):
        yield "Data near to and far from the policy: the recipe's rows have no reference answers to copy."
        return
    if trains_reward_model(own.algorithm):
        yield "Data near to and far from the policy: a reward model writes no answers to judge beside its pairs."
        return
    group = "data"
    pairs = own.task.pairs
    sampling = {
        "num_prompts": _prompts_to_sample(own) if pairs is None else pairs.num_prompts,
        "num_samples": 8 if pairs is None else pairs.num_samples,
        "temperature": config_default(own, "temperature") or 1.0 if pairs is None else pairs.temperature,
        "max_new_tokens": own.evaluation.max_new_tokens if pairs is None else pairs.max_new_tokens,
        "batch_size": 512 if pairs is None else pairs.batch_size,
    }
    completion = own.task.completion or _completion_after(own)
    copied = {
        "data_own_samples": ("SFT on own right samples", "raft", [f"task.pairs={json.dumps(sampling)}"]),
        "data_reference": ("SFT on reference answers", "sft", [f"task.completion={json.dumps(completion)}"]),
        "data_reworded": ("SFT on reworded references", "sft", [f"task.completion={json.dumps(REWORDED)}"]),
    }
    for name, (label, algorithm, changes) in copied.items():
        unused = [] if algorithm == "raft" else ["task.pairs=null"]
        recipe = recipes.with_algorithm(algorithm, name, *unused, *changes)
        settings = (f"algorithm={algorithm}", *changes)
        versus = AS_WRITTEN if algorithm == "raft" else "data_own_samples"
        yield Cell(
            name=name,
            label=label,
            group=group,
            settings=settings,
            recipe=recipe,
            versus=versus,
            measure_data=True,
        )


def _prompts_to_sample(recipe: Recipe) -> int:
    """Return for how many prompts the base is sampled, so that the run need not repeat what it copies, if it can."""
    training = recipe.training
    rows = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
    wanted = _TRIED_PER_ROW * rows * max(training.get("max_steps", -1), 0) or _SAMPLED_PROMPTS
    return int(min(wanted, _SAMPLED_PROMPTS, recipe.task.num_train))


def _completion_after(recipe: Recipe) -> str:
    """Return the template of a reference answer as it follows the recipe's prompt."""
    prompt = recipe.task.prompt
    return "{completion}" if recipe.task.chat or prompt is None or prompt[-1:].isspace() else " {completion}"


def _steps(recipes: Recipes) -> Iterator[Cell | str]:
    most = recipes.own.training.get("max_steps", -1)
    if not isinstance(most, int) or most < 4:
        yield "Steps: the recipe says no `training.max_steps` of at least 4 to divide."
        return
    for name, steps in (("steps_quarter", most // 4), ("steps_half", most // 2), ("steps_double", 2 * most)):
        changes = [f"training.max_steps={steps}"]
        saved = recipes.own.training.get("save_steps")
        if isinstance(saved, int) and saved > steps:
            changes.append(f"training.save_steps={steps}")
        yield _changed(recipes, name, f"{steps} step{'s' if steps > 1 else ''}", "steps", *changes)


def _learning_rate(recipes: Recipes) -> Iterator[Cell | str]:
    rate = config_default(recipes.own, "learning_rate")
    for name, factor in (("rate_tenth", 0.1), ("rate_third", 0.3), ("rate_triple", 3.0)):
        value = float(f"{rate * factor:.3g}")
        yield _changed(recipes, name, f"learning rate {value:g}", "learning rate", f"training.learning_rate={value!r}")


def _masters(recipes: Recipes) -> Iterator[Cell | str]:
    own = recipes.own
    if own.model.dtype != "bfloat16" or own.subnet.optimizer.name == "adamw_8bit":
        yield "Training without masters: it is for bfloat16 weights under `adamw` or `sgd`."
    elif own.subnet.optimizer.master == "none":
        yield _changed(recipes, "masters", "with fp32 masters", "masters", "subnet.optimizer.master=fp32")
    else:
        yield _changed(recipes, "no_masters", "without masters", "masters", "subnet.optimizer.master=none")


def _optimizer(recipes: Recipes) -> Iterator[Cell | str]:
    own, group = recipes.own, "optimizer"
    if own.subnet.optimizer.name == "sgd":
        yield _changed(recipes, "adamw", "AdamW", group, "subnet.optimizer.name=adamw")
        return
    rate = config_default(own, "learning_rate")
    for factor in _SGD_FACTORS:
        value = float(f"{rate * factor:.3g}")
        if factor == 1 or value <= _MOST_SGD:
            changes = ("subnet.optimizer.name=sgd", "subnet.optimizer.master=fp32", f"training.learning_rate={value!r}")
            yield _changed(recipes, f"sgd_{factor}x", f"SGD, learning rate {value:g}", group, *changes)


def _precision(recipes: Recipes) -> Iterator[Cell | str]:
    """Compare bfloat16 with float32, on a tiny model unless the recipe's own is one or there is a GPU."""
    import torch

    own, group, float32 = recipes.own, "precision", "model.dtype=float32"
    masters = ("subnet.optimizer.master=fp32",)
    if own.model.name.startswith("tiny:") or torch.cuda.is_available():
        if own.model.dtype == "float32":
            yield _changed(recipes, "bfloat16", "bfloat16 weights", group, "model.dtype=bfloat16")
        else:
            yield _changed(recipes, "float32", "float32 weights", group, float32, *masters)
        return
    small = f"tiny/{own.algorithm}"
    if small not in [name for name, _ in shipped_recipes()]:
        yield f"float32: it is slow for `{own.model.name}` without a GPU, and there is no recipe `{small}`."
        return
    yield (
        f"float32 on `{own.model.name}`: without a GPU it is slow, so that bfloat16 and float32 are compared on a tiny "
        f"random model, by the recipe `{small}` as it is shipped."
    )
    for name, label, changes in (
        ("tiny_bfloat16", "tiny model, bfloat16", ()),
        ("tiny_no_masters", "tiny model, no masters", ("subnet.optimizer.master=none",)),
        ("tiny_float32", "tiny model, float32", (float32, *masters)),
    ):
        yield Cell(
            name=name,
            label=label,
            group=group,
            settings=(f"the recipe {small}", *changes),
            recipe=recipes.as_shipped(small, name, *changes),
            versus=None if not changes else "tiny_bfloat16",
        )
