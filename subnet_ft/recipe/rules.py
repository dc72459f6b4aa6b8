"""Combinations that cannot run, each a rule over fields that are valid in themselves."""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Callable, Iterator
from typing import TypeAlias

from subnet_ft.recipe.algorithms import ALGORITHMS, LearnsFrom, learns_from, trains_reward_model
from subnet_ft.recipe.evidence_rules import baselines, repeats, retention
from subnet_ft.recipe.mask_rules import controls, mask_source, moments
from subnet_ft.recipe.parsing import Parser, show
from subnet_ft.recipe.schema import Recipe
from subnet_ft.recipe.task_schema import PairsSpec, TaskSpec

Problems: TypeAlias = Iterator[tuple[str, str]]

# What learns from sampled completions, as messages call it, and the dataset that may stand in for them.
_WORDS = {
    "preferences": "preferences",
    "labelled": "right and wrong completions",
    "samples": "right completions of the base",
}
_SAMPLED = {
    "preferences": "a preference dataset",
    "labelled": "a dataset of labelled completions or of preferences",
    "samples": "",
}

_REWARD = re.compile(r"correct|score|[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def check_combinations(parser: Parser, recipe: Recipe) -> None:
    """Apply every rule whose fields are usable; each problem is a dotted key and the end of a sentence."""
    rules: list[tuple[tuple[str, ...], Callable[[Recipe], Problems]]] = [
        (("subnet.source", "training"), mask_source),
        (("subnet.source.kind", "subnet.optimizer.name", "subnet.optimizer.master"), moments),
        (("subnet.optimizer.master", "subnet.optimizer.name", "model.dtype"), _optimizer),
        (("reference", "algorithm", "training"), _reference),
        (("subnet.optimizer.clip_norm", "subnet.log_norms", "training"), _whole_norm),
        (("subnet.audit_steps",), _audits),
        (("subnet.save_only_delta", "subnet.save_total_bytes", "training"), _checkpoints),
        (("controls",), controls),
        (("baselines",), baselines),
        (("repeats", "seed"), repeats),
        (("evaluation.retention", "evaluation.enabled", "algorithm"), retention),
        (("algorithm", "task.pairs", "task.dataset", "task.name", "task.completion"), _learning_data),
        (("algorithm", "teacher"), _teacher),
        (("algorithm", "task.rewards"), _task_rewards),
        (("task.rationales", "task.answer_pattern", "task.num_train"), _rationales),
        (("algorithm", "task.num_train", "task.pairs"), _amount_to_train),
        (("evaluation", "task.num_eval", "task.dataset", "task.pairs", "algorithm"), _evaluation),
        (("output",), _output),
    ]
    for keys, rule in rules:
        if parser.is_usable(*keys):
            for key, message in rule(recipe):
                parser.report(key, message)
    if parser.has("task"):
        _check_task(parser, "task", recipe.task)
    if parser.has("evaluation.task") and recipe.evaluation.task is not None:
        _check_task(parser, "evaluation.task", recipe.evaluation.task)
    if parser.is_usable("evaluation.retention") and recipe.evaluation.retention is not None:
        for index, task in enumerate(recipe.evaluation.retention.tasks):
            _check_task(parser, f"evaluation.retention.tasks[{index}]", task)


def _optimizer(recipe: Recipe) -> Problems:
    master, what = recipe.subnet.optimizer.master, {"remainder": "completes", "none": "rounds"}
    if master in what and recipe.model.dtype != "bfloat16":
        yield (
            "subnet.optimizer.master",
            f"`{master}` {what[master]} a bfloat16 weight, but `model.dtype` is {recipe.model.dtype}; use `fp32`",
        )
    elif master in what and recipe.subnet.optimizer.name == "adamw_8bit":
        yield "subnet.optimizer.master", f"`{master}` is for `adamw` and `sgd`; `adamw_8bit` needs `fp32`"


def _reference(recipe: Recipe) -> Problems:
    known, kind = ALGORITHMS.get(recipe.algorithm), recipe.reference.quantization
    if recipe.reference.source == "policy":
        yield from _free_reference(recipe)
    if known is None or kind is None:
        return
    key = "reference.quantization"
    if not known.references:
        others = ", ".join(f"`{name}`" for name, other in ALGORITHMS.items() if other.references)
        yield key, f"not used by `{known.name}`, which has no reference model, only by {others}; remove it"
    if recipe.training.get("sync_ref_model"):
        yield key, f"a model in {kind} stays as it is, and `training.sync_ref_model` moves it; set one of the two"
    if recipe.training.get("precompute_ref_log_probs"):
        yield key, "not used with `training.precompute_ref_log_probs`, which asks the base once; remove one of them"


def _free_reference(recipe: Recipe) -> Problems:
    known, key = ALGORITHMS.get(recipe.algorithm), "reference.source"
    if known is not None and not known.references:
        others = ", ".join(f"`{name}`" for name, other in ALGORITHMS.items() if other.references)
        yield key, f"not used by `{known.name}`, which has no reference model, only by {others}; remove it"
    if recipe.reference.quantization is not None:
        yield key, "`policy` holds the base as it is, and `reference.quantization` rounds it; set one of the two"
    for field, why in (
        ("sync_ref_model", "moves the reference model"),
        ("precompute_ref_log_probs", "asks the base once"),
        ("torch_compile", "compiles the policy, which may then compute differently without gradients"),
    ):
        if recipe.training.get(field):
            yield key, f"`policy` does not go with `training.{field}`, which {why}; remove one of them"


def _whole_norm(recipe: Recipe) -> Problems:
    micro_batches = recipe.training.get("gradient_accumulation_steps", 1)
    wanted = {
        "subnet.optimizer.clip_norm": recipe.subnet.optimizer.clip_norm == "full",
        "subnet.log_norms": recipe.subnet.log_norms,
    }
    for key in (key for key, is_wanted in wanted.items() if is_wanted and micro_batches != 1):
        yield (
            key,
            "needs the whole gradient of a step, which is gone when the next micro-batch comes; "
            f"`training.gradient_accumulation_steps` is {micro_batches}, set it to 1",
        )


def _audits(recipe: Recipe) -> Problems:
    steps = recipe.subnet.audit_steps
    if steps is not None and steps < 1:
        yield "subnet.audit_steps", f"must be >= 1, or null for no audits, got {steps}"


def _checkpoints(recipe: Recipe) -> Problems:
    size = recipe.subnet.save_total_bytes
    if size is not None and size < 1:
        yield "subnet.save_total_bytes", f"must be >= 1, or null for no limit, got {size}"
    asked = {"subnet.save_only_delta": recipe.subnet.save_only_delta, "subnet.save_total_bytes": size is not None}
    if recipe.training.get("save_strategy") == "no":
        for key in (key for key, is_asked in asked.items() if is_asked):
            yield key, "not used with `training.save_strategy: no`, which saves no checkpoints; remove one of them"
    pushes = recipe.training.get("push_to_hub") and recipe.training.get("hub_strategy", "every_save") == "every_save"
    if recipe.subnet.save_only_delta and pushes:
        yield (
            "subnet.save_only_delta",
            "leaves `training.hub_strategy: every_save` no dense weights to push; set that to `end` or `checkpoint`",
        )


def _trains_on_rows(recipe: Recipe) -> bool:
    """Whether the dataset's rows are the training data as they are, with no reference answers."""
    data = learns_from(recipe.algorithm)
    return data in ("preferences", "labelled") and recipe.task.dataset is not None and recipe.task.pairs is None


def _learning_data(recipe: Recipe) -> Problems:
    name, task = recipe.algorithm, recipe.task
    data = learns_from(name)
    if data in _SAMPLED and task.pairs is None and (data == "samples" or task.name != "dataset"):
        other = "" if data == "samples" else f", or use `name: dataset` with {_SAMPLED[data]}"
        yield "task.pairs", f"missing; `{name}` learns from {_WORDS[data]}: sample them with `pairs`{other}"
    if data == "prompts" and task.pairs is not None:
        yield "task.pairs", f"not used by `{name}`, which samples its own completions; remove it"
    if data == "demonstrations" and task.pairs is not None:
        yield "task.pairs", f"not used by `{name}`, which copies reference answers; remove it"
    if data in ("preferences", "labelled") and task.pairs is not None and task.pairs.max_right is not None:
        yield "task.pairs.max_right", f"not used by `{name}`, only by {_those_of('samples')}; remove it"
    if data not in (None, "demonstrations", "rationales") and task.completion is not None:
        users = _those_of("demonstrations", "rationales")
        yield "task.completion", f"not used by `{name}`, only by {users}; remove it"
    if data == "rationales" and task.pairs is not None:
        yield "task.pairs", f"not used by `{name}`, which learns what its teacher writes; remove it"
    if data == "rationales" and task.rationales is None:
        yield "task.rationales", f"missing; `{name}` learns from rationales: say how the teacher is made to reason"
    if data not in (None, "rationales") and task.rationales is not None:
        yield "task.rationales", f"not used by `{name}`, only by {_those_of('rationales')}; remove it"


def _those_of(*data: LearnsFrom) -> str:
    return ", ".join(f"`{name}`" for name, algorithm in ALGORITHMS.items() if algorithm.learns_from in data)


def _rationales(recipe: Recipe) -> Problems:
    spec, prefix = recipe.task.rationales, "task.rationales"
    if spec is None:
        return
    if spec.num_prompts > recipe.task.num_train > 0:
        yield (
            f"{prefix}.num_prompts",
            f"must be <= task.num_train ({recipe.task.num_train}), got {spec.num_prompts}",
        )
    if spec.answer_pattern is None and recipe.task.answer_pattern is None and spec.rationale_pattern is None:
        yield (
            f"{prefix}.answer_pattern",
            "missing, as is task.answer_pattern: without one the whole text is the answer, and no rationale is left",
        )
    for name in ("answer_pattern", "rationale_pattern"):
        yield from _one_group(f"{prefix}.{name}", getattr(spec, name))
    for name in ("prompt", "completion"):
        yield from _template(f"{prefix}.{name}", getattr(spec, name))
    if spec.label_prefix == spec.rationale_prefix:
        yield (
            f"{prefix}.rationale_prefix",
            f"must differ from `label_prefix`, or one prompt has two completions, got {show(spec.label_prefix)}",
        )


def _teacher(recipe: Recipe) -> Problems:
    known = ALGORITHMS.get(recipe.algorithm)
    if known is None:
        return
    if known.has_teacher and recipe.teacher is None:
        yield "teacher", f"missing; `{known.name}` learns from another model: name it, `teacher: {{name: ...}}`"
    if not known.has_teacher and recipe.teacher is not None:
        others = ", ".join(f"`{name}`" for name, other in ALGORITHMS.items() if other.has_teacher)
        yield "teacher", f"not used by `{known.name}`, only by {others}; remove it"


def _task_rewards(recipe: Recipe) -> Problems:
    if trains_reward_model(recipe.algorithm) and recipe.task.rewards != TaskSpec(name="").rewards:
        yield (
            "task.rewards",
            f"not used by `{recipe.algorithm}`, which learns a reward from pairs: the right completion against the "
            f"wrong one; remove it, got {show(recipe.task.rewards)}",
        )


def _amount_to_train(recipe: Recipe) -> Problems:
    pairs: PairsSpec | None = recipe.task.pairs
    if recipe.task.num_train == 0:
        yield "task.num_train", "missing, must be >= 1"
    elif pairs is not None and pairs.num_prompts > recipe.task.num_train:
        yield (
            "task.pairs.num_prompts",
            f"must be <= task.num_train ({recipe.task.num_train}), got {pairs.num_prompts}",
        )


def _evaluation(recipe: Recipe) -> Problems:
    evaluation = recipe.evaluation
    if not evaluation.enabled:
        return
    if trains_reward_model(recipe.algorithm):
        if evaluation.task is not None:
            pairs = "pairs of the held-out prompts of `task`" if recipe.task.pairs else "rows of `dataset.eval_split`"
            yield "evaluation.task", f"not used by `{recipe.algorithm}`, which is judged on {pairs}; remove it"
        if recipe.task.num_eval == 0:
            yield "task.num_eval", "missing, must be >= 1, or set `evaluation.enabled: false` to compare weights only"
    elif evaluation.task is not None:
        if evaluation.task.num_eval == 0:
            yield "evaluation.task.num_eval", "missing, must be >= 1"
        if evaluation.task.pairs is not None:
            yield "evaluation.task.pairs", "not used in evaluation; remove it"
        if evaluation.task.completion is not None:
            yield "evaluation.task.completion", "not used in evaluation; remove it"
        if evaluation.task.rationales is not None:
            yield "evaluation.task.rationales", "not used in evaluation; remove it"
    elif _trains_on_rows(recipe):
        yield (
            "evaluation.task",
            "missing; preferences and labels have no right answer to count, so name a task that has one, or set "
            "`evaluation.enabled: false` to compare weights only",
        )
    elif recipe.task.num_eval == 0:
        yield "task.num_eval", "missing, must be >= 1, or set `evaluation.enabled: false` to compare weights only"


def _output(recipe: Recipe) -> Problems:
    if not recipe.output.strip():
        yield "output", f"must name a folder, got {show(recipe.output)}"


def _check_task(parser: Parser, prefix: str, task: TaskSpec) -> None:
    rules: list[tuple[tuple[str, ...], Callable[[TaskSpec], Problems]]] = [
        (("name", "dataset", "params", "answer"), _task_data),
        (("chat", "system_prompt"), _task_chat),
        (("prompt",), lambda task: _template("prompt", task.prompt)),
        (("answer",), lambda task: _template("answer", task.answer)),
        (("completion",), lambda task: _template("completion", task.completion)),
        (("answer_pattern",), _answer_pattern),
        (("rewards",), _rewards),
    ]
    for names, rule in rules:
        if parser.is_usable(*(f"{prefix}.{name}" for name in names)):
            for name, message in rule(task):
                parser.report(f"{prefix}.{name}", message)


def _task_data(task: TaskSpec) -> Problems:
    family, _, name = task.name.partition("/")
    if task.name == "dataset":
        if task.dataset is None:
            yield "dataset", "missing; `name: dataset` needs `dataset: {path: ...}`"
        if task.params:
            yield "params", "only for `reasoning_gym/...`; describe a dataset under `dataset`"
        return
    if family != "reasoning_gym" or not name:
        choices = [f"reasoning_gym/{name or 'DATASET'}", "dataset"]
        close = difflib.get_close_matches(task.name, choices, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        yield "name", f"must be `reasoning_gym/DATASET` or `dataset`, got {show(task.name)}{hint}"
        return
    if task.dataset is not None:
        yield "dataset", f"only for `name: dataset`, but the name is {show(task.name)}"
    if task.answer is not None:
        yield "answer", "only for `name: dataset`; reasoning-gym brings its own answers"


def _task_chat(task: TaskSpec) -> Problems:
    if task.system_prompt is not None and not task.chat:
        yield "system_prompt", "needs `chat: true`; a plain prompt has no system message"


def _template(name: str, template: str | None) -> Problems:
    try:
        list(string.Formatter().parse(template or ""))
    except ValueError as error:
        yield name, f"not a format template ({error}); write a literal brace twice, got {show(template)}"


def _answer_pattern(task: TaskSpec) -> Problems:
    yield from _one_group("answer_pattern", task.answer_pattern)


def _one_group(key: str, pattern: str | None) -> Problems:
    if pattern is None:
        return
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        yield key, f"not a regular expression ({error}), got {show(pattern)}"
        return
    if groups != 1:
        what = key.rpartition(".")[2].partition("_")[0]
        yield (
            key,
            f"must have exactly one group, around the {what}, got {groups} in {show(pattern)}; "
            "write other groups as `(?:...)`",
        )


def _rewards(task: TaskSpec) -> Problems:
    if not task.rewards:
        yield "rewards", "must name at least one reward, got []"
    for reward in task.rewards:
        if not _REWARD.fullmatch(reward):
            close = difflib.get_close_matches(reward, ["correct", "score"], n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            yield "rewards", f"must be `correct`, `score` or `package.module:function`, got {show(reward)}{hint}"
