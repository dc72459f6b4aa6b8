"""The guard around transformers' internals."""

from __future__ import annotations

import pytest
import transformers

from subnet_ft.checkpoints import conversion, open_checkpoint
from subnet_ft.errors import CheckpointError


def test_check_internals_accepts_the_installed_transformers() -> None:
    conversion.check_internals()


def rename_key(source_key: str, renamings: list[object], *, reverse: bool) -> None:
    """Stand in for a `rename_source_key` of another release."""


def dot_natural_key(s: str, order: str) -> None:
    """Stand in for a `dot_natural_key` with a new required argument."""


@pytest.mark.parametrize(
    ("name", "replacement", "problem"),
    [
        ("rename_source_key", rename_key, r"takes \(source_key, renamings, reverse\) and not \(source_key, weight_"),
        ("dot_natural_key", dot_natural_key, r"takes \(s, order\) and not \(s\)"),
        ("rename_source_key", None, "is gone"),
    ],
)
def test_open_checkpoint_refuses_changed_internals(
    name: str, replacement: object, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if replacement is None:
        monkeypatch.delattr(transformers.core_model_loading, name)
    else:
        monkeypatch.setattr(transformers.core_model_loading, name, replacement)
    with pytest.raises(CheckpointError, match=rf"transformers \S+ changed .*`transformers\.\S+{name}` {problem}"):
        open_checkpoint("tiny:llama")
