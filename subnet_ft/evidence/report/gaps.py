"""What a report cannot say: one sentence for every piece of evidence that nobody gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from subnet_ft.evidence.cost import Cost
from subnet_ft.evidence.report.wording import skipped_matrices
from subnet_ft.evidence.spectra import Spectra
from subnet_ft.evidence.structure import Structure


def gaps(
    evidence: Mapping[str, Any],
    *,
    without_accuracy: Sequence[str],
    seeds: Sequence[int],
    judged_on: str,
    has_control: bool,
    has_gpu: bool,
) -> list[str]:
    """Say what was not measured.

    Args:
        evidence: Fields of `Report` by name; what is `None` or empty is missing.
        without_accuracy: Models that answered no prompt.
        seeds: Seeds of training.
        judged_on: `prompts` or `pairs`.
        has_control: Whether a mask of equal size was trained.
        has_gpu: Whether times and memory are a GPU's.
    """
    found = []
    if without_accuracy:
        found.append(f"Accuracy of {', '.join(without_accuracy)}.")
    if not evidence["seeds_summary"] and len(set(seeds)) <= 1:
        known = f"every run has seed {seeds[0]}. Intervals" if seeds else "intervals"
        found.append(f"Variation between seeds: {known} cover the choice of {judged_on}, not another training.")
    elif not evidence["seeds_summary"] and evidence["floor"]:
        found.append(f"Variation between seeds of anything but the full run: every verdict is that of seed {seeds[0]}.")
    if not evidence["floor"]:
        found.append("The floor: how far two full runs that differ only in their seed lie from each other.")
    if not has_control:
        found.append(
            "A control: no mask of equal size was trained. Random masks can match full finetuning, so without one a "
            "recovery says nothing about this mask."
        )
    if judged_on == "pairs":
        found.append("By how much the reward models differ, beyond which completion of a pair gets more reward.")
        found.append("Other pairs than those of this task, and what a policy becomes that is trained on the reward.")
    else:
        if not evidence["agreement"]:
            found.append(
                "The distance between the models' output distributions (KL), beyond whether answers are correct."
            )
        found.append("Other tasks than the one evaluated here, and sampled instead of greedy answers.")
        if evidence["retention"]:
            found[-1] = "Sampled instead of greedy answers."
    found += [sentence for name, sentence in _MISSING.items() if not evidence[name]]
    found += [*_peak_gaps(evidence["costs"]), *_shape_gaps(evidence["structure"], evidence["spectra"])]
    if not has_gpu:
        found.append("Speed and memory on a GPU.")
    return found


def _shape_gaps(structure: Structure | None, spectra: Spectra | None) -> list[str]:
    """Say what was looked for and not there."""
    found = []
    if structure is not None and not structure.by_kind:
        found.append(f"{_MISSING['structure'][:-1]}: it has no matrix.")
    if spectra is not None and not any(entry.profile for entry in spectra.matrices):
        why = f"not decomposed were {skipped_matrices(spectra)}" if spectra.skipped else "it changed none"
        found.append(f"The rank of the update: {why}.")
    return found


def _peak_gaps(costs: Sequence[Cost]) -> list[str]:
    found = []
    if unknown := [cost.run for cost in costs if cost.peak_bytes is None]:
        found.append(f"Peak memory of {', '.join(unknown)} in training.")
    by_kind = {kind: [cost.run for cost in costs if cost.peak_of == kind] for kind in ("device", "process")}
    if all(by_kind.values()):
        known = " and ".join(f"of the {kind} for {', '.join(runs)}" for kind, runs in by_kind.items())
        found.append(f"Peak memory by one measure, so that runs compare: it is {known}.")
    return found


_MISSING = {
    "weights": "Weights: no run was compared with the full run's.",
    "scatter": "Weight by weight, whether the subnetwork moved as the full run did.",
    "density": "The mask: none was given.",
    "overlaps": "What the mask shares with others: there was no second one.",
    "structure": "Whether the mask clusters in rows, columns or heads.",
    "spectra": "The rank of the update: no matrix was decomposed.",
    "dynamics": "When the mask forms, and what rounding keeps back: no snapshots were taken in training.",
    "curves": "The course of training: no log was given.",
    "costs": "Time and memory of training.",
    "retention": "What the models keep of the base: its accuracy on other tasks and its distribution on neutral text.",
}
