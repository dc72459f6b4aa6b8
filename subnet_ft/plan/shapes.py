"""A model's parameters, from its config alone: no weight is read, none is allocated."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subnet_ft.checkpoints import tiny
from subnet_ft.checkpoints.checkpoint import load_config
from subnet_ft.checkpoints.gguf import PACKAGE_PREFIX, locate_gguf
from subnet_ft.checkpoints.models import Kind
from subnet_ft.checkpoints.resolve import TINY_PREFIX, is_hub_id
from subnet_ft.errors import CheckpointError, MissingDependencyError
from subnet_ft.methods.layers import decoder_layers

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, eq=False)
class ModelShapes:
    """What a config says about a model in memory.

    Args:
        name: What the recipe calls it.
        config: Its config.
        kind: A language model, or a reward model.
        dtype: Of every weight.
        parameters: Shape of every parameter, tied weights once.
        head: Name of the output embedding; `None` for a reward model.
        is_tied: Whether the output embedding is the input embedding.
        layers: The prefix of every decoder layer: `fully_shard` makes a unit of each, and one of what is left.
        linears: Weights of linear layers, the output embedding excepted: what bitsandbytes quantizes.
    """

    name: str
    config: PretrainedConfig
    kind: Kind
    dtype: torch.dtype
    attn_implementation: str | None
    parameters: dict[str, tuple[int, ...]]
    head: str | None
    is_tied: bool
    layers: tuple[str, ...]
    linears: frozenset[str]

    def build(self) -> PreTrainedModel:
        """Build the model on the meta device."""
        return _build(self.config, self.kind, self.dtype, self.attn_implementation)

    @property
    def vocabulary(self) -> int:
        """Rows of the output embedding."""
        return 0 if self.head is None else self.parameters[self.head][0]

    @property
    def width(self) -> int:
        """Numbers of a hidden state."""
        return int(self.config.get_text_config().hidden_size)


@functools.lru_cache(maxsize=16)
def read_shapes(
    name: str,
    *,
    dtype: str,
    kind: Kind = "language_model",
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> ModelShapes:
    """Read a model's config and return its shapes.

    Args:
        name: A folder with a config.json, a Hub id (its config.json alone is fetched), a GGUF, or `tiny:FAMILY`.
        dtype: Of the weights in memory.
        kind: A causal language model, or a reward model on its backbone.
        revision: Of a Hub id.
        attn_implementation: As in a recipe's `model`.

    Raises:
        CheckpointError: There is no such config, or transformers cannot build its model.
        MissingDependencyError: A GGUF's reader is not installed.
    """
    return shapes_of(
        read_config(name, revision=revision), name, dtype=dtype, kind=kind, attn_implementation=attn_implementation
    )


def shapes_of(
    config: PretrainedConfig,
    name: str,
    *,
    dtype: str,
    kind: Kind = "language_model",
    attn_implementation: str | None = None,
) -> ModelShapes:
    """Return the shapes of the model that a config describes; arguments and errors as in `read_shapes`."""
    import torch

    try:
        model: Any = _build(config, kind, getattr(torch, dtype), attn_implementation)
    except (ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"transformers cannot build a model of the config of `{name}`: {error}") from error
    parameters = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    head = model.get_output_embeddings() if kind == "language_model" else None
    stack, layers = decoder_layers(model)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    return ModelShapes(
        name=name,
        config=config,
        kind=kind,
        dtype=getattr(torch, dtype),
        attn_implementation=attn_implementation,
        parameters=parameters,
        head=None if head is None else names[id(head.weight)],
        is_tied=head is not None and head.weight is model.get_input_embeddings().weight,
        layers=tuple(f"{stack}.{index}." for index in range(len(layers))),
        linears=frozenset(names[id(linear.weight)] for linear in linears),
    )


def read_config(name: str, *, revision: str | None = None) -> PretrainedConfig:
    """Read the config of a model by its name, and nothing else of it; errors as in `read_shapes`."""
    if name.startswith(TINY_PREFIX):
        return tiny.tiny_config(name.removeprefix(TINY_PREFIX))
    if name.startswith(PACKAGE_PREFIX) or name.endswith(".gguf"):
        return _gguf_config(name)
    if not is_hub_id(name):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise CheckpointError(
                f"There is no model `{name}`: no folder `{folder.absolute()}`. Check the path, or name a Hub id "
                "(`owner/model`), a GGUF (`package:MODULE/FILE.gguf`) or a tiny model (`tiny:llama`)."
            )
        return load_config(folder)
    return load_config(Path(_fetched(name, revision)).parent)


def _fetched(name: str, revision: str | None) -> str:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return str(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, HFValidationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        offline = " HF_HUB_OFFLINE is set: only the local Hub cache was searched." if constants.HF_HUB_OFFLINE else ""
        raise CheckpointError(
            f"The config of the Hub model `{name}` cannot be read.{offline} The Hub's client says: {reason} Check the "
            "name and your access to it, or make a folder with its config.json and name that."
        ) from error


def _gguf_config(name: str) -> PretrainedConfig:
    from transformers import AutoConfig

    file = locate_gguf(name)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    except ImportError as error:
        raise MissingDependencyError("gguf", f"to read `{file.name}`", "gguf") from error
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"transformers cannot read the config in the GGUF `{file}`: {error}") from error
    return config


def _build(
    config: PretrainedConfig, kind: Kind, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    import copy

    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    own: Any = copy.deepcopy(config)
    options: dict[str, Any] = {"dtype": dtype}
    # What flash attention keeps for the backward pass torch's fused attention keeps, too, and that runs everywhere.
    if attn_implementation is not None and not attn_implementation.startswith("flash"):
        options["attn_implementation"] = attn_implementation
    if kind == "reward_model":
        own.num_labels = 1
    auto: Any = AutoModelForSequenceClassification if kind == "reward_model" else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(own, **options)
    return model
