"""The sections of a report in reading order, each made only where its evidence was gathered."""

from __future__ import annotations

from collections.abc import Callable

from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.section import Section
from subnet_ft.evidence.report.sections.accuracy import accuracy, seeds
from subnet_ft.evidence.report.sections.cost import cost
from subnet_ft.evidence.report.sections.course import dynamics, training
from subnet_ft.evidence.report.sections.mask import overlap, subnetwork
from subnet_ft.evidence.report.sections.outputs import agreement, retention
from subnet_ft.evidence.report.sections.shape import spectra, structure
from subnet_ft.evidence.report.sections.weights import floor, scatter, weights

_SECTIONS: tuple[Callable[[Report], Section | None], ...] = (
    accuracy,
    seeds,
    agreement,
    retention,
    weights,
    scatter,
    floor,
    subnetwork,
    overlap,
    structure,
    spectra,
    dynamics,
    training,
    cost,
)


def sections_of(report: Report) -> list[Section]:
    """Return what there is evidence for."""
    return [section for make in _SECTIONS if (section := make(report)) is not None]
