"""The studies of masks: `which_mask` tries every source and control at several densities, `early_mask` every step."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from subnet_ft.recipe import SourceSpec
from subnet_ft.recipe.mask_rules import moments
from subnet_ft.recipe.mask_schema import CHOSEN, Control
from subnet_ft.studies.plan import Cell, MaskPlan, Plan, Recipes, max_steps, need_extracted, own_cell

FINAL = "final"
"""Name of the cell that trains the mask of the full run."""

DENSITIES = (0.01, 0.001)
"""Further densities of `which_mask`, where they lie below that of the final mask."""
PROBE_SHARE, PROBE_STEPS = 5, 5
"""The probe of `which_mask` takes one step in so many of the full run, and no more than so many: a single step may have
had no gradient, because every answer got the same reward."""

_SWEPT_CONTROLS: tuple[Control, ...] = ("uniform", "magnitude_matched")
_LABELS = {
    "magnitude_matched": "magnitude-matched",
    "layer_permuted": "layer-permuted",
    "low_magnitude": "low magnitude",
    "non_principal": "non-principal",
}


def plan_which_mask(recipes: Recipes) -> Plan:
    """Return the full run, and a run under the final mask, every control of it, and every other source.

    What ranks weights is cut at the density of the final mask, which is known once the full run is finished; its
    `density` in the plan is therefore left open.
    """
    own = recipes.own
    need_extracted(own, recipes.study)
    steps = min(max(1, max_steps(own, recipes.study) // PROBE_SHARE), PROBE_STEPS)
    cells = [own_cell(own), _cell(recipes, FINAL, "final mask", "", MaskPlan())]
    cells += [
        _cell(recipes, kind, _label(kind), "control of the final mask", MaskPlan(control=kind))
        for kind in get_args(Control)
    ]
    cells += [
        _cell(recipes, source.kind, label, "other source", MaskPlan(source=source))
        for label, source in (
            ("predicted from the base", SourceSpec(kind="predicted")),
            (f"early, step {steps}", SourceSpec(kind="early", steps=steps)),
            (f"forecast, {steps} step{'s' if steps > 1 else ''}", SourceSpec(kind="forecast", steps=steps)),
            ("large gradients at the base", SourceSpec(kind="gradient", steps=steps)),
            ("Fisher at the base", SourceSpec(kind="fisher", steps=steps)),
        )
    ]
    for density in DENSITIES:
        share = f"{density * 100:g} %"
        sweep = [(FINAL, f"final mask {share}", MaskPlan(density=density))]
        sweep += [
            (kind, f"{_label(kind)} {share}", MaskPlan(control=kind, density=density)) for kind in _SWEPT_CONTROLS
        ]
        for source in (
            SourceSpec(kind="predicted", density=density),
            SourceSpec(kind="forecast", steps=steps, density=density),
            SourceSpec(kind="gradient", steps=steps, density=density),
        ):
            sweep.append((source.kind, f"{source.kind} {share}", MaskPlan(source=source)))
        cells += [_cell(recipes, f"{kind}_{density:g}", label, f"at {share}", mask) for kind, label, mask in sweep]
    return _without_impossible(Plan(study=recipes.study, recipe=own, cells=cells))


def plan_early_mask(recipes: Recipes) -> Plan:
    """Return the full run, and runs under what it had changed after 1 step, an eighth, a quarter, a half and all."""
    own = recipes.own
    need_extracted(own, recipes.study)
    most = max_steps(own, recipes.study)
    cells = [own_cell(own)]
    for step in sorted({1, most // 8, most // 4, most // 2} - {0}):
        source = SourceSpec(
            kind="early",
            steps=step,
            criterion=own.subnet.source.criterion,
            tolerance=own.subnet.source.tolerance,
        )
        cells.append(_cell(recipes, f"step_{step}", f"mask of step {step}", "early mask", MaskPlan(source=source)))
    cells.append(_cell(recipes, FINAL, f"final mask, step {most}", "early mask", MaskPlan()))
    cells.append(_cell(recipes, "uniform", "uniform control", "control", MaskPlan(control="uniform")))
    return Plan(study=recipes.study, recipe=own, cells=cells)


def _without_impossible(plan: Plan) -> Plan:
    """Leave out the cells whose source reads of the optimizer what the recipe's does not keep, with the reason."""
    reasons: dict[str, str] = {}
    for cell in plan.cells:
        if cell.mask is not None and cell.mask.source is not None:
            subnet = replace(plan.recipe.subnet, source=cell.mask.source)
            for _, reason in moments(replace(plan.recipe, subnet=subnet)):
                reasons[cell.name] = reason
    notes = [
        f"The mask{'s' if len(names) > 1 else ''} {', '.join(names)}: {reason}."
        for reason in dict.fromkeys(reasons.values())
        if (names := [name for name, found in reasons.items() if found == reason])
    ]
    cells = [cell for cell in plan.cells if cell.name not in reasons]
    return replace(plan, cells=cells, notes=[*plan.notes, *notes], impossible=tuple(reasons))


def _cell(recipes: Recipes, name: str, label: str, group: str, mask: MaskPlan) -> Cell:
    settings = [f"control {mask.control}"] if mask.control else []
    settings += ["without tensors that are more than half dense"] if mask.control == "inverted" else []
    if mask.source is not None:
        settings = [f"subnet.source.kind={mask.source.kind}"]
        settings += [f"subnet.source.steps={mask.source.steps}"] if mask.source.steps is not None else []
        settings += ["at the final mask's density"] if mask.source.kind in CHOSEN and not mask.source.density else []
    settings += [f"thinned to {mask.density:g}"] if mask.density else []
    return Cell(name=name, label=label, group=group, settings=tuple(settings), recipe=recipes.own, mask=mask)


def _label(kind: str) -> str:
    return _LABELS.get(kind, kind)
