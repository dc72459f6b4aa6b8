"""Which optimizers are refused, and how options are checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.optimization import Adafactor

from subnet_ft.errors import OptimizerError
from subnet_ft.optim.elementwise import check_elementwise, check_keywords


def optimizer_class(name: str, base: type = torch.optim.SGD, module: str = "somewhere") -> type:
    return type(name, (base,), {"__module__": module})


@pytest.mark.parametrize(
    ("optimizer_cls", "reason"),
    [
        (torch.optim.Muon, "`Muon` .* orthogonalizes the update of a matrix"),
        (optimizer_class("MyMuon", torch.optim.Muon), "`MyMuon` .* orthogonalizes"),
        (optimizer_class("Quiet", torch.optim.Muon), "`Quiet` .* derives from `Muon`, which orthogonalizes"),
        (optimizer_class("MuonWithAuxAdam"), "orthogonalizes"),
        (torch.optim.Adafactor, "factors second moments by row and column"),
        (Adafactor, "factors second moments by row and column"),
        (optimizer_class("AdaFactor"), "factors second moments by row and column"),
        (optimizer_class("DistributedShampoo"), "preconditions rows and columns"),
        (optimizer_class("SOAP"), "preconditions rows and columns"),
        (optimizer_class("GaLoreAdamW8bit"), "projects gradients to a low rank"),
        (optimizer_class("AdamW", module="galore_torch.adamw"), "projects gradients to a low rank"),
        (optimizer_class("APOLLOAdamW"), "projects gradients to a low rank"),
        (optimizer_class("AdamW", module="apollo_torch.adamw"), "projects gradients to a low rank"),
        (optimizer_class("CAME"), "factors second moments"),
        (optimizer_class("SM3"), "one accumulator per row and column"),
        (optimizer_class("Adam_mini"), "one second moment per block"),
        (optimizer_class("FusedLamb"), "norm of a whole tensor, .* another algorithm"),
        (optimizer_class("LAMB8bit"), "norm of a whole tensor, .* another algorithm"),
        (optimizer_class("lars"), "norm of a whole tensor, .* another algorithm"),
        (torch.optim.LBFGS, "several times in one step"),
        (torch.optim.SparseAdam, "compact gradients are dense"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_check_elementwise_names_what_cannot_train_a_subnetwork(optimizer_cls: type, reason: str) -> None:
    with pytest.raises(OptimizerError, match=f"{reason}.*Use an element-wise optimizer, such as `torch.optim.AdamW`"):
        check_elementwise(optimizer_cls)


@pytest.mark.parametrize("name", ["Lion", "LambdaAdam", "Camel", "SampledSGD", "DollarSGD", "AdamW8bit", "Sophia"])
def test_check_elementwise_lets_others_pass(name: str) -> None:
    check_elementwise(optimizer_class(name))


@pytest.mark.parametrize(
    "optimizer_cls", [torch.nn.Linear, "adamw", torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])]
)
def test_check_elementwise_wants_an_optimizer_class(optimizer_cls: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a subclass of torch\.optim\.Optimizer, got .*Pass the class"):
        check_elementwise(optimizer_cls)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"params": []}, "`params` is no option here: .* from `named_parameters`"),
        ({"parameters": []}, "`parameters` is no option here"),
        ({"momentun": 0.9}, "`SGD` has no option `momentun`; did you mean `momentum`?"),
        ({"master": "fp32"}, r"`SGD` has no option `master`\. It has lr, momentum, dampening"),
    ],
)
def test_check_keywords_names_a_wrong_one(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        check_keywords(torch.optim.SGD, {"lr": 0.1, **keywords})


def test_check_keywords_cannot_know_those_of_a_class_that_takes_any() -> None:
    class Any_(torch.optim.SGD):
        def __init__(self, weights: Any, **options: Any) -> None:
            super().__init__(weights, **options)

    check_keywords(Any_, {"lr": 0.1, "momentum": 0.9})
    with pytest.raises(TypeError, match="`weights` is no option here"):
        check_keywords(Any_, {"weights": []})
