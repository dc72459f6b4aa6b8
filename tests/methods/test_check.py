"""A method that cannot serve the model is refused before its weights are loaded."""

from __future__ import annotations

import pytest

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.errors import MethodError
from subnet_ft.methods.check import check_method
from subnet_ft.pipeline import load_checked_recipe
from subnet_ft.recipe.methods import METHODS


@pytest.mark.parametrize("name", METHODS)
def test_check_method_accepts_what_serves(name: str) -> None:
    recipe = load_checked_recipe("tiny/sft", ["methods.bitfit.config.terms=bias_and_norm"])
    check_method(name, recipe, open_checkpoint("tiny:llama"))


@pytest.mark.parametrize(
    ("name", "family", "setting", "message"),
    [
        ("bitfit", "llama", "seed=0", r"has no bias"),
        ("last_layers", "llama", "methods.last_layers.config.num_layers=3", r"2 decoder layers.* asks for 3"),
        ("adaption_prompt", "qwen2", "seed=0", r"`adaption_prompt` does not go with `Qwen2ForCausalLM`"),
        ("ia3", "phi3", "seed=0", r"`ia3` does not go with `Phi3ForCausalLM`: Please specify `target_modules`"),
        ("dora", "mixtral", "seed=0", r"`dora` does not go with `MixtralForCausalLM`"),
    ],
)
def test_check_method_refuses(name: str, family: str, setting: str, message: str) -> None:
    recipe = load_checked_recipe("tiny/sft", [setting])
    with pytest.raises(MethodError, match=message):
        check_method(name, recipe, open_checkpoint(f"tiny:{family}"))
