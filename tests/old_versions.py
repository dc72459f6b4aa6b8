"""What tests must know of older versions that `pyproject.toml` allows and that behave differently."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version

OLD_TRL = Version(version("trl")) < Version("1.16")
OLD_TRANSFORMERS = Version(version("transformers")) < Version("5.24")


def needs_trl_1_16(reason: str) -> pytest.MarkDecorator:
    """Skip a test under a TRL in which what it checks is otherwise."""
    return pytest.mark.skipif(OLD_TRL, reason=f"before TRL 1.16 {reason}")


def needs_transformers_5_24(reason: str) -> pytest.MarkDecorator:
    """Skip a test under a transformers in which what it checks is otherwise."""
    return pytest.mark.skipif(OLD_TRANSFORMERS, reason=f"before transformers 5.24 {reason}")
