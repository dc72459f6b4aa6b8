"""The table of docs/plan.md is what the code prints, and its configs are those of the models that they name."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
from plan.recipes import loader
from transformers import AutoConfig

from subnet_ft.plan import Request, lines_for_terminal, make_plan
from subnet_ft.plan.shapes import shapes_of
from subnet_ft.plan.sizes import size_names, sizes_table
from subnet_ft.plan.trained import fully

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
CONFIGS = json.loads(files("subnet_ft.plan").joinpath("sizes.json").read_text(encoding="utf-8"))

WEIGHTS = {"1.5B": 1_543_714_304, "7B": 7_615_616_512, "32B": 32_763_876_352, "70B": 70_553_706_496}
"""As their publishers' checkpoints hold them, tied embeddings once."""


@pytest.mark.parametrize("size", WEIGHTS)
def test_sizes_have_the_weights_of_the_models_that_they_name(size: str) -> None:
    fields = dict(CONFIGS[size]["config"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    assert fully(shapes_of(config, size, dtype="bfloat16")).num_parameters == WEIGHTS[size]


def test_page_shows_the_first_size_as_the_code_prints_it() -> None:
    assert sizes_table(size_names()[:1]) in PAGE


@pytest.mark.slow
def test_page_shows_the_whole_table_as_the_code_prints_it() -> None:
    assert sizes_table() in PAGE


def test_page_shows_its_example_as_the_code_prints_it(tmp_path: Path) -> None:
    config = dict(CONFIGS["1.5B"]["config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    (shown,) = re.findall(r"^\$ subnet-ft plan paper/qwen.*?\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    from subnet_ft.plan import advise

    load, overrides = loader("paper/qwen2.5_1.5b_grpo_gsm8k_24gb"), (f"model.name={tmp_path}",)
    request = Request(memory=24 * 2**30, prompt_tokens=176, methods=("full", "subnet"))
    plan = make_plan(load, request, overrides)
    advice = {row: advise(load, overrides, request, row) for row in plan.rows if row.fits is False}
    # The name of the model decides where lines break.
    printed = " ".join("\n".join(lines_for_terminal(plan, advice)).split())
    assert " ".join(shown.split()) == printed.replace(str(tmp_path), "Qwen/Qwen2.5-1.5B-Instruct")
