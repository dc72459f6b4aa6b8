"""What a trainer needs to train an adapter as it was built, and what TRL does to one, undone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from subnet_ft.methods.adapters import ADAPTER, adapter_parameters, refusals_of
from subnet_ft.recipe.methods import Method

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

_TRL_REFERENCE = "ref"
_MOST_TEXTS = 1000


def index_nbytes(model: PeftModel) -> int:
    """Count the bytes of the indices by which SHiRA knows its weights; they are neither parameters nor buffers."""
    indices = [index for module in model.modules() for index in getattr(module, "shira_indices", {}).values()]
    return sum(index.nbytes for index in indices)


@contextmanager
def left_as_built(model: PeftModel, method: Method, trainer: str) -> Iterator[None]:
    """Build a trainer inside, and the adapter is afterwards what it was before.

    TRL copies an adapter that it is given, as the reference model, and computes with the copy. The reference of every
    method here is the base, so the copy goes, and TRL switches the adapter off instead: bit for bit the base, and no
    weights more. On a quantized base TRL rounds adapters to bfloat16; their values come back.

    Args:
        model: The base with its adapter. In-out.
        method: Named where the trainer refuses it.
        trainer: Name of the trainer's class.

    Raises:
        MethodError: The trainer refuses the adapter.
    """
    values = {name: parameter.data for name, parameter in adapter_parameters(model).items()}
    with refusals_of(method, trainer), warnings.catch_warnings():
        # PEFT's prefix tuning minds the name of TRL's copy, which goes at once.
        warnings.filterwarnings("ignore", message="Adapter name 'ref' should not be contained in the prefix")
        yield
    if model.peft_config[ADAPTER].is_adaption_prompt:
        # PEFT keeps the forward that the base had before TRL replaced it.
        inner: Any = model.base_model
        inner.forward = inner.model.forward
    if _TRL_REFERENCE in model.peft_config:
        model.delete_adapter(_TRL_REFERENCE)
    for name, parameter in adapter_parameters(model).items():
        parameter.data = values[name]


def prompt_texts(dataset: Dataset, tokenizer: Any) -> list[str]:
    """Return the first training prompts as the model reads them, for methods that look at data before they train.

    Args:
        dataset: In TRL's format: a prompt as text or messages, or whole conversations.
        tokenizer: Renders messages.
    """
    texts = []
    for row in dataset.select(range(min(len(dataset), _MOST_TEXTS))):
        value = next(row[key] for key in ("prompt", "chosen", "messages", "text") if key in row)
        texts.append(value if isinstance(value, str) else tokenizer.apply_chat_template(value, tokenize=False))
    return texts
