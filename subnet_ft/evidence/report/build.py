"""Assembles a report from what a run left behind; pure functions, nothing is read or written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from subnet_ft.evidence.agreement import Agreement
from subnet_ft.evidence.cost import Cost, run_costs
from subnet_ft.evidence.dynamics import Dynamics
from subnet_ft.evidence.floor import Floor
from subnet_ft.evidence.overlap import MaskOverlap
from subnet_ft.evidence.plain import as_json
from subnet_ft.evidence.report import answers
from subnet_ft.evidence.report.gaps import gaps
from subnet_ft.evidence.report.mask_parts import density_of, mask_info
from subnet_ft.evidence.report.run_evidence import RunEvidence
from subnet_ft.evidence.report.schema import DeltaSize, MaskInfo, Report
from subnet_ft.evidence.retention import Retention, RetentionDifference, retention_differences
from subnet_ft.evidence.scatter import Scatter
from subnet_ft.evidence.seeds import SeedSummary
from subnet_ft.evidence.spectra import Spectra
from subnet_ft.evidence.structure import Structure
from subnet_ft.evidence.verdict import Comparison, Verdict, above_control, verdict

if TYPE_CHECKING:
    from subnet_ft.masks import SubnetMask

# The control that speaks most against the subnetwork comes first.
_ANSWER_RANK = {"no": 0, "undecided": 1, "yes": 2}
_VERDICT_RANK = {"recovered": 0, "undecided": 1, "not_recovered": 2}


def build_report(
    *,
    version: str,
    base: RunEvidence,
    full: RunEvidence,
    subnet: RunEvidence,
    controls: Sequence[RunEvidence] = (),
    baselines: Sequence[RunEvidence] = (),
    probe: RunEvidence | None = None,
    mask: SubnetMask | None = None,
    mask_seconds: float | None = None,
    margin: float = 0.02,
    confidence: float = 0.95,
    recipe: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (),
    title: str | None = None,
    overlaps: Sequence[MaskOverlap] = (),
    structure: Structure | None = None,
    spectra: Spectra | None = None,
    dynamics: Mapping[str, Dynamics] | None = None,
    agreement: Mapping[str, Agreement] | None = None,
    retention: Mapping[str, Retention] | None = None,
    floor: Floor | None = None,
    seeds_summary: Sequence[SeedSummary] = (),
    scatter: Scatter | None = None,
    delta: DeltaSize | None = None,
    not_measured: Sequence[str] = (),
) -> Report:
    """Judge a subnetwork and gather the evidence; what is missing is named in `Report.not_measured`.

    Args:
        version: Version of subnet-ft.
        base: The base model.
        full: The full run.
        subnet: The subnetwork run.
        controls: Runs under masks of equal size.
        baselines: Runs of other methods.
        probe: The few steps that the mask was made from, if it was: its time and memory belong to the subnetwork.
        mask: The subnetwork's mask.
        mask_seconds: Time to make it, without the run that it was made from.
        margin: Largest difference in accuracy that counts as none.
        confidence: Confidence of every claim.
        recipe: The resolved recipe.
        environment: Hardware and versions; a true value under `gpu` says that times are a GPU's.
        seeds: Seeds of training.
        title: What was run; made from the recipe when `None`.
        overlaps: Every two masks of the run.
        structure: Of the subnetwork's mask.
        spectra: Of what the full run added to the base.
        dynamics: Run to its snapshots.
        agreement: Model to how like the full run's its outputs are.
        retention: Model to what it keeps of the base.
        floor: The full run beside another one with a different seed.
        seeds_summary: Runs over several seeds.
        scatter: What runs changed against what the full run changed.
        delta: The size of the subnetwork as a delta.
        not_measured: Further sentences for the section of that name.

    Raises:
        TaskError: Two models answered different prompts.
        ValueError: Names are not unique, or `margin` or `confidence` is out of range.
    """
    models = [base, full, subnet, *controls, *baselines]
    names = [model.name for model in models]
    if len(set(names)) != len(names):
        raise ValueError(f"Every model of a report needs its own name, got {', '.join(names)}.")
    answers.check_same_prompts(models)
    solved = {model.name: answers.solved_prompts(model) for model in models}
    judged_on = answers.what_was_judged(models)

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
    ordered = sorted(control_verdicts, key=against)
    mask_entry = None if mask is None else mask_info(mask, mask_seconds, recipe)
    kept = dict(retention or {})
    evidence: dict[str, Any] = {
        "weights": {model.name: model.weights for model in models if model.weights is not None},
        "density": None if mask is None else density_of(mask),
        "curves": {model.name: _curve(model.log_history) for model in models if model.log_history},
        "overlaps": list(overlaps),
        "structure": structure,
        "spectra": spectra,
        "dynamics": dict(dynamics or {}),
        "agreement": dict(agreement or {}),
        "retention": kept,
        "floor": floor,
        "seeds_summary": list(seeds_summary),
        "scatter": scatter,
        "costs": _costs(full, subnet, controls, baselines, probe, mask_entry),
    }
    missing = gaps(
        evidence,
        without_accuracy=[name for name, outcomes in solved.items() if outcomes is None],
        seeds=seeds,
        judged_on=judged_on,
        has_control=bool(controls),
        has_gpu=bool(environment.get("gpu")),
    )
    if mask_entry is not None and mask_entry.origin == "probe" and probe is None and evidence["costs"]:
        missing.append("What the first steps cost from which the mask was made.")
    if mask_entry is not None and mask_entry.origin == "elsewhere":
        missing.append("What the mask cost: it came from elsewhere.")
    return Report(
        version=version,
        title=title or title_of(recipe),
        verdict=result.name,
        verdict_reason=result.reason,
        base=base.name,
        full=full.name,
        subnet=subnet.name,
        controls=ordered,
        baselines=[run.name for run in baselines],
        control_verdicts=control_verdicts,
        above_control=comparisons,
        margin=margin,
        confidence=confidence,
        num_prompts=len(measured[0]) if measured else 0,
        accuracy={
            name: answers.accuracy_of(values, confidence) for name, values in solved.items() if values is not None
        },
        differences=answers.differences_of(solved, base.name, full.name, subnet.name, confidence),
        mask=mask_entry,
        seconds={model.name: dict(model.seconds) for model in models if model.seconds},
        memory={model.name: dict(model.memory) for model in models if model.memory},
        environment=as_json(environment),
        recipe=as_json(recipe),
        seeds=list(seeds),
        samples=answers.samples_of(models),
        not_measured=[*missing, *not_measured],
        judged_on=judged_on,
        delta=delta,
        retention_differences=_retention_differences(kept, base.name, subnet.name, confidence),
        **evidence,
    )


def title_of(recipe: Mapping[str, Any]) -> str:
    """Say in a few words what a recipe runs."""
    parts = [recipe.get("algorithm"), recipe.get("task", {}).get("name"), recipe.get("model", {}).get("name")]
    known = [str(part) for part in parts if part]
    return " · ".join([known[0].upper(), *known[1:]] if recipe.get("algorithm") else known)


def _costs(
    full: RunEvidence,
    subnet: RunEvidence,
    controls: Sequence[RunEvidence],
    baselines: Sequence[RunEvidence],
    probe: RunEvidence | None,
    mask: MaskInfo | None,
) -> list[Cost]:
    # A control has as many weights as the subnetwork's mask, so it needs what that needs.
    masked = [subnet.name, *(control.name for control in controls)]
    needed = {"full": full.name, "probe": "probe"}.get(mask.origin) if mask is not None else None
    known = [full, subnet, *controls, *baselines, *([] if probe is None else [probe])]
    return run_costs(
        {full.name: None, **dict.fromkeys(masked, needed), **{run.name: None for run in baselines}},
        {run.name if run is not probe else "probe": run.seconds for run in known},
        {run.name if run is not probe else "probe": run.memory for run in known},
        mask_seconds=dict.fromkeys(masked, mask.seconds if mask is not None else None),
        num_parameters=mask.num_parameters if mask is not None else None,
        resumed=[run.name if run is not probe else "probe" for run in known if run.resumed_from],
    )


def _retention_differences(
    found: Mapping[str, Retention], base: str, subnet: str, confidence: float
) -> list[RetentionDifference]:
    pairs = [(name, base) for name in found if name != base and base in found]
    pairs += [(subnet, name) for name in found if name not in (base, subnet) and subnet in found]
    return retention_differences(found, pairs, confidence=confidence)


def _curve(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Keep the finite numbers of every logged step; the trainer's closing summary is not a step."""
    curve = []
    for entry in log_history:
        if "train_runtime" in entry or "step" not in entry:
            continue
        numbers = {key: value for key, value in entry.items() if isinstance(value, (int, float))}
        curve.append({key: value for key, value in numbers.items() if math.isfinite(value)})
    return curve
