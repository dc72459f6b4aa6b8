"""Generation with a learned prompt: PEFT 0.21 looks for the cache under the name that transformers 5.24 gave up.

Left alone, a learned prompt would be put before every new token, and a learned prefix would never be seen, both without
an error. `tests/methods/test_learned_prompts.py` compares generation with the model asked token by token.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel

_OLD, _NEW = "past_key_values", "cache"


def generate_as_trained(model: PeftModel) -> None:
    """Show PEFT the cache under the name that it knows, and the base under that of its transformers.

    Args:
        model: With a learned prompt or prefix. In-out: how it prepares the inputs of `generate`.
    """
    untyped: Any = model
    of_base, of_peft = untyped.base_model_prepare_inputs_for_generation, untyped.prepare_inputs_for_generation
    is_renamed = False

    def prepare_base(*args: Any, **kwargs: Any) -> dict[str, Any]:
        nonlocal is_renamed
        inputs: dict[str, Any] = of_base(*args, **kwargs)
        is_renamed = _NEW in inputs
        if is_renamed:
            inputs[_OLD] = inputs.pop(_NEW)
        return inputs

    def prepare(*args: Any, **kwargs: Any) -> dict[str, Any]:
        with warnings.catch_warnings():
            # Without position ids the model counts from the learned prompt on, as it did when it was trained.
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            inputs: dict[str, Any] = of_peft(*args, **kwargs)
        if is_renamed and _OLD in inputs:
            inputs[_NEW] = inputs.pop(_OLD)
        return inputs

    untyped.base_model_prepare_inputs_for_generation = prepare_base
    untyped.prepare_inputs_for_generation = prepare
