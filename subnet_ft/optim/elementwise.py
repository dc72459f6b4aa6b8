"""Which optimizers can run on compact tensors: those that treat every weight by itself."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch

from subnet_ft.errors import OptimizerError

_SHAPE = "needs the rows and columns of a matrix, which the compact (K,) weights of a subnetwork do not have"
_NORM = "scales its step by the norm of a whole tensor, which over the subnetwork alone is another algorithm"
_CLOSURE = "evaluates the model several times in one step, each time at other weights"
_SPARSE = "takes sparse gradients, and compact gradients are dense"

REFUSED = {
    "Muon": f"orthogonalizes the update of a matrix and {_SHAPE}",
    "Shampoo": f"preconditions rows and columns and {_SHAPE}",
    "SOAP": f"preconditions rows and columns and {_SHAPE}",
    "PSGD": f"preconditions rows and columns and {_SHAPE}",
    "Kron": f"preconditions rows and columns and {_SHAPE}",
    "AdaFactor": f"factors second moments by row and column and {_SHAPE}",
    "CAME": f"factors second moments by row and column and {_SHAPE}",
    "SM3": f"keeps one accumulator per row and column and {_SHAPE}",
    "GaLore": f"projects gradients to a low rank and {_SHAPE}",
    "Apollo": f"projects gradients to a low rank and {_SHAPE}",
    "Adam_mini": f"keeps one second moment per block of a matrix and {_SHAPE}",
    "AdamMini": f"keeps one second moment per block of a matrix and {_SHAPE}",
    "Dion": f"orthogonalizes the update of a matrix and {_SHAPE}",
    "LAMB": _NORM,
    "LARS": _NORM,
    "LBFGS": _CLOSURE,
    "SAM": _CLOSURE,
    "SparseAdam": _SPARSE,
}
"""Why an optimizer cannot be wrapped, by a word in the name of its class or of a class that it derives from."""

# These packages call their classes AdamW and Adafactor.
_PACKAGES = {"galore_torch": "GaLore", "q_galore_torch": "GaLore", "apollo_torch": "Apollo"}


def check_elementwise(optimizer_cls: type[torch.optim.Optimizer]) -> None:
    """Refuse a class that is no optimizer, or that needs more than each weight and its gradient.

    Raises:
        TypeError: It is no subclass of `torch.optim.Optimizer`.
        OptimizerError: It, or a class that it derives from, bears a word of `REFUSED` in its name.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        found = (
            f"`{optimizer_cls.__name__}`" if isinstance(optimizer_cls, type) else f"a {type(optimizer_cls).__name__}"
        )
        raise TypeError(
            f"`optimizer_cls` must be a subclass of torch.optim.Optimizer, got {found}. Pass the class, such "
            "as `torch.optim.AdamW`, and its options as keywords."
        )
    for ancestor in optimizer_cls.__mro__:
        package = _PACKAGES.get(ancestor.__module__.partition(".")[0])
        for word, reason in REFUSED.items():
            if word == package or _bears(ancestor.__name__, word):
                derived = "" if ancestor is optimizer_cls else f"derives from `{ancestor.__name__}`, which "
                raise OptimizerError(
                    f"`{optimizer_cls.__name__}` cannot train a subnetwork: it {derived}{reason}. Use an element-wise "
                    "optimizer, such as `torch.optim.AdamW` or `MaskedAdamW`."
                )


def check_keywords(optimizer_cls: type[torch.optim.Optimizer], keywords: Mapping[str, Any]) -> None:
    """Refuse keywords that the constructor of an optimizer does not have.

    Raises:
        TypeError: One is unknown, or is the parameters, which come from elsewhere.
    """
    parameters = list(inspect.signature(optimizer_cls).parameters.values())
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    options = named[1:]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for keyword in keywords:
        if keyword in {"params", "parameters", "param_groups", *named[:1]}:
            raise TypeError(
                f"`{keyword}` is no option here: `MaskedOptimizer` makes the parameters of `{optimizer_cls.__name__}` "
                "from `named_parameters`. Leave it out, and put options of single tensors into groups."
            )
        if keyword not in options and not takes_any:
            close = difflib.get_close_matches(keyword, options, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else f". It has {', '.join(options)}."
            raise TypeError(f"`{optimizer_cls.__name__}` has no option `{keyword}`{hint}")


def _bears(name: str, word: str) -> bool:
    """Whether a class name has a word: `FusedLamb` and `LAMB8bit` have LAMB, `LambdaAdam` has not."""
    forms = {word, word.upper(), word.capitalize()}
    return re.search(rf"(?:{'|'.join(map(re.escape, forms))})(?![a-z])|^{re.escape(word.lower())}$", name) is not None
