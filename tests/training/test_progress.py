from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import Trainer

from subnet_ft.training.progress import FiguresBesideBar, show_progress


class StandIn:
    """The part of a trainer that `show_progress` touches."""

    def __init__(self, *, disable_tqdm: bool) -> None:
        self.args = SimpleNamespace(disable_tqdm=disable_tqdm)
        self.added: list[Any] = []

    def remove_callback(self, callback: Any) -> None:
        pass

    def add_callback(self, callback: Any) -> None:
        self.added.append(callback)


@pytest.mark.parametrize(
    ("progress", "disable_tqdm", "bars"), [(True, False, 1), (True, True, 0), (False, False, 0), (False, True, 0)]
)
def test_show_progress_honours_disable_tqdm(progress: bool, disable_tqdm: bool, bars: int) -> None:
    trainer = StandIn(disable_tqdm=disable_tqdm)
    show_progress(cast(Trainer, trainer), progress=progress)
    assert [type(callback) for callback in trainer.added] == [FiguresBesideBar] * bars
