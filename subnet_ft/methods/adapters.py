"""Adapters: weights added to a frozen base, by PEFT or by `bottleneck.py`, and what they start as.

One rule for dtypes: the trainable weights of an adapter are float32, whatever the base is in, so that no update is lost
and no second copy is needed; PEFT's layers cast what they compute. What takes part in the base's own computation stays
in the base's dtype, and the optimizer keeps float32 masters: the prompts of `adaption_prompt`, which PEFT feeds to the
base's projections, and the head of a reward model.

A reward model's head is new, so it is trained with the adapter, whichever it is: PEFT puts a copy beside the base's own
head, and saves it in the adapter's file.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.checkpoints.models import Kind, kind_of
from subnet_ft.errors import MethodError, SubnetError
from subnet_ft.masks import Provenance, SubnetMask, TensorMask, by_canonical_name
from subnet_ft.methods.layers import head_names
from subnet_ft.methods.learned_prompts import generate_as_trained
from subnet_ft.methods.on_quantized import compute_on_quantized
from subnet_ft.recipe.methods import METHODS, Method

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "default"
"""PEFT's name of the one adapter that a model has."""

_TASKS: dict[Kind, str] = {"language_model": "CAUSAL_LM", "reward_model": "SEQ_CLS"}


def attach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    config: Mapping[str, Any] | None = None,
    *,
    seed: int,
    texts: Sequence[str] = (),
) -> PeftModel:
    """Freeze a model and add a method's trainable weights to it.

    Args:
        model: The base. In-out: its weights stay, its modules are wrapped.
        tokenizer: Its tokenizer.
        name: A method that trains an adapter.
        config: Fields of the method's config, over its defaults.
        seed: Of the new weights; the same seed gives the same bits. The global random state is left as it was.
        texts: Training prompts, for `eva`, which starts from what the layers see of them.

    Raises:
        MethodError: The method cannot serve this model, or not with this config.
    """
    method = METHODS[name]
    built = adapter_config(method, config or {}, base=model.config._name_or_path, kind=kind_of(model))
    with refusals_of(method, type(model).__name__), torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = wrap(model, built)
        if name == "eva":
            from subnet_ft.methods.eva import start_from_activations

            start_from_activations(adapted, tokenizer, texts)
    return adapted


def adapter_config(
    method: Method, config: Mapping[str, Any], *, base: str, kind: Kind = "language_model"
) -> PeftConfig:
    """Build a method's PEFT config: its defaults, what a recipe changes, and what makes it this method.

    Args:
        method: The method.
        config: Fields that a recipe sets.
        base: Folder of the base, whose tokenizer a learned prompt that starts as text needs.
        kind: What the base is.
    """
    fields = {**method.defaults, **config, **method.fixed, "task_type": _TASKS[kind]}
    if fields.get("prompt_tuning_init") == "TEXT":
        fields["tokenizer_name_or_path"] = base
    if method.name == "eva":
        from peft import EvaConfig

        fields["eva_config"] = EvaConfig(**fields.get("eva_config") or {})
    built: PeftConfig = method.config_class(**fields)
    return built


def wrap(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Add an adapter of `config`, its weights as PEFT draws them and in the dtype of the rule above.

    Raises:
        MethodError: The base has a new head, and PEFT does not train it with this config.
    """
    from peft import get_peft_model

    base, heads = {id(parameter) for parameter in model.parameters()}, head_names(model)
    with warnings.catch_warnings():
        # EVA's batches fit beside the random weights that it replaces; and PEFT asks the model by an old name.
        warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage=False")
        warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated")
        adapted: Any = get_peft_model(model, config)
    base |= {id(parameter) for parameter in _trained_heads(adapted, heads)}
    for parameter in adapted.parameters():
        # DoRA moves the weights of 8-bit layers, which makes new parameters of the base's integers.
        if id(parameter) not in base and parameter.is_floating_point() and not config.is_adaption_prompt:
            parameter.data = parameter.data.to(torch.float32)
    if config.is_prompt_learning and not heads:
        generate_as_trained(adapted)
    if getattr(model, "is_quantized", False):
        compute_on_quantized(adapted)
    return adapted  # type: ignore[no-any-return]  # `Any`, because upstream's types are wider than what it returns


def _trained_heads(adapted: Any, heads: Sequence[str]) -> list[torch.nn.Parameter]:
    """Return PEFT's trainable copies of the parameters of a head."""
    parameters, found = dict(adapted.named_parameters()), []
    for head in heads:
        module, _, kind = head.rpartition(".")
        copies = [name for name in parameters if name.endswith(f".{module}.modules_to_save.{ADAPTER}.{kind}")]
        if not copies:
            raise MethodError(
                f"PEFT's `{type(adapted.peft_config[ADAPTER]).__name__}` leaves `{head}` as it was drawn, and a reward "
                "model's head is new. Choose `lora`, or `full`."
            )
        found += [parameters[name] for name in copies]
    return found


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trainable weights of a model with an adapter, by their canonical names."""
    return {name: p for name, p in by_canonical_name(model.named_parameters()).items() if p.requires_grad}


def adapter_mask(model: torch.nn.Module) -> SubnetMask:
    """Return the mask that is full on an adapter's weights and empty on the base's."""
    parameters = by_canonical_name(model.named_parameters())
    trained = SubnetMask.full({name: tuple(parameter.shape) for name, parameter in adapter_parameters(model).items()})
    tensors = {
        name: trained.tensors.get(name) or TensorMask(torch.empty(0, dtype=torch.uint8), tuple(parameter.shape), 0)
        for name, parameter in parameters.items()
    }
    return SubnetMask(tensors, Provenance(source={"kind": "adapter"}))


@contextlib.contextmanager
def refusals_of(method: Method, where: str) -> Iterator[None]:
    """Say what PEFT or TRL refuses in one sentence that names the method.

    Args:
        method: The method.
        where: The class of the model or of the trainer.

    Raises:
        MethodError: Something inside was refused.
    """
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError) as error:
        if isinstance(error, SubnetError):
            raise
        reason = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
        raise MethodError(
            f"`{method.name}` does not go with `{where}`: {reason}. Change `methods.{method.name}.config`, or choose "
            "another method."
        ) from error
