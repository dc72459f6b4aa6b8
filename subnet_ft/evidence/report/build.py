"""Assembles a report from what a run left behind; pure functions, nothing is read or written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from subnet_ft.errors import TaskError
from subnet_ft.evidence.report.schema import Accuracy, Answered, Density, Difference, MaskInfo, Report, Sample
from subnet_ft.evidence.statistics import PairedDifference, paired_difference, wilson_interval
from subnet_ft.evidence.verdict import Comparison, Verdict, above_control, two_one_sided, verdict
from subnet_ft.evidence.weights import WeightComparison
from subnet_ft.masks.density import layer_and_kind

if TYPE_CHECKING:
    from subnet_ft.masks import SubnetMask

_NUM_SAMPLES = 5
# The control that speaks most against the subnetwork comes first.
_ANSWER_RANK = {"no": 0, "undecided": 1, "yes": 2}
_VERDICT_RANK = {"recovered": 0, "undecided": 1, "not_recovered": 2}


@dataclass(frozen=True)
class RunEvidence:
    """What one model left behind; everything but the name may be missing."""

    name: str
    """Unique among the models of a report, such as `full` or `control-uniform`."""
    records: Sequence[Mapping[str, Any]] | None = None
    """One per held-out prompt or pair: prompt, completion, answer, score, correct; see `evidence.accuracy` and
    `evidence.pairs`."""
    log_history: Sequence[Mapping[str, Any]] = ()
    """The trainer's log."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage to time, such as train and evaluate."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Component to bytes, such as weights, gradients, moments; keys that start with `peak` are process totals."""
    weights: WeightComparison | None = None
    """Against the base model and the full run."""


def build_report(
    *,
    version: str,
    base: RunEvidence,
    full: RunEvidence,
    subnet: RunEvidence,
    controls: Sequence[RunEvidence] = (),
    mask: SubnetMask | None = None,
    mask_seconds: float | None = None,
    margin: float = 0.02,
    confidence: float = 0.95,
    recipe: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (),
    title: str | None = None,
    not_measured: Sequence[str] = (),
) -> Report:
    """Judge a subnetwork and gather the evidence.

    Args:
        version: Version of subnet-ft.
        base: The base model.
        full: The full run.
        subnet: The subnetwork run.
        controls: Runs under masks of equal size.
        mask: The subnetwork's mask.
        mask_seconds: Time to make it, without the run that it was extracted from.
        margin: Largest difference in accuracy that counts as none.
        confidence: Confidence of every claim.
        recipe: The resolved recipe.
        environment: Hardware and versions; a true value under `gpu` says that times are a GPU's.
        seeds: Seeds of training.
        title: What was run; made from the recipe when `None`.
        not_measured: Further sentences for the section of that name.

    Raises:
        TaskError: Two models answered different prompts.
        ValueError: Names are not unique, or `margin` or `confidence` is out of range.
    """
    models = [base, full, subnet, *controls]
    names = [model.name for model in models]
    if len(set(names)) != len(names):
        raise ValueError(f"Every model of a report needs its own name, got {', '.join(names)}.")
    check_same_prompts(models)
    solved = {model.name: solved_prompts(model) for model in models}

    judged_on = what_was_judged(models)

    def judge(name: str, subject: str) -> Verdict:
        runs = solved[base.name], solved[full.name], solved[name]
        return verdict(*runs, margin=margin, confidence=confidence, subject=subject, judged_on=judged_on)

    result = judge(subnet.name, "subnetwork")
    control_verdicts: dict[str, Verdict] = {}
    comparisons: dict[str, Comparison] = {}
    for control in controls:
        outcomes, ours = solved[control.name], solved[subnet.name]
        control_verdicts[control.name] = judge(control.name, "control")
        if outcomes is not None and ours is not None:
            comparisons[control.name] = above_control(ours, outcomes, margin=margin, confidence=confidence)

    def against(name: str) -> tuple[int, int]:
        answer = comparisons[name].answer if name in comparisons else "undecided"
        return _ANSWER_RANK[answer], _VERDICT_RANK.get(control_verdicts[name].name, 1)

    recipe, environment = dict(recipe or {}), dict(environment or {})
    measured = [outcomes for outcomes in solved.values() if outcomes is not None]
    return Report(
        version=version,
        title=title or title_of(recipe),
        verdict=result.name,
        verdict_reason=result.reason,
        base=base.name,
        full=full.name,
        subnet=subnet.name,
        controls=sorted(control_verdicts, key=against),
        control_verdicts=control_verdicts,
        above_control=comparisons,
        margin=margin,
        confidence=confidence,
        num_prompts=len(measured[0]) if measured else 0,
        accuracy={name: accuracy_of(values, confidence) for name, values in solved.items() if values is not None},
        differences=_differences(solved, base.name, full.name, subnet.name, confidence),
        weights={model.name: model.weights for model in models if model.weights is not None},
        density=_density(mask) if mask is not None else None,
        mask=_mask_info(mask, mask_seconds) if mask is not None else None,
        curves={model.name: _curve(model.log_history) for model in models if model.log_history},
        seconds={model.name: dict(model.seconds) for model in models if model.seconds},
        memory={model.name: dict(model.memory) for model in models if model.memory},
        environment=plain(environment),
        recipe=plain(recipe),
        seeds=list(seeds),
        samples=_samples(models),
        not_measured=[*_gaps(models, solved, environment, seeds, judged_on), *not_measured],
        judged_on=judged_on,
    )


def solved_prompts(model: RunEvidence) -> NDArray[np.bool_] | None:
    """Return which held-out prompts a model solved, as (n,) bools; `None` where it answered none."""
    if not model.records:
        return None
    return np.array([bool(record["correct"]) for record in model.records], dtype=np.bool_)


def check_same_prompts(models: Sequence[RunEvidence]) -> None:
    """Refuse models that answered different prompts."""
    answered = [model for model in models if model.records]
    for model in answered[1:]:
        ours, theirs = ([text(record["prompt"]) for record in m.records or ()] for m in (model, answered[0]))
        if len(ours) != len(theirs):
            raise TaskError(
                f"`{model.name}` answered {len(ours)} prompts and `{answered[0].name}` {len(theirs)}; a paired "
                "comparison needs the same prompts. Evaluate both again with one recipe."
            )
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if one != other:
                raise TaskError(
                    f"Prompt {index} of `{model.name}` is {one!r}, that of `{answered[0].name}` is {other!r}; a paired "
                    "comparison needs the same prompts. Evaluate both again with one recipe."
                )


def what_was_judged(models: Sequence[RunEvidence]) -> Literal["prompts", "pairs"]:
    """Tell from the records what they are of."""
    first = next((record for model in models for record in model.records or ()), {})
    return "pairs" if "chosen_reward" in first else "prompts"


def accuracy_of(solved: NDArray[np.bool_], confidence: float) -> Accuracy:
    """Return the accuracy of (n,) bools with its Wilson interval."""
    correct, n = int(solved.sum()), len(solved)
    low, high = wilson_interval(correct, n, confidence)
    return Accuracy(accuracy=correct / n, num_prompts=n, correct=correct, ci_low=low, ci_high=high)


def _differences(
    solved: Mapping[str, NDArray[np.bool_] | None], base: str, full: str, subnet: str, confidence: float
) -> list[Difference]:
    controls = [name for name in solved if name not in (base, full, subnet)]
    runs = [subnet, *controls]
    # The verdict's own interval, the two one-sided tests', stands beside the one at full confidence.
    wanted = [(full, base, confidence)]
    wanted += [(run, full, level) for run in runs for level in (two_one_sided(confidence), confidence)]
    wanted += [(subnet, control, confidence) for control in controls]
    found = []
    for first, second, level in wanted:
        a, b = solved[first], solved[second]
        if a is not None and b is not None:
            found.append(difference_of(first, second, paired_difference(a, b, confidence=level)))
    return found


def difference_of(first: str, second: str, paired: PairedDifference) -> Difference:
    """Name the two models of a paired difference."""
    return Difference(
        first,
        second,
        paired.difference,
        paired.low,
        paired.high,
        round(paired.confidence, 12),
        paired.only_first,
        paired.only_second,
    )


def _density(mask: SubnetMask) -> Density:
    by_layer_and_kind: dict[str, dict[str, float]] = {}
    for name, tensor in mask.tensors.items():
        layer, kind = layer_and_kind(name)
        by_layer_and_kind.setdefault(layer, {})[kind] = tensor.count / max(tensor.num_elements, 1)
    return Density(
        overall=mask.density,
        by_layer=mask.density_by_layer(),
        by_kind=mask.density_by_kind(),
        by_layer_and_kind=by_layer_and_kind,
        by_tolerance=dict(mask.provenance.density_by_tolerance),
    )


def _mask_info(mask: SubnetMask, seconds: float | None) -> MaskInfo:
    origin = mask.provenance
    return MaskInfo(
        num_trainable=mask.num_trainable,
        num_parameters=mask.num_parameters,
        fingerprint=mask.fingerprint,
        criterion=origin.criterion,
        tolerance=origin.tolerance,
        compare_dtype=origin.compare_dtype,
        source=plain(origin.source),
        base=origin.base.name if origin.base else None,
        tuned=origin.tuned.name if origin.tuned else None,
        seconds=seconds,
    )


def _curve(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Keep the finite numbers of every logged step; the trainer's closing summary is not a step."""
    curve = []
    for entry in log_history:
        if "train_runtime" in entry or "step" not in entry:
            continue
        numbers = {key: value for key, value in entry.items() if isinstance(value, (int, float))}
        curve.append({key: value for key, value in numbers.items() if math.isfinite(value)})
    return curve


def _samples(models: Sequence[RunEvidence]) -> list[Sample]:
    answered = [model for model in models if model.records]
    if not answered:
        return []
    first = list(answered[0].records or ())
    count = min(_NUM_SAMPLES, len(first))
    samples = []
    for index in [number * len(first) // count for number in range(count)]:
        answers = {}
        for model in answered:
            record = list(model.records or ())[index]
            answers[model.name] = Answered(text(record["completion"]), bool(record["correct"]))
        samples.append(Sample(text(first[index]["prompt"]), text(first[index].get("answer", "")), answers))
    return samples


def text(value: Any) -> str:
    """Return a prompt or completion as text; a conversation becomes one line per message."""
    if isinstance(value, list):
        return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in value)
    return str(value)


def title_of(recipe: Mapping[str, Any]) -> str:
    """Say in a few words what a recipe runs."""
    parts = [recipe.get("algorithm"), recipe.get("task", {}).get("name"), recipe.get("model", {}).get("name")]
    known = [str(part) for part in parts if part]
    return " · ".join([known[0].upper(), *known[1:]] if recipe.get("algorithm") else known)


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that JSON can hold: what it has no form for becomes its string, NaN and infinity null."""
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
    return plain


def _gaps(
    models: Sequence[RunEvidence],
    solved: Mapping[str, NDArray[np.bool_] | None],
    environment: Mapping[str, Any],
    seeds: Sequence[int],
    judged_on: str,
) -> list[str]:
    """Say what this report cannot know."""
    gaps = []
    missing = [name for name, outcomes in solved.items() if outcomes is None]
    if missing:
        gaps.append(f"Accuracy of {', '.join(missing)}.")
    if len(set(seeds)) <= 1:
        known = f"every run has seed {seeds[0]}. Intervals" if seeds else "intervals"
        gaps.append(f"Variation between seeds: {known} cover the choice of {judged_on}, not another training.")
    gaps.append("The floor: how far two full runs that differ only in their seed lie from each other.")
    if len(models) == 3:
        gaps.append(
            "A control: no mask of equal size was trained. Random masks can match full finetuning, so without one a "
            "recovery says nothing about this mask."
        )
    if judged_on == "pairs":
        gaps.append("By how much the reward models differ, beyond which completion of a pair gets more reward.")
        gaps.append("Other pairs than those of this task, and what a policy becomes that is trained on the reward.")
    else:
        gaps.append("The distance between the models' output distributions (KL), beyond whether answers are correct.")
        gaps.append("Other tasks than the one evaluated here, and sampled instead of greedy answers.")
    if not environment.get("gpu"):
        gaps.append("Speed and memory on a GPU.")
    return gaps
