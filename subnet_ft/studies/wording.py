"""What a study's runs say, in sentences with their numbers; a difference that is not shown is not claimed."""

from __future__ import annotations

from collections.abc import Callable

from subnet_ft.evidence.overlap import MaskOverlap
from subnet_ft.evidence.report.schema import Difference
from subnet_ft.evidence.report.wording import percent, points
from subnet_ft.studies.masks import FINAL
from subnet_ft.studies.plan import AS_WRITTEN
from subnet_ft.studies.schema import CellResult, MaskResult, StudyReport

EXACT, PAPER = "0", "1e-05"
"""Tolerances that sentences speak of: any bit, and that of the paper's update sparsity."""

_EARLY_ENOUGH = 0.9
# A ratio this close to 1 is called none, or not worth a word: with millions of weights any is significant.
_NEAR = 0.05


def answers(report: StudyReport) -> list[str]:
    """Return what the runs say, one sentence or two each."""
    say: dict[str, Callable[[StudyReport], list[str]]] = {
        "sparsity": _sparsity,
        "overlap": _overlap,
        "causes": _causes,
        "which_mask": _which_mask,
        "early_mask": _early_mask,
    }
    return say[report.study](report)


def gaps(report: StudyReport) -> list[str]:
    """Say what this study cannot know."""
    found = [f"`{cell.label}`: {cell.failure}." for cell in report.cells if cell.failure]
    seeds = sorted({cell.seed for cell in report.cells})
    each = f"every run has seed {seeds[0]}" if len(seeds) == 1 else "every setting was run once, with one seed"
    found.append(
        f"Variation between seeds: {each}. Intervals cover the choice of {report.judged_on}, not another training, and "
        "no correction is made for the number of runs."
    )
    if report.study in ("causes", "sparsity"):
        found.append(
            "Causes in combination, and the best settings of each run: one thing changed at a time, nothing was tuned."
            if report.study == "causes"
            else "What the algorithm itself does to sparsity: the recipes also differ in learning rate, steps and "
            "batch, and each of these moves it."
        )
    if report.study == "which_mask":
        found.append(
            "How many weights a source would hold by itself: predicted, forecast, gradient and Fisher masks get the "
            "final mask's density, which only the finished full run tells."
        )
    unpaired = [cell.label for cell in report.cells if cell.accuracy and cell.versus and cell.difference is None]
    if unpaired:
        found.append(f"Paired differences of {', '.join(unpaired)}: they were judged on other prompts.")
    if report.base is None:
        found.append("Accuracy: evaluation is off.")
    resumed = [cell.label for cell in report.cells if cell.resumed_from]
    if resumed:
        found.append(f"The whole training time of {', '.join(resumed)}: an interrupted run's time is that of its end.")
    found.append(f"Other models than {report.recipe['model']['name']}, and other tasks than this one.")
    return found


def difference_text(difference: Difference) -> str:
    """Write a paired difference with its interval, and whether it is shown at all."""
    numbers = (
        f"{points(difference.difference)} points [{points(difference.low)}, {points(difference.high)}] at "
        f"{difference.confidence * 100:g} %"
    )
    return numbers if difference.low > 0 or difference.high < 0 else f"{numbers}, no difference shown"


def _sparsity(report: StudyReport) -> list[str]:
    run = sorted((cell for cell in report.cells if cell.changed), key=lambda cell: cell.changed[EXACT])
    if len(run) < 2:
        return ["One algorithm alone says nothing about the others."]
    lowest, highest = run[-1], run[0]
    sentences = [
        f"Exactly unchanged are between {percent(1 - lowest.changed[EXACT])} ({lowest.label}) and "
        f"{percent(1 - highest.changed[EXACT])} ({highest.label}) of the weights; by the paper's tolerance of 1e-5 "
        f"{percent(1 - lowest.changed[PAPER])} and {percent(1 - highest.changed[PAPER])} are.",
        "The recipes differ in learning rate, steps and batch (see the table), so that these figures do not rank "
        "algorithms; the study `causes` changes one thing at a time.",
    ]
    for trait, yes, no in (("on_policy", "on-policy", "off-policy"), ("kl", "KL", "no KL")):
        with_it = [1 - cell.changed[EXACT] for cell in run if cell.traits and getattr(cell.traits, trait)]
        without = [1 - cell.changed[EXACT] for cell in run if cell.traits and not getattr(cell.traits, trait)]
        if with_it and without:
            apart = min(with_it) > max(without) or max(with_it) < min(without)
            sentences.append(
                f"With {yes} the exact sparsity is {_range(with_it)}, with {no} {_range(without)}: the two "
                f"{'do not overlap' if apart else 'overlap, so that it does not decide alone'}."
            )
    return sentences


def _range(shares: list[float]) -> str:
    low, high = percent(min(shares)), percent(max(shares))
    return low if low == high else f"{low} to {high}"


def _causes(report: StudyReport) -> list[str]:
    own, seed = report.cell(AS_WRITTEN), report.cell("seed")
    if own is None or not own.changed:
        return ["The recipe itself was not run, so that nothing can be compared with it."]
    density = own.changed[EXACT]
    sentences = [
        f"As written the run changes {percent(density)} of the weights, and {percent(own.changed[PAPER])} by more than "
        "1e-5."
    ]
    spread = None
    if seed is not None and seed.changed:
        spread = abs(seed.changed[EXACT] - density)
        sentences.append(
            f"Another seed changes {percent(seed.changed[EXACT])}: {spread * 100:.2f} points apart. That is one draw "
            "of what chance alone does; a cause that moves density by less is not shown to move it."
        )
    compared = [(cell, other) for cell in report.cells if (other := _reference(report, cell)) is not None]
    if spread is not None:
        sentences.append(_beyond_seeds([pair for pair in compared if pair[1].model == own.model], spread))
    return sentences + [_cause(cell, other, spread if other.model == own.model else None) for cell, other in compared]


def _reference(report: StudyReport, cell: CellResult) -> CellResult | None:
    """Return what a cause is compared with, where both changed weights or could have."""
    other = report.cell(cell.versus or "")
    return other if cell.name != "seed" and other is not None and cell.changed and other.changed else None


def _beyond_seeds(compared: list[tuple[CellResult, CellResult]], spread: float) -> str:
    """Sort the causes by whether they moved density by more than another seed did."""
    moved = {cell.label: cell.changed[EXACT] - other.changed[EXACT] for cell, other in compared}
    more = [name for name, by in moved.items() if by > spread]
    fewer = [name for name, by in moved.items() if by < -spread]
    same = [name for name, by in moved.items() if abs(by) <= spread]
    text = (
        f"By more than the two seeds differ, density rose with: {'; '.join(more) or 'nothing'}. It fell with: "
        f"{'; '.join(fewer) or 'nothing'}."
    )
    return f"{text} Not shown to move it: {'; '.join(same)}." if same else text


def _cause(cell: CellResult, other: CellResult, spread: float | None) -> str:
    before, after = other.changed[EXACT], cell.changed[EXACT]
    moved = after - before
    against = "" if other.name == AS_WRITTEN else f" of {other.label}"
    text = f"{cell.label[0].upper()}{cell.label[1:]}: {percent(after)} changed against {percent(before)}{against}"
    if spread is not None and abs(moved) <= spread:
        text += ", no difference beyond that between two seeds"
    elif before:
        text += f", {after / before:.2f} times as many"
    small_before, small_after = other.changed[PAPER], cell.changed[PAPER]
    if abs(small_after * before - small_before * after) > _NEAR * small_before * after:
        text += f"; by more than 1e-5 {percent(small_after)} against {percent(small_before)}"
    if cell.data_loss is not None:
        text += f"; the base gives its data {cell.data_loss:.2f} nats per token"
    return f"{text}." + (f" Accuracy {difference_text(cell.difference)}." if cell.difference else "")


def _overlap(report: StudyReport) -> list[str]:
    labels = {cell.name: cell.label for cell in report.cells}
    pairs = [pair for pair in report.overlaps if pair.first == AS_WRITTEN]
    if not pairs:
        return ["Fewer than two masks can be compared."]
    return [_pair(pair, labels[pair.second]) for pair in pairs]


def _pair(pair: MaskOverlap, label: str) -> str:
    found = pair.overall
    if found.o1 is None or found.o2 is None:
        return f"With {label}: a mask is empty."
    text = (
        f"With {label}, {percent(found.o1)} of the recipe's mask are in the other, {percent(found.o2)} the other way. "
        f"Masks drawn uniformly would share {percent(found.uniform_o1)} and {percent(found.uniform_o2)}"
    )
    if found.magnitude_lift is None:
        return f"{text}."
    text += f", masks matched on magnitude {percent(found.magnitude_o1)} and {percent(found.magnitude_o2)}."
    if found.magnitude_lift > 1 + _NEAR:
        return f"{text} That is {found.magnitude_lift:.2f} times what magnitude alone explains."
    if found.magnitude_lift < 1 - _NEAR:
        return f"{text} That is less than magnitude alone would give ({found.magnitude_lift:.2f} times)."
    return f"{text} That is no more than magnitude alone explains ({found.magnitude_lift:.2f} times)."


def _which_mask(report: StudyReport) -> list[str]:
    masked = [cell for cell in report.cells if cell.mask is not None and cell.accuracy is not None]
    full = report.cell(AS_WRITTEN)
    if full is None or full.accuracy is None or not masked:
        return ["Accuracy was not measured, so that masks cannot be judged by it."]
    sentences = []
    for verdict, what in (
        ("recovered", "recovered the full run's accuracy"),
        ("not_recovered", "stayed below it by more than the margin"),
        ("undecided", "are undecided"),
        ("nothing_to_recover", "had nothing to recover, because the full run is not shown to be above the base"),
    ):
        names = [cell.label for cell in masked if cell.mask and cell.mask.verdict == verdict]
        if names:
            sentences.append(f"{len(names)} of {len(masked)} masks {what}: {'; '.join(names)}.")
    whole = [cell for cell in masked if not cell.group.startswith("at ")]
    random = [cell for cell in whole if cell.name in ("uniform", "magnitude_matched") and cell.mask]
    recovered = [cell.label for cell in random if cell.mask and cell.mask.verdict == "recovered"]
    final = report.cell(FINAL)
    if final is not None and final.mask is not None and final.mask.verdict == "recovered" and recovered:
        sentences.append(
            f"The final mask recovered, and so did the {' and the '.join(recovered)} control of its size: on this task "
            "accuracy alone does not show that these weights are the ones that matter."
        )
    sentences += _held(whole)
    most = max(cell.accuracy.accuracy for cell in masked if cell.accuracy)
    best = [cell for cell in masked if cell.accuracy and cell.accuracy.accuracy == most]
    if len(best) == 1 and best[0].difference is not None:
        sentences.append(
            f"The highest accuracy, {percent(most)}, is that of `{best[0].label}`: "
            f"{difference_text(best[0].difference)} to the full run. The best of {len(masked)} runs is partly luck."
        )
    return sentences


def _matched(mask: MaskResult) -> str:
    return "" if mask.magnitude_recall is None else f", one matched on magnitude {percent(mask.magnitude_recall)}"


def _held(cells: list[CellResult]) -> list[str]:
    """Say how much of the final mask the other sources hold, beside both nulls."""
    held = [
        f"{cell.label} {percent(cell.mask.recall)} (a random mask {percent(cell.mask.density)}{_matched(cell.mask)})"
        for cell in cells
        if cell.mask is not None and cell.mask.recall is not None and cell.group == "other source"
    ]
    return [f"Share of the final mask that other sources hold: {'; '.join(held)}."] if held else []


def _early_mask(report: StudyReport) -> list[str]:
    full, final = report.cell(AS_WRITTEN), report.cell(FINAL)
    early = [cell for cell in report.cells if cell.mask is not None and cell.mask.step is not None]
    if full is None or not early:
        return ["No early mask was made."]
    sentences = []
    for cell in early:
        mask = cell.mask
        if mask is None or mask.recall is None:
            continue
        text = (
            f"Step {mask.step} of {full.num_steps}: {percent(mask.density)} of the weights had changed. They hold "
            f"{percent(mask.recall)} of the final mask (a random mask of their number would hold "
            f"{percent(mask.density)}{_matched(mask)})"
        )
        text += "" if mask.precision is None else f", and {percent(mask.precision)} of them are in it"
        judged = f" Training them alone: {mask.verdict.replace('_', ' ')}." if cell.accuracy else ""
        sentences.append(f"{text}.{judged}")
    reached = [cell.mask.step for cell in early if cell.mask and (cell.mask.recall or 0.0) >= _EARLY_ENOUGH]
    sentences.append(
        f"The first mask that holds 90 % of the final one is that of step {reached[0]}."
        if reached
        else "No early mask that was looked at holds 90 % of the final one."
    )
    if final is not None and final.mask is not None and final.accuracy is not None:
        sentences.append(f"The final mask itself: {final.mask.verdict.replace('_', ' ')}.")
    return sentences
