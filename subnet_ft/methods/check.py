"""Whether a method can serve a model, found out before a weight of it is loaded."""

from __future__ import annotations

import torch

from subnet_ft.checkpoints import Checkpoint
from subnet_ft.checkpoints.models import kind_of
from subnet_ft.methods.adapters import adapter_config, refusals_of, wrap
from subnet_ft.methods.masks import trained_names
from subnet_ft.recipe import MethodSpec, Recipe
from subnet_ft.recipe.methods import METHODS


def check_method(name: str, recipe: Recipe, base: Checkpoint) -> None:
    """Try a method on the model without weights; what needs weights or data is refused only when training starts.

    Args:
        name: A name in `METHODS`.
        recipe: Its settings of the method apply.
        base: The recipe's base, of which only the config and the names are read.

    Raises:
        MethodError: The method cannot serve this model.
    """
    method, config = METHODS[name], recipe.methods.get(name, MethodSpec()).config
    if method.trains == "mask" and method.config is not None:
        trained_names(name, base, config)
    # SHiRA draws its indices from weights that are there.
    if method.trains == "adapter" and name != "shira":
        model = base.empty_model()
        with refusals_of(method, type(model).__name__), torch.random.fork_rng(devices=[]):
            wrap(model, adapter_config(method, config, base=str(base.folder), kind=kind_of(model)))
