"""The numbers that a field accepts, as annotations that `parsing.py` enforces."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Annotated


@dataclass(frozen=True, kw_only=True)
class Range:
    """The finite numbers a field accepts; `least` and `most` are included, `above` and `below` are not."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        signs = ((">=", self.least), (">", self.above), ("<=", self.most), ("<", self.below))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in signs if bound is not None) or "finite"


Count = Annotated[int, Range(least=1)]
CountOrZero = Annotated[int, Range(least=0)]
