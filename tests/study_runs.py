"""Studies for tests: short real ones on the tiny model, and results made up to be worded and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from subnet_ft.evidence.overlap import MaskOverlap, Overlap
from subnet_ft.evidence.report.answers import accuracy_of, difference_of
from subnet_ft.evidence.report.schema import Accuracy
from subnet_ft.evidence.statistics import paired_difference
from subnet_ft.studies.execution import Study
from subnet_ft.studies.names import QUESTIONS
from subnet_ft.studies.plan import AS_WRITTEN, Plan
from subnet_ft.studies.plans import plan_study
from subnet_ft.studies.schema import CellResult, MaskResult, StudyReport

SHORT = [
    "training.max_steps=8", "training.save_steps=8", "task.num_train=120", "task.num_eval=40",
    "subnet.source.tolerance=0.004",
]  # fmt: skip
N = 400


def plan_of(name: str, folder: Path, *overrides: str, only: Sequence[str] = (), recipe: str = "tiny/grpo") -> Plan:
    """Plan a short study of a recipe of the tiny model in `folder`."""
    plan = plan_study(name, recipe, [*SHORT, f"output={folder}", *overrides])
    return plan.only(only) if only else plan


def study_of(name: str, folder: Path, *overrides: str, only: Sequence[str] = ()) -> Study:
    """Return a short study that is ready to run."""
    return Study(plan_of(name, folder, *overrides, only=only))


def accuracy(share: float) -> Accuracy:
    """Return an accuracy on `N` prompts."""
    return accuracy_of(solved(share), 0.95)


def solved(share: float) -> Any:
    """Return (N,) bools of which the first are true."""
    import numpy as np

    return np.arange(N) < round(share * N)


def cell(name: str, share: float | None = 0.5, *, versus: float | None = None, **fields: Any) -> CellResult:
    """Make up a cell.

    Args:
        name: Its name, and its label with spaces.
        share: Its accuracy.
        versus: Accuracy of what it is compared with; `None` where it is not.
        fields: Further fields of a `CellResult`; `changed` may be one share, for any bit and, halved, for 1e-5,
            and `reference` names what it is compared with.
    """
    difference = None
    if share is not None and versus is not None:
        paired = paired_difference(solved(share), solved(versus), confidence=0.95)
        difference = difference_of(name, AS_WRITTEN, paired)
    reference = fields.pop("reference", None if name == AS_WRITTEN else AS_WRITTEN)
    changed = fields.pop("changed", {})
    if isinstance(changed, float):
        changed = {"0": changed, "1e-08": changed, "1e-05": changed / 2}
    values: dict[str, Any] = {
        "label": name.replace("_", " "), "group": "", "settings": [],
        "versus": reference,
        "algorithm": "grpo", "model": "some/model", "dtype": "bfloat16", "seed": 0, "learning_rate": 2e-5,
        "num_steps": 40, "num_trainable": 100, "num_parameters": 1000, "train_seconds": 120.0, "resumed_from": None,
        "failure": None, "reward": None, "data_loss": None, "traits": None, "mask": None,
    }  # fmt: skip
    found = None if share is None else accuracy(share)
    return CellResult(name=name, accuracy=found, difference=difference, changed=changed, **{**values, **fields})


def mask(density: float = 0.1, verdict: str = "recovered", **fields: Any) -> MaskResult:
    """Make up a mask's figures."""
    values: dict[str, Any] = {
        "num_trainable": round(density * 1000), "recall": 0.2, "precision": 0.3, "step": None, "changed_share": 0.9,
        "in_mask_identical": 0.5, "relative_distance": 0.4, "verdict_reason": "Because.",
    }  # fmt: skip
    return MaskResult(density=density, verdict=verdict, **{**values, **fields})


def pair(second: str, *, o1: float = 0.6, lift: float = 1.5, magnitude_lift: float | None = 1.0) -> MaskOverlap:
    """Make up the overlap of the recipe's own run with another one."""
    matched = None if magnitude_lift is None else o1 / magnitude_lift
    overall = Overlap(
        o1=o1, o2=o1, jaccard=0.4, lift=lift, magnitude_lift=magnitude_lift, count_first=100, count_second=100,
        count_both=60, num_parameters=1000, uniform_o1=o1 / lift, uniform_o2=o1 / lift, uniform_o1_se=0.01,
        uniform_o2_se=0.01, magnitude_o1=matched, magnitude_o2=matched, magnitude_o1_se=0.01, magnitude_o2_se=0.01,
    )  # fmt: skip
    return MaskOverlap(AS_WRITTEN, second, overall, {})


def report(study: str, *cells: CellResult, base: float | None = 0.24, **fields: Any) -> StudyReport:
    """Make up a study's result, without its answers."""
    values: dict[str, Any] = {
        "version": "0.0.0", "title": "GRPO · some task", "answers": [], "confidence": 0.95, "margin": 0.04,
        "environment": {"gpu": None}, "recipe": {"model": {"name": "some/model"}}, "seed": 0, "not_measured": [],
    }  # fmt: skip
    return StudyReport(
        study=study,
        question=QUESTIONS[study],
        num_prompts=0 if base is None else N,
        base=None if base is None else accuracy(base),
        cells=list(cells),
        **{**values, **fields},
    )
