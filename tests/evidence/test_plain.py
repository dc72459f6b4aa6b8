"""Evidence survives JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from subnet_ft.evidence.plain import from_plain


@dataclass(frozen=True)
class Leaf:
    share: float | None
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tree:
    leaf: Leaf
    maybe: Leaf | None
    by_name: dict[str, Leaf]
    many: list[Leaf]
    pair: tuple[int, Leaf]
    row: tuple[float, ...]
    free: dict[str, Any]


TREE = Tree(
    leaf=Leaf(0.5, ["a"]),
    maybe=None,
    by_name={"x": Leaf(None)},
    many=[Leaf(1.0), Leaf(2.0)],
    pair=(3, Leaf(4.0)),
    row=(1.0, 2.0),
    free={"b": [1, {"c": None}]},
)


def test_from_plain_undoes_asdict_through_json() -> None:
    assert from_plain(Tree, json.loads(json.dumps(asdict(TREE)))) == TREE


def test_from_plain_gives_a_missing_field_its_default() -> None:
    assert from_plain(Leaf, {"share": 1.0}) == Leaf(1.0, [])


@pytest.mark.parametrize(("value", "problem"), [({"share": 1.0, "shore": 2}, "no field `shore`"), ({}, "share")])
def test_from_plain_refuses_other_fields(value: dict[str, Any], problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        from_plain(Leaf, value)
