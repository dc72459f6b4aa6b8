"""Assembles a comparison from what the runs left behind; pure functions, nothing is read or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from subnet_ft.evidence.comparison.schema import MethodComparison, MethodResult, QuantizedCopy
from subnet_ft.evidence.plain import as_json
from subnet_ft.evidence.report.answers import (
    accuracy_of,
    check_same_prompts,
    difference_of,
    solved_prompts,
    what_was_judged,
)
from subnet_ft.evidence.report.build import title_of
from subnet_ft.evidence.report.run_evidence import RunEvidence
from subnet_ft.evidence.report.schema import Difference
from subnet_ft.evidence.statistics import paired_difference


@dataclass(frozen=True)
class CopyEvidence:
    """A quantized copy of one result."""

    quantization: str
    records: Sequence[Mapping[str, Any]] | None
    """One per held-out prompt, as in `RunEvidence`."""
    checkpoint_bytes: int


@dataclass(frozen=True)
class MethodEvidence:
    """What one method's run left behind; the fields are those of `MethodResult`."""

    method: str
    trains: str
    results: Mapping[str, Any]
    """Of its stage: `num_trainable`, `num_parameters`, `num_steps`, `train_seconds`, `step_seconds`, `resumed_from`,
    `memory`, `environment`; a true value under `gpu` there says that its times are a GPU's."""
    checkpoint_bytes: int
    patch_bytes: int | None
    training: Mapping[str, Any]
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]] | None = None
    """One per held-out prompt."""
    copies: Sequence[CopyEvidence] = field(default_factory=tuple)
    """Quantized copies."""


def build_comparison(
    *,
    version: str,
    base_records: Sequence[Mapping[str, Any]] | None,
    methods: Sequence[MethodEvidence],
    confidence: float,
    recipe: Mapping[str, Any],
    seed: int,
) -> MethodComparison:
    """Put methods beside each other.

    Args:
        version: Version of subnet-ft.
        base_records: The base model's answers.
        methods: In the order of the table, each name once.
        confidence: Of every interval.
        recipe: The resolved recipe.
        seed: Of every run.

    Raises:
        TaskError: Two models answered different prompts.
    """
    runs = {"base": RunEvidence("base", records=base_records)}
    for entry in methods:
        runs[entry.method] = RunEvidence(entry.method, records=entry.records)
        for copy in entry.copies:
            name = f"{entry.method} {copy.quantization}"
            runs[name] = RunEvidence(name, records=copy.records)
    check_same_prompts(list(runs.values()))
    judged_on = what_was_judged(list(runs.values()))
    solved = {name: solved_prompts(run) for name, run in runs.items()}
    accuracy = {name: None if found is None else accuracy_of(found, confidence) for name, found in solved.items()}

    def difference(first: str, second: str) -> Difference | None:
        a, b = solved.get(first), solved.get(second)
        if a is None or b is None or first == second:
            return None
        return difference_of(first, second, paired_difference(a, b, confidence=confidence))

    wanted = [(entry.method, other) for entry in methods for other in ("base", "full")]
    measured = [found for found in solved.values() if found is not None]
    compared = MethodComparison(
        version=version,
        title=title_of(recipe),
        confidence=confidence,
        num_prompts=len(measured[0]) if measured else 0,
        base=accuracy["base"],
        methods=[
            MethodResult(
                method=entry.method,
                trains=entry.trains,
                num_trainable=entry.results["num_trainable"],
                num_parameters=entry.results["num_parameters"],
                num_steps=entry.results["num_steps"],
                # A run that was resumed after its last step has measured none.
                step_seconds=entry.results.get("step_seconds") or None,
                train_seconds=entry.results["train_seconds"],
                resumed_from=entry.results.get("resumed_from"),
                memory=dict(entry.results["memory"]),
                checkpoint_bytes=entry.checkpoint_bytes,
                patch_bytes=entry.patch_bytes,
                training=as_json(entry.training),
                config=as_json(entry.config),
                accuracy=accuracy[entry.method],
                environment=as_json(entry.results["environment"]),
            )
            for entry in methods
        ],
        differences=[found for pair in wanted if (found := difference(*pair)) is not None],
        quantized=[
            QuantizedCopy(
                method=entry.method,
                quantization=copy.quantization,
                checkpoint_bytes=copy.checkpoint_bytes,
                accuracy=accuracy[f"{entry.method} {copy.quantization}"],
                difference=difference(f"{entry.method} {copy.quantization}", entry.method),
            )
            for entry in methods
            for copy in entry.copies
        ],
        environment=_common([entry.results["environment"] for entry in methods]),
        recipe=as_json(recipe),
        seed=seed,
        not_measured=[],
        judged_on=judged_on,
    )
    return replace(compared, not_measured=_gaps(compared, accuracy))


def _common(environments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what mappings have in common, key by key."""
    if not environments:
        return {}
    common = {}
    for key, value in environments[0].items():
        others: list[Any] = [environment.get(key) for environment in environments]
        if all(other == value for other in others):
            common[key] = value
        elif all(isinstance(other, Mapping) for other in others):
            common[key] = _common(others)
    return common


def _gaps(comparison: MethodComparison, accuracy: Mapping[str, Any]) -> list[str]:
    """Say what this comparison cannot know."""
    gaps, methods = [], comparison.methods
    missing = [name for name, found in accuracy.items() if found is None]
    if missing:
        gaps.append(f"Accuracy of {', '.join(missing)}.")
    gaps.append(
        f"Variation between seeds: every run has seed {comparison.seed}. Intervals cover the choice of "
        f"{comparison.judged_on}, not another training, and no correction is made for the number of methods."
    )
    gaps.append(
        "Whether each method ran with its best settings: a learning rate found for one says little about another. The "
        "settings of each stand in the table."
    )
    gaps.append("Activations and logits, which come on top of the memory that lives from step to step.")
    resumed = [result.method for result in methods if result.resumed_from]
    if resumed:
        gaps.append(f"The whole training time of {', '.join(resumed)}: an interrupted run's time is that of its end.")
    if "subnet" in {result.method for result in methods}:
        gaps.append(
            "The cost of the subnetwork's mask, which needs a finished full run unless the recipe names another source."
        )
    differing = comparison.differing_conditions
    if differing:
        gaps.append(
            f"Times and peaks of memory beside each other, as the runs had other conditions: {_in_words(differing)}."
        )
    if not any(result.environment.get("gpu") for result in methods):
        gaps.append("Speed and memory on a GPU.")
    return gaps


def _in_words(differing: Mapping[str, Mapping[str, Any]]) -> str:
    """Return sentences such as `torch_threads 1 (full, lora) and 2 (subnet)`."""
    words = []
    for key, by_method in differing.items():
        methods: dict[str, list[str]] = {}
        for method, value in by_method.items():
            methods.setdefault("none" if value is None else str(value), []).append(method)
        words.append(f"{key} " + " and ".join(f"{value} ({', '.join(names)})" for value, names in methods.items()))
    return "; ".join(words)
