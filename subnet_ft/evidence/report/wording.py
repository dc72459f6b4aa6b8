"""Numbers as text, names as people say them, and the sentences that every form of the report shares."""

from __future__ import annotations

import re
from collections.abc import Sequence

from subnet_ft.evidence.cost import Cost
from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.spectra import Spectra

VERDICTS = {
    "recovered": "Recovered",
    "not_recovered": "Not recovered",
    "undecided": "Undecided",
    "nothing_to_recover": "Nothing to recover",
    "not_assessed": "Not assessed",
}
MISSING = "not measured"
SECOND_FULL = "full run, other seed"
_TURNED = str.maketrans("<>", "><")
_METHODS = {"lora": "LoRA", "qlora": "QLoRA", "dora": "DoRA", "eva": "EVA", "shira": "SHiRA", "ia3": "IA3"}


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share as a percentage; one that only rounds to 0 or 100 says so.

    Example:
        0.99996 becomes `> 99.9 %`, 1.0 becomes `100 %`; -0.00004, such as an excess below its null, `> -0.1 %`.
    """
    if share is None:
        return MISSING
    if share < 0:
        written = percent(-share, digits)
        return written.translate(_TURNED).replace(" ", " -", 1) if written[0] in "<>" else f"-{written}"
    if share in (0.0, 1.0):
        return f"{share * 100:.0f} %"
    smallest = 10.0**-digits
    if share * 100 < smallest / 2:
        return f"< {smallest:g} %"
    if 100 - smallest / 2 < share * 100 < 100:
        return f"> {100 - smallest:.{digits}f} %"
    return f"{share * 100:.{digits}f} %"


def points(difference: float) -> str:
    """Write a difference of two shares in percentage points, with its sign."""
    return f"{difference * 100:+.1f}"


def size(num_bytes: float) -> str:
    """Write bytes in decimal units, three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}" if num_bytes / scale < 1000 else f"{num_bytes / scale:,.0f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float | None) -> str:
    """Write a time in the two largest units that matter."""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def typographic(text: str) -> str:
    """Use a true minus sign before numbers and in exponents, and keep a per cent sign with its number."""
    signed = re.sub(r"(?:(?<![\w.)])|(?<=\de))-(?=\d)", "\u2212", text)
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", signed)


def tolerance_text(key: str, exact: str, *, digits: int = 0) -> str:
    """Write a tolerance such as `1e-05` shortly; `exact` is the word for 0."""
    return exact if float(key) == 0 else f"{float(key):.{digits}e}".replace("e-0", "e-")


def shortened(names: Sequence[str]) -> str:
    """List names, the first four of many."""
    listed = ", ".join(f"`{name}`" for name in names[:4])
    return listed if len(names) <= 4 else f"{listed} and {len(names) - 4:,} more"


def skipped_matrices(found: Spectra) -> str:
    """Name the matrices that were not decomposed, by reason."""
    names: dict[str, list[str]] = {}
    for name, reason in found.skipped.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{shortened(alike)} ({reason})" for reason, alike in names.items())


def label(report: Report, name: str) -> str:
    """Return what a reader calls a model."""
    roles = {report.base: "base model", report.full: "full run", report.subnet: "subnetwork"}
    if name in roles:
        return roles[name]
    if name in report.baselines:
        return _METHODS.get(name, name.replace("_", " "))
    if name.startswith("seed-") and "/" in name:
        seed, _, run = name.removeprefix("seed-").partition("/")
        return f"{label(report, run)}, seed {seed}"
    return name.removeprefix("control-").replace("_", "-") + " control"


def the(report: Report, name: str) -> str:
    """Return a model's label with its article; a method is a name of its own."""
    return label(report, name) if name in report.baselines else f"the {label(report, name)}"


def is_mask_broken(report: Report) -> bool:
    """Whether a weight outside the subnetwork's mask changed."""
    weights = report.weights.get(report.subnet)
    return bool(weights and weights.off_mask_changed)


def headline(report: Report) -> str:
    """Return the verdict, and with it what voids it."""
    return VERDICTS[report.verdict] + (", but the mask was broken" if is_mask_broken(report) else "")


def claim(report: Report) -> str:
    """Say in one sentence what the verdict means, before any number."""
    if report.verdict == "recovered":
        return "Training only the subnetwork reached the full run's accuracy" + _reservation(report)
    return {
        "not_recovered": "Training only the subnetwork did not reach the full run's accuracy.",
        "undecided": "It is not settled whether the subnetwork recovered what the full run gained.",
        "nothing_to_recover": "The full run is not shown to gain anything that a subnetwork could recover.",
        "not_assessed": "Accuracy was not measured, so recovery cannot be judged.",
    }[report.verdict]


def _reservation(report: Report) -> str:
    """End the claim of a recovery with what stands against it."""
    if not report.controls:
        return "; no control was trained, so nothing is known about other masks of its size."
    first = report.controls[0]
    above = report.above_control.get(first)
    if above is None or above.answer != "yes":
        return f", but it is not shown to be above the {label(report, first)}."
    return "."


def off_mask_sentence(report: Report) -> str:
    """Say whether the mask was kept; a violation voids every other claim."""
    weights = report.weights.get(report.subnet)
    if weights is None or weights.off_mask_changed is None:
        return "Whether a weight outside the mask changed was not checked."
    if weights.off_mask_changed == 0:
        return "No weight outside the mask changed."
    count = weights.off_mask_changed
    return (
        f"{count:,} weight{'s' if count > 1 else ''} outside the mask changed, first in "
        f"{', '.join(weights.off_mask_tensors)}: this was not a subnetwork run, and nothing below is evidence for one."
    )


def control_sentences(report: Report) -> list[str]:
    """Say what the controls reached under the same rule."""
    sentences = []
    for name in report.controls:
        result = VERDICTS[report.control_verdicts[name].name].lower()
        above = report.above_control.get(name)
        comparison = f" {above.reason}" if above else ""
        weights = report.weights.get(name)
        changed = weights.off_mask_changed if weights else None
        broken = (
            f" It changed {changed:,} weights outside its mask, so it is no control of equal size." if changed else ""
        )
        sentences.append(f"The {label(report, name)}, judged by the same rule: {result}.{comparison}{broken}")
    recovered = [label(report, name) for name in report.controls if report.control_verdicts[name].name == "recovered"]
    if recovered and report.verdict == "recovered":
        sentences.append(
            f"The {' and the '.join(recovered)} recovered too: on this task accuracy alone does not show that these "
            "weights are the ones that matter."
        )
    return sentences or ["No control of equal size was trained: random masks can match full finetuning too."]


def identity_sentence(report: Report) -> str | None:
    """Give identity over what the full run changed first, and the base model's own beside both."""
    weights = report.weights.get(report.subnet)
    if weights is None:
        return None
    inside, base_inside = weights.in_mask_identical, weights.base_in_mask_identical
    first = (
        f"Of the weights whose bits the full run changed, {percent(inside['0'])} equal the full run's bit for bit; of "
        f"the base model's, {percent(base_inside['0'])} do."
        if inside and base_inside
        else "The full run changed no weight's bits."
    )
    return (
        f"{first} Over all weights it is {percent(weights.identical['0'])} against the base model's own "
        f"{percent(weights.base_identical['0'])}: the weights that the full run left alone."
    )


def judged_sentence(judged_on: str, number: int) -> str:
    """Say what accuracy counts: of how many `prompts` or `pairs`."""
    if judged_on == "pairs":
        return (
            f"Share of {number:,} held-out pairs in which the reward model gives the chosen completion the "
            "higher reward"
        )
    return f"Greedy answers to {number:,} held-out prompts"


def samples_sentence(report: Report) -> str:
    """Say how the samples were chosen."""
    by = "rewards" if report.judged_on == "pairs" else "answers"
    return f"Evenly spaced over the held-out {report.judged_on}, not chosen by their {by}."


def rule_sentence(report: Report) -> str:
    """State the rule of the verdict with its numbers."""
    narrow = 2 * report.confidence - 1
    return (
        f"A run recovers when the {narrow * 100:g} % interval of its difference to the full run lies within "
        f"{report.margin * 100:g} points of zero on both sides (two one-sided tests at "
        f"{(1 - report.confidence) * 100:g} % each), or wholly above zero; it fails when the interval lies wholly "
        f"below the margin. The full run must first be above the base model at {report.confidence * 100:g} %, and for "
        "lying within the margin to count, by more than the margin: otherwise the base model itself could lie within "
        "it. Intervals are Tango's for paired proportions, over "
        f"{report.num_prompts:,} held-out {report.judged_on}, and cover the choice of {report.judged_on} only."
    )


def cost_of(report: Report, name: str) -> Cost | None:
    """Return what a run cost, if that is known."""
    return next((cost for cost in report.costs if cost.run == name), None)


def whole_time(report: Report) -> dict[str, float] | None:
    """Return the subnetwork's time by stage from the base on, with the run that its mask was made from.

    `None` where there was no such run, or not all of it is known.
    """
    cost = cost_of(report, report.subnet)
    if cost is None or cost.needs is None or cost.first_seconds is None or cost.train_seconds is None:
        return None
    made = cost.mask_seconds or 0.0
    before = cost.first_seconds - cost.train_seconds - made
    return {"train": cost.train_seconds, f"{cost.needs} run": before, "mask": made}


def cost_sentence(report: Report) -> str | None:
    """Say what the mask itself cost, and from which run on memory is saved."""
    if report.mask is None:
        return None
    cost = cost_of(report, report.subnet)
    origin = report.mask.origin
    if origin == "nothing":
        return f"The mask was made from the base alone, so nothing came before this run.{_saved(report, cost, 'first')}"
    if origin == "elsewhere":
        return (
            "The mask came from elsewhere: what the run behind it cost is not in this report."
            f"{_saved(report, cost, 'first')}"
        )
    made = (
        "The mask was extracted from the finished full run"
        if origin == "full"
        else "The mask was made from a few steps of the full run\u2019s method"
    )
    if cost is None or cost.first_seconds is None or cost.train_seconds is None:
        return f"{made}, so that run\u2019s time and peak memory were spent first: the first time this is no saving."
    peaks = ["", ""]
    if cost.peak_bytes is not None and cost.first_peak_bytes is not None:
        peaks = [
            f" and {size(bytes_)} of the {cost.peak_of} at its peak"
            for bytes_ in (cost.first_peak_bytes, cost.peak_bytes)
        ]
    return (
        f"{made}. The first subnetwork run cost both: {duration(cost.first_seconds)} of training{peaks[0]}. Another "
        "one "
        f"under the same mask costs {duration(cost.train_seconds)}{peaks[1]}.{_saved(report, cost, 'second')}"
    )


def delta_sentence(report: Report) -> str | None:
    """Say what the subnetwork takes in storage beside its base."""
    found = report.delta
    if found is None:
        return None
    return (
        f"Delta: the subnetwork as a patch of its base takes {size(found.bytes)}, "
        f"{percent(found.bytes / found.dense_bytes)} of the dense checkpoint ({size(found.dense_bytes)}), with a value "
        f"for {percent(found.density)} of the weights."
    )


def _saved(report: Report, cost: Cost | None, which: str) -> str:
    """Say whether memory is saved, and from which run on."""
    full = cost_of(report, report.full)
    if cost is None or full is None or cost.peak_bytes is None or full.peak_bytes is None:
        return ""
    if cost.peak_of != full.peak_of:
        return (
            f" Whether memory was saved is not known: its peak is of the {cost.peak_of}, the full run\u2019s of the "
            f"{full.peak_of}."
        )
    if cost.peak_bytes >= full.peak_bytes:
        return " Its peak is no lower than the full run\u2019s: no memory was saved."
    return f" Memory is saved from the {which} run on: {size(full.peak_bytes)} became {size(cost.peak_bytes)}."


def conditions(report: Report) -> list[tuple[str, str]]:
    """Return what a reader needs to repeat the run: the mask's origin and the seeds."""
    entries: list[tuple[str, str | None]] = []
    if (mask := report.mask) is not None:
        entries = [
            ("trainable weights", f"{mask.num_trainable:,} of {mask.num_parameters:,}"),
            ("base", mask.base),
            ("tuned", mask.tuned),
            ("criterion", mask.criterion),
            ("tolerance", f"{mask.tolerance:g}" if mask.tolerance is not None else None),
            ("compared in", mask.compare_dtype or ("the stored dtype" if mask.criterion else None)),
            ("source of the mask", ", ".join(f"{key} {value}" for key, value in mask.source.items())),
            ("fingerprint", mask.fingerprint),
            ("time to make it", duration(mask.seconds) if mask.seconds is not None else None),
        ]
    entries.append(("training seeds", ", ".join(map(str, report.seeds))))
    entries.append(("subnet-ft", report.version))
    return [(name, value) for name, value in entries if value]
