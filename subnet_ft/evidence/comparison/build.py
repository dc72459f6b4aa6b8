"""Assembles a comparison from what the runs left behind; pure functions, nothing is read or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    `memory`."""
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
    environment: Mapping[str, Any],
    seed: int,
) -> MethodComparison:
    """Put methods beside each other.

    Args:
        version: Version of subnet-ft.
        base_records: The base model's answers.
        methods: In the order of the table, each name once.
        confidence: Of every interval.
        recipe: The resolved recipe.
        environment: Hardware and versions; a true value under `gpu` says that times are a GPU's.
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
    return MethodComparison(
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
        environment=as_json(environment),
        recipe=as_json(recipe),
        seed=seed,
        not_measured=_gaps(methods, accuracy, environment, seed, judged_on),
        judged_on=judged_on,
    )


def _gaps(
    methods: Sequence[MethodEvidence],
    accuracy: Mapping[str, Any],
    environment: Mapping[str, Any],
    seed: int,
    judged_on: str,
) -> list[str]:
    """Say what this comparison cannot know."""
    gaps = []
    missing = [name for name, found in accuracy.items() if found is None]
    if missing:
        gaps.append(f"Accuracy of {', '.join(missing)}.")
    gaps.append(
        f"Variation between seeds: every run has seed {seed}. Intervals cover the choice of {judged_on}, not another "
        "training, and no correction is made for the number of methods."
    )
    gaps.append(
        "Whether each method ran with its best settings: a learning rate found for one says little about another. The "
        "settings of each stand in the table."
    )
    gaps.append("Activations and logits, which come on top of the memory that lives from step to step.")
    resumed = [entry.method for entry in methods if entry.results.get("resumed_from")]
    if resumed:
        gaps.append(f"The whole training time of {', '.join(resumed)}: an interrupted run's time is that of its end.")
    if "subnet" in {entry.method for entry in methods}:
        gaps.append(
            "The cost of the subnetwork's mask, which needs a finished full run unless the recipe names another source."
        )
    if not environment.get("gpu"):
        gaps.append("Speed and memory on a GPU.")
    return gaps
