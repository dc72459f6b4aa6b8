"""Drawings of the mask: its density by layer and kind, and by tolerance."""

from __future__ import annotations

from subnet_ft.evidence.report.axes import NARROW, Scale, left_edge, percent_tick, upright
from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.svg import Svg, nice_ticks
from subnet_ft.evidence.report.tables import short_kind
from subnet_ft.evidence.report.wording import percent, tolerance_text, typographic


def density_plot(report: Report, width: float) -> str | None:
    """Density of every matrix, layers across and kinds down; what lies outside the layers has its own rows."""
    density = report.density
    if density is None:
        return None
    layers = [layer for layer in density.by_layer if layer != "other"]
    grid = density.by_layer_and_kind
    kinds = list(dict.fromkeys(kind for layer in layers for kind in grid.get(layer, {})))
    outside = grid.get("other", {})
    left, right, gap = 132.0 if width < NARROW else left_edge(width), 4.0, 1.0
    cell = 18.0
    top = 4.0
    below = top + cell * len(kinds) + (18 if layers else 0)
    height = below + (8 + cell * len(outside) if outside else 0) + 34
    svg = Svg(width, height, "Density of the mask by layer and matrix kind")
    highest = max((share for row in grid.values() for share in row.values()), default=0.0) or 1.0
    step = (width - left - right) / max(len(layers), 1)
    for row, kind in enumerate(kinds):
        y = top + cell * row
        svg.text(left - 8, y + 12.5, short_kind(kind), "tick", anchor="end")
        for column, layer in enumerate(layers):
            share = grid[layer].get(kind)
            if share is not None:
                tip = f"layer {layer}, {kind}: {percent(share)}"
                svg.rect(left + step * column, y, step - gap, cell - gap, "cell-back")
                svg.rect(left + step * column, y, step - gap, cell - gap, "cell", tip=tip, opacity=share / highest)
    every = max(1, round(len(layers) / (6 if width < NARROW else 12)))
    for column, layer in enumerate(layers):
        if column % every == 0:
            svg.text(left + step * (column + 0.5), below - 5, layer, "tick", anchor="middle")
    y = below + 8
    for kind, share in outside.items():
        svg.text(left - 8, y + 12.5, short_kind(kind), "tick", anchor="end")
        length = (width - left - right - 56) * share / highest
        svg.rect(left, y + 3, max(length, 1.0), cell - 7, "cell", tip=f"{kind}: {percent(share)}")
        svg.text(left + max(length, 1.0) + 8, y + 12.5, percent(share), "tick")
        y += cell
    y += 8
    svg.text(left - 8, y + 10, "density", "tick", anchor="end")
    span = min(150.0, (width - left - right) * 0.5)
    for number in range(8):
        svg.rect(left + span * number / 8, y, span / 8 - gap, 12, "cell-back")
        svg.rect(left + span * number / 8, y, span / 8 - gap, 12, "cell", opacity=number / 7)
    svg.text(left + span + 8, y + 10, f"0 to {percent(highest)}", "tick")
    return svg.render()


def tolerance_plot(report: Report, width: float) -> str | None:
    """Density that the full run's mask has at other tolerances."""
    density = report.density
    if density is None or len(density.by_tolerance) < 2:
        return None
    entries = sorted(density.by_tolerance.items(), key=lambda entry: float(entry[0]))
    ticks = nice_ticks(0, max(share for _, share in entries), 4)
    svg, y = upright(width, 190, ticks, percent_tick, "Density by tolerance")
    x = Scale(-0.5, len(entries) - 0.5, 48, width - 8)
    svg.path([(x(index), y(share)) for index, (_, share) in enumerate(entries)], "curve m-subnet")
    for index, (tolerance, share) in enumerate(entries):
        svg.circle(x(index), y(share), 3.5, "dot m-subnet", tip=f"tolerance {tolerance}: {percent(share)}")
        svg.text(x(index), y(share) - 9, f"{share * 100:.1f}", "tick", anchor="middle")
        svg.text(x(index), 182, typographic(tolerance_text(tolerance, "exact")), "tick", anchor="middle")
    return svg.render()
