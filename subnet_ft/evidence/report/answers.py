"""Answers to held-out prompts: which were right, how models differ, and a few to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from subnet_ft.errors import TaskError
from subnet_ft.evidence.paired_tests import counted_tests
from subnet_ft.evidence.report.run_evidence import RunEvidence
from subnet_ft.evidence.report.schema import Accuracy, Answered, Difference, Sample
from subnet_ft.evidence.statistics import PairedDifference, paired_difference, wilson_interval
from subnet_ft.evidence.verdict import two_one_sided

_NUM_SAMPLES = 5


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


def differences_of(
    solved: Mapping[str, NDArray[np.bool_] | None], base: str, full: str, subnet: str, confidence: float
) -> list[Difference]:
    """Compare the full run with the base, every run with the full run, and the subnetwork with every other run.

    Args:
        solved: Name to (n,) outcomes, `None` where a model answered nothing.
        base: Name of the base model.
        full: Name of the full run.
        subnet: Name of the subnetwork run.
        confidence: Of the intervals; against the full run there is the verdict's narrower one, too.
    """
    others = [name for name in solved if name not in (base, full, subnet)]
    # The verdict's own interval, the two one-sided tests', stands beside the one at full confidence.
    wanted = [(full, base, confidence)]
    wanted += [(run, full, level) for run in (subnet, *others) for level in (two_one_sided(confidence), confidence)]
    wanted += [(subnet, other, confidence) for other in others]
    found = []
    for first, second, level in wanted:
        a, b = solved[first], solved[second]
        if a is not None and b is not None:
            found.append(difference_of(first, second, paired_difference(a, b, confidence=level)))
    return found


def difference_of(first: str, second: str, paired: PairedDifference) -> Difference:
    """Name the two models of a paired difference."""
    tests = counted_tests(paired)
    return Difference(
        first,
        second,
        paired.difference,
        paired.low,
        paired.high,
        round(paired.confidence, 12),
        paired.only_first,
        paired.only_second,
        tests.bootstrap_low,
        tests.bootstrap_high,
        tests.mcnemar_p,
    )


def samples_of(models: Sequence[RunEvidence]) -> list[Sample]:
    """Return a few prompts, evenly spaced, with every model's answer."""
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
