from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from subnet_ft.errors import PlanError
from subnet_ft.plan.request import PLANNED, Request


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "at least 1, got 0"),
        ({"methods": ("lorra",)}, "`lorra` is no method. Planned: full, subnet, lora"),
        ({"methods": ("qlora",)}, "`qlora` is not planned"),
        ({"shardings": ("zero3",)}, "choose among none, ddp, fsdp2"),
        ({"shardings": ("none",), "gpus": 2}, "Choose ddp or fsdp2, or --gpus 1"),
        ({"density": 0.0}, r"lies in \(0, 1\], got 0.0"),
        ({"density": 0.1, "mask": Path("a")}, "Leave out one of them"),
        ({"prompt_tokens": 0}, "--prompt-tokens must be at least 1"),
        ({"tokens": 0}, "--tokens must be at least 1"),
        ({"device": "tpu"}, "choose among cuda, cpu"),
    ],
)
def test_request_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Request(**options)


def test_request_plans_three_methods_and_what_several_gpus_are_for() -> None:
    assert Request().all_methods == ("full", "subnet", "lora")
    assert Request().all_shardings == ("none",)
    assert Request(gpus=2).all_shardings == ("ddp", "fsdp2")
    assert Request(methods=PLANNED).all_methods == PLANNED
