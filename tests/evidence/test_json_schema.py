"""The generator of schemas, and the schemas in docs/: what they say, and that our files follow them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import study_runs
from jsonschema import Draft202012Validator, ValidationError
from report_evidence import full_report

from subnet_ft.evidence.comparison import MethodComparison, build_comparison
from subnet_ft.evidence.json_schema import json_schema
from subnet_ft.evidence.report import Report, RunEvidence, build_report


@dataclass(frozen=True)
class Leaf:
    """One leaf."""

    size: float
    """In metres,
    above zero."""
    colour: Literal["green", "brown"] = "green"


@dataclass(frozen=True)
class Tree:
    """A tree.

    And more that a schema does not need.
    """

    name: str
    leaves: list[Leaf]
    """In order."""
    by_name: dict[str, Leaf | None]
    parent: Tree | None = None
    span: tuple[int, int] = (0, 1)
    notes: Any = None
    age: int | None = None
    """In years."""
    steps: tuple[bool, ...] = field(default_factory=tuple)


def valid(schema: dict[str, Any], value: Any) -> bool:
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema).is_valid(value)


def as_read(value: dict[str, Any]) -> dict[str, Any]:
    """Return what a reader of the file gets."""
    read: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    return read


def test_json_schema_says_types_and_texts() -> None:
    schema = json_schema(Tree, identifier="urn:tree")
    assert (schema["$id"], schema["title"], schema["description"]) == ("urn:tree", "Tree", "A tree.")
    assert schema["properties"] == {
        "name": {"type": "string"},
        "leaves": {"type": "array", "items": {"$ref": "#/$defs/Leaf"}, "description": "In order."},
        "by_name": {
            "type": "object",
            "additionalProperties": {"anyOf": [{"$ref": "#/$defs/Leaf"}, {"type": "null"}]},
        },
        "parent": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "null"}]},
        "span": {
            "type": "array",
            "prefixItems": [{"type": "integer"}, {"type": "integer"}],
            "minItems": 2,
            "maxItems": 2,
        },
        "notes": {},
        "age": {"type": ["integer", "null"], "description": "In years."},
        "steps": {"type": "array", "items": {"type": "boolean"}},
    }
    leaf = schema["$defs"]["Leaf"]
    assert leaf["properties"]["size"] == {"type": "number", "description": "In metres, above zero."}
    assert leaf["properties"]["colour"] == {"enum": ["green", "brown"]}


def test_json_schema_accepts_what_asdict_gives_and_nothing_else() -> None:
    schema = json_schema(Tree, identifier="urn:tree")
    leaf = {"size": 1.5, "colour": "brown"}
    tree = {
        "name": "oak",
        "leaves": [leaf],
        "by_name": {"a": None},
        "parent": None,
        "span": [0, 3],
        "notes": {"x": [1]},
    }
    tree |= {"age": None, "steps": [True]}
    assert valid(schema, tree)
    assert valid(schema, {**tree, "parent": tree})
    for change in (
        {"name": 3},
        {"leaves": [{"size": 1.5}]},
        {"leaves": [{**leaf, "colour": "blue"}]},
        {"span": [0]},
        {"further": 1},
        {"steps": [1]},
    ):
        assert not valid(schema, {**tree, **change}), change


def test_json_schema_refuses_types_that_json_has_not() -> None:
    @dataclass(frozen=True)
    class Odd:
        things: set

    with pytest.raises(TypeError, match=r"`Odd.things` has the type"):
        json_schema(Odd, identifier="urn:odd")


def test_published_schemas_are_those_of_the_sources(write_schemas: Any) -> None:
    for name in write_schemas.KINDS:
        committed = (write_schemas.DOCS / f"{name}.schema.json").read_text(encoding="utf-8")
        assert committed == write_schemas.schema_text(name), f"docs/{name}.schema.json is old: run `make schemas`"


@pytest.fixture(scope="module")
def write_schemas() -> Any:
    """Return scripts/write_schemas.py as a module."""
    import importlib.util
    from pathlib import Path

    path = Path(__file__).resolve().parents[2] / "scripts" / "write_schemas.py"
    spec = importlib.util.spec_from_file_location("write_schemas", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published(write_schemas: Any, name: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((write_schemas.DOCS / f"{name}.schema.json").read_text(encoding="utf-8")))


def test_reports_follow_the_published_schema(write_schemas: Any) -> None:
    schema = published(write_schemas, "report")
    runs = {name: RunEvidence(name) for name in ("base", "full", "subnet")}
    for report in (full_report(), build_report(version="0", **runs)):
        written = as_read(report.to_dict())
        schema.validate(written)
        assert written["schema"] == schema.schema["$id"]
        assert Report.from_dict(written) == report
    # Nothing that a full report holds is left open.
    without_mask = {key: value for key, value in written.items() if key != "mask"}
    with pytest.raises(ValidationError, match="'mask' is a required property"):
        schema.validate(without_mask)
    with pytest.raises(ValidationError, match="'won' is not one of"):
        schema.validate({**written, "verdict": "won"})


def test_comparisons_and_studies_follow_their_published_schemas(write_schemas: Any) -> None:
    empty = {"base_records": None, "methods": [], "confidence": 0.95, "recipe": {}, "seed": 0}
    comparison = build_comparison(version="0", **empty)
    study = study_runs.report(
        "which_mask",
        study_runs.cell("as_written"),
        study_runs.cell("uniform", 0.4, versus=0.5, changed=0.2, mask=study_runs.mask()),
        overlaps=[study_runs.pair("uniform")],
    )
    for name, written in (("comparison", as_read(comparison.to_dict())), ("study", as_read(study.to_dict()))):
        schema = published(write_schemas, name)
        schema.validate(written)
        assert written["schema"] == schema.schema["$id"]
    assert MethodComparison.from_dict(as_read(comparison.to_dict())) == comparison
