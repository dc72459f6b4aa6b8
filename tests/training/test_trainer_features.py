"""Every feature on every trainer: each test is a cell of the table in `docs/trainers.md`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from feature_table import read_table
from training.every_trainer import TRAINERS
from training.trainer_features import FEATURES

from subnet_ft.errors import SubnetError

# What a trainer cannot do, and the words of its error.
REFUSED: dict[tuple[str, str], str] = {}


# KTO of older TRLs checkpoints a forward without gradients, too.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_restrict_on(trainer: str, feature: str, tmp_path: Path, record_property: Any) -> None:
    row, column = list(TRAINERS).index(trainer), list(FEATURES).index(feature)
    record_property("cell", [row, trainer, column, feature, len(TRAINERS) * len(FEATURES)])
    reason = REFUSED.get((trainer, feature))
    if reason is None:
        FEATURES[feature](trainer, tmp_path)
    else:
        with pytest.raises(SubnetError, match=reason):
            FEATURES[feature](trainer, tmp_path)
    record_property("outcome", outcome(trainer, feature))


def outcome(trainer: str, feature: str) -> str:
    """Return the words of a cell whose test passes."""
    reason = REFUSED.get((trainer, feature))
    return "yes" if reason is None else f"refused: {reason}"


def test_the_table_names_every_cell_with_its_outcome() -> None:
    page = Path(__file__).parents[2] / "docs" / "trainers.md"
    expected = {(trainer, feature): outcome(trainer, feature) for trainer in TRAINERS for feature in FEATURES}
    assert read_table(page.read_text(encoding="utf-8")) == expected
