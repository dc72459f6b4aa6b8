"""EleutherAI's evaluation harness as a further evaluator: its tasks on a model of ours, prompt by prompt.

The harness brings hundreds of data sets and their scoring; what it lacks is a comparison of two models on the same
prompts. So its outcomes are kept prompt by prompt, and two files of them are compared with the paired statistics that
our own tasks get.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from subnet_ft.errors import MissingDependencyError, TaskError
from subnet_ft.evidence.paired_tests import PairedTests, paired_tests
from subnet_ft.evidence.plain import from_plain
from subnet_ft.evidence.statistics import PairedDifference, paired_difference, wilson_interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 1
"""Version of the file."""


@dataclass(frozen=True)
class HarnessMetric:
    """One metric of a task."""

    value: float
    """As the harness sums it up; a share of prompts where `correct` is there."""
    low: float | None
    """Lower end of the share's Wilson interval; `None` for a metric that is no share."""
    high: float | None
    """Upper end."""
    correct: list[bool] | None
    """Prompt by prompt; `None` where a prompt's value is not 0 or 1, or the whole is not their mean."""


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness, judged."""

    prompts: list[str]
    """Hash of each prompt, shown examples included, and of its target: what two models must share to be compared."""
    metrics: dict[str, HarnessMetric]
    """By the harness's name of metric and filter, such as `acc,none` or `exact_match,strict-match`."""


@dataclass(frozen=True)
class HarnessResults:
    """What the harness found of a model."""

    model: str
    """The model's name."""
    harness: str
    """Version of lm-eval."""
    confidence: float
    """Two-sided confidence of the intervals."""
    tasks: dict[str, HarnessTask]
    """By the harness's name; a group is there as its tasks."""


@dataclass(frozen=True)
class HarnessDifference:
    """One metric of two models on the same prompts, first minus second."""

    task: str
    metric: str
    accuracy: PairedDifference
    """With Tango's interval, as in a verdict."""
    tests: PairedTests
    """McNemar's test and a bootstrap beside it."""


def evaluate_with_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    name: str,
    limit: int | None = None,
    chat: bool = False,
    tasks_from: str | Path | None = None,
    batch_size: int = 8,
    confidence: float = 0.95,
    seed: int = 0,
) -> HarnessResults:
    """Judge a model on tasks of the harness.

    Args:
        model: A causal language model, adapted or not; its mode and torch's random state are left as they were.
        tokenizer: Its tokenizer.
        tasks: Names or patterns of tasks, groups and tags, such as `arc_easy` or `mmlu_*`.
        name: What the results call the model.
        limit: The first so many prompts of each task; `None` for all.
        chat: Render prompts with the tokenizer's chat template.
        tasks_from: Folder of further tasks as the harness describes them, in YAML; the harness's own are looked at only
            where this one lacks a name.
        batch_size: Prompts at a time.
        confidence: Of the intervals, in (0, 1).
        seed: Of sampling, for tasks that sample, and of the choice of shown examples.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        TaskError: There is no such task, or the harness refuses it or cannot load its data.
    """
    import torch

    harness, wrapper, manager = _harness(tasks, tasks_from)
    chosen = {wanted: manager.match_tasks([wanted]) for wanted in tasks}
    unknown = [wanted for wanted, matches in chosen.items() if not matches]
    if unknown or not chosen:
        raise TaskError(
            f"lm-eval has no task `{', '.join(unknown)}`. `lm-eval ls tasks` lists its own; for tasks of yours, name "
            "their folder with --tasks-from."
        )
    training = model.training
    try:
        with torch.random.fork_rng():
            found: Any = harness.simple_evaluate(
                model=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(dict.fromkeys(match for matches in chosen.values() for match in matches)),
                task_manager=manager,
                limit=limit,
                apply_chat_template=chat,
                log_samples=True,
                bootstrap_iters=0,  # its standard errors are not used
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except (OSError, ValueError, ImportError) as error:  # data that is not there, unsafe tasks, a task's own packages
        raise TaskError(f"lm-eval could not judge `{', '.join(tasks)}`: {error}") from error
    finally:
        model.train(training)
    judged = {task: _task(found["results"][task], samples, confidence) for task, samples in found["samples"].items()}
    return HarnessResults(name, harness.__version__, confidence, judged)


def harness_differences(first: HarnessResults, second: HarnessResults) -> list[HarnessDifference]:
    """Compare two models task by task, on every metric that says of each prompt whether it was solved.

    Raises:
        TaskError: They share no such metric, or a task's prompts are not the same.
    """
    differences = []
    for name, ours in first.tasks.items():
        theirs = second.tasks.get(name)
        if theirs is None:
            continue
        if ours.prompts != theirs.prompts:
            raise TaskError(
                f"`{first.model}` and `{second.model}` answered other prompts of `{name}` ({len(ours.prompts)} and "
                f"{len(theirs.prompts)}). Judge both with the same limit, chat template and version of lm-eval "
                f"(here {first.harness} and {second.harness})."
            )
        for metric, entry in ours.metrics.items():
            other = theirs.metrics.get(metric)
            if entry.correct is None or other is None or other.correct is None:
                continue
            outcomes = np.array(entry.correct, dtype=np.bool_), np.array(other.correct, dtype=np.bool_)
            differences.append(
                HarnessDifference(
                    name,
                    metric,
                    paired_difference(*outcomes, confidence=first.confidence),
                    paired_tests(*outcomes, confidence=first.confidence),
                )
            )
    if not differences:
        raise TaskError(
            f"`{first.model}` and `{second.model}` share no task with a metric that is right or wrong: "
            f"{', '.join(first.tasks)} and {', '.join(second.tasks)}."
        )
    return differences


def write_harness_results(results: HarnessResults, path: str | Path) -> None:
    """Save results, to compare with another model's."""
    Path(path).write_text(json.dumps({"format": FORMAT, **asdict(results)}) + "\n", encoding="utf-8")


def read_harness_results(path: str | Path) -> HarnessResults:
    """Read what `write_harness_results` saved.

    Raises:
        TaskError: The file cannot be read, or holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise TypeError(f"it is not of format {FORMAT}.")
        return from_plain(HarnessResults, found)
    except (OSError, ValueError, TypeError) as error:
        raise TaskError(
            f"`{path}` does not hold results of `subnet-ft evaluate --lm-eval`: {error} Evaluate the model again."
        ) from error


def _harness(tasks: Sequence[str], tasks_from: str | Path | None) -> tuple[Any, Any, Any]:
    """Return the harness, its wrapper of models, and a table of tasks that has those wanted, if there are such."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependencyError("lm_eval", "to judge by the tasks of lm-eval", "lm-eval") from error
    folder = None if tasks_from is None else str(tasks_from)
    if folder is not None:
        # Reading the thousands of files of the harness's own tasks takes seconds.
        manager = TaskManager(include_path=folder, include_defaults=False)
        if all(manager.match_tasks([wanted]) for wanted in tasks):
            return lm_eval, HFLM, manager
    return lm_eval, HFLM, TaskManager(include_path=folder)


def _task(summary: dict[str, Any], samples: list[dict[str, Any]], confidence: float) -> HarnessTask:
    """Sort the harness's samples, one per prompt and filter, by metric.

    Args:
        summary: Metric and filter to the value over all prompts, among other things.
        samples: The task's.
        confidence: Of the intervals.
    """
    by_filter: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    metrics = {}
    for name, rows in by_filter.items():
        rows.sort(key=lambda row: int(row["doc_id"]))
        for metric in rows[0]["metrics"]:
            value = summary.get(f"{metric},{name}")
            if isinstance(value, float | int | np.number):
                metrics[f"{metric},{name}"] = _metric(float(value), [row[metric] for row in rows], confidence)
    rows = next(iter(by_filter.values()))
    return HarnessTask([f"{row['prompt_hash']}-{row['target_hash']}" for row in rows], metrics)


def _metric(value: float, values: list[Any], confidence: float) -> HarnessMetric:
    # A metric that is summed up in another way has no paired difference of means: F1 of all prompts, perplexity.
    is_share = all(isinstance(entry, bool | int | float | np.number) and entry in (0, 1) for entry in values)
    if not is_share or abs(sum(map(float, values)) / len(values) - value) > 1e-9:
        return HarnessMetric(value, None, None, None)
    correct = [bool(entry) for entry in values]
    return HarnessMetric(value, *wilson_interval(sum(correct), len(correct), confidence), correct)
