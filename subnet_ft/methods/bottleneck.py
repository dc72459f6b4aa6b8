"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751) as a method of PEFT, which has none.

PEFT's way to add one is a config, a tuner and a layer in its tables, and this module puts them there. So TRL knows the
model for what it is, `disable_adapter()` gives the base, and saving, loading and a second adapter beside the first work
as for LoRA. PEFT's helper for that, `register_peft_method`, takes only names of its own enum; the tables behind it, and
everything that looks into them, go by the value, which is a string. The other ways are worse: modules inserted in the
base and named in `modules_to_save` are kept twice, and a model around the model is none that TRL would recognise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from transformers.activations import ACT2FN

from subnet_ft.errors import MethodError
from subnet_ft.methods.layers import decoder_layers

PEFT_TYPE = "BOTTLENECK"
"""PEFT's name of the method, as `adapter_config.json` has it."""

_PREFIX = "bottleneck_"


@dataclass
class BottleneckConfig(PeftConfig):
    """An adapter after the attention block and one after the MLP block of every decoder layer."""

    bottleneck_size: int | None = None
    """Width of the bottleneck; `None`: the hidden size divided by `reduction_factor`."""

    reduction_factor: float = 16.0
    """How many times narrower than the hidden size the bottleneck is."""

    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """The nonlinearity between the projections."""

    init_std: float = 0.01
    """Standard deviation of the down-projection's first weights. The up-projection starts at zero, so the model starts
    as its base."""

    target_modules: list[str] | set[str] | str | None = field(default=None)
    """Blocks to adapt, as PEFT matches names; `None`: the two of every decoder layer, found by structure."""

    modules_to_save: list[str] | None = None
    """Modules that are trained whole and saved beside the adapters: PEFT names a classifier's head here."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # upstream has no types here
        self.peft_type = PEFT_TYPE
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            raise ValueError(f"`bottleneck_size` must be >= 1, got {self.bottleneck_size}")
        if self.reduction_factor < 1:
            raise ValueError(f"`reduction_factor` must be >= 1, got {self.reduction_factor}")
        if self.init_std <= 0:
            raise ValueError(f"`init_std` must be > 0, got {self.init_std}")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class BottleneckLayer(torch.nn.Module, BaseTunerLayer):
    """A block of a decoder layer, and the adapters after it: `h + up(activation(down(h)))`.

    `h` is what the block returns, or the first of the tuple that it returns, before the layer adds its residual.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = torch.nn.ModuleDict()
        self.bottleneck_up = torch.nn.ModuleDict()
        self._activations: dict[str, Any] = {}

    def update_layer(self, adapter_name: str, config: BottleneckConfig, hidden_size: int) -> None:
        """Add an adapter, its up-projection zero."""
        width = config.bottleneck_size or max(1, round(hidden_size / config.reduction_factor))
        down, up = torch.nn.Linear(hidden_size, width), torch.nn.Linear(width, hidden_size)
        torch.nn.init.trunc_normal_(down.weight, std=config.init_std, a=-2 * config.init_std, b=2 * config.init_std)
        for zero in (down.bias, up.weight, up.bias):
            torch.nn.init.zeros_(zero)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self._activations[adapter_name] = ACT2FN[config.activation]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the block, then its active adapters; in float32, added in the block's dtype."""
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                inner = self._activations[name](down(hidden.to(down.weight.dtype)))
                hidden = hidden + up(inner).to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class BottleneckModel(BaseTuner):
    """Puts a `BottleneckLayer` around the blocks of every decoder layer."""

    prefix = _PREFIX
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # as upstream declares it

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        if peft_config.target_modules is None:
            peft_config.target_modules = set(blocks_of(model))

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        model: Any = self.model
        layer = target if isinstance(target, BottleneckLayer) else BottleneckLayer(target)
        layer.update_layer(adapter_name, peft_config, model.config.get_text_config().hidden_size)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(new_module, BottleneckLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # Unloading: PEFT would hand on the one weight that it thinks every layer has.
            setattr(parent, child_name, new_module)


def blocks_of(model: torch.nn.Module) -> list[str]:
    """Return the names of the two blocks of every decoder layer: what has matrices and returns hidden states.

    Blocks are the children of a layer that hold a matrix; of matrices that are children themselves, only those that
    return to the hidden size count, so that two linear layers in a row are one MLP.

    Raises:
        MethodError: A layer has another number of blocks than two.
    """
    untyped: Any = model
    hidden_size = untyped.config.get_text_config().hidden_size
    stack, layers = decoder_layers(model)
    names = []
    for index, layer in enumerate(layers):
        found = [name for name, child in layer.named_children() if _is_block(child, hidden_size)]
        if len(found) != 2:
            raise MethodError(
                f"Layer {index} of `{type(model).__name__}` has {len(found)} blocks ({', '.join(found) or 'none'}); "
                "bottleneck adapters follow an attention block and an MLP block. Name the blocks in "
                "`methods.adapters.config.target_modules`."
            )
        names += [f"{stack}.{index}.{name}" for name in found]
    return names


def _is_block(module: Any, hidden_size: int) -> bool:
    own = module.base_layer if isinstance(module, BottleneckLayer) else module
    if isinstance(own, torch.nn.Linear):
        return own.out_features == hidden_size
    return any(parameter.dim() > 1 for parameter in own.parameters())


def _register() -> None:
    tables: list[tuple[Any, Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, BottleneckConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, BottleneckModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, _PREFIX),
    ]
    for table, entry in tables:
        table[PEFT_TYPE] = entry


_register()
