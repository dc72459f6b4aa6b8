"""YAML as recipes use it: YAML 1.2 scalars (`2e-5` is a number, `yes` and `on` are strings), no duplicate keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

# Tag, pattern, first characters; PyYAML tries the patterns of a first character in this order.
_SCALARS: tuple[tuple[str, str, list[str]], ...] = (
    ("tag:yaml.org,2002:null", r"null|Null|NULL|~|", ["", *"nN~"]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", [*"-+0123456789"]),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars above."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (shadows PyYAML's own table)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would otherwise read as another type."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (shadows PyYAML's own table)

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)
# PyYAML would read 010 as octal.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))


def read_yaml(text: str) -> tuple[Any, list[str]]:
    """Parse `text`; return its tree and one sentence per duplicate key or syntax error (the tree is then `None`)."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        problems = list(_duplicates(node, "", set()))
        return loader.construct_document(node), problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "YAML"
        return None, [f"{where}: not valid YAML, {error.problem or error.context}"]
    except yaml.YAMLError as error:
        return None, [f"YAML: {error}"]
    finally:
        loader.dispose()


def write_yaml(tree: Any) -> str:
    """Write plain dicts, lists and scalars so that `read_yaml` gives them back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _duplicates(node: yaml.Node, path: str, seen: set[int]) -> Iterator[str]:
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        entries = [(f"{path}.{key.value}" if path else str(key.value), key, value) for key, value in node.value]
        lines: dict[str, list[int]] = {}
        for name, key, _ in entries:
            lines.setdefault(name, []).append(key.start_mark.line + 1)
        for name, where in lines.items():
            if len(where) > 1:
                yield f"{name}: set {len(where)} times, on lines {' and '.join(map(str, where))}; keep one"
        for name, _, value in entries:
            yield from _duplicates(value, name, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _duplicates(value, path, seen)
