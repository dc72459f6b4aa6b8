"""Loading a whole model with its tokenizer, and saving it as an ordinary checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subnet_ft.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    folder: Path, *, dtype: str, attn_implementation: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the causal language model in `folder` onto the GPU, if there is one, and its tokenizer.

    Args:
        folder: A checkpoint folder.
        dtype: Dtype of the weights in memory, such as `bfloat16`, those excepted that transformers keeps in float32.
        attn_implementation: Passed to transformers; `None` lets it choose.

    Raises:
        CheckpointError: transformers refuses the folder or the options; the message holds its reason.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        with _without_bars():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, ImportError, OSError) as error:
        raise CheckpointError(f"The model in `{folder}` cannot be loaded with {options}: {error}") from error
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    return model, tokenizer


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Overwrite the parameters of a model in memory by those of a checkpoint, whatever names they have on disk.

    Args:
        model: In-out; keeps its parameter objects, their dtypes and devices. Buffers are left alone.
        folder: A checkpoint of the same architecture.

    Raises:
        CheckpointError: The checkpoint lacks a parameter, or cannot be read.
    """
    import torch

    from subnet_ft.checkpoints import open_checkpoint

    stored = dict(open_checkpoint(str(folder)).tensors())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in stored:
                raise CheckpointError(f"`{folder}` has no weights for `{name}` of this model.")
            parameter.copy_(stored[name])


def undo_upcasts(model: PreTrainedModel, *, dtype: str) -> None:
    """Cast every weight that is wider than `dtype` to `dtype`, where that changes none of its values.

    transformers keeps some weights in float32, whatever dtype they are stored and asked for in: since 5.24 the routers
    of DeepSeek-V3 and its relatives. A run would save them in float32, and its checkpoint would not compare bit by bit
    with the base. A weight with values that `dtype` lacks is stored in float32, too, and stays as it is.

    Args:
        model: As loaded, before training. In-out; buffers are left alone.
        dtype: The dtype in which the model was loaded, such as `bfloat16`.
    """
    import torch

    for parameter in model.parameters():
        narrow = parameter.data.to(getattr(torch, dtype))
        if narrow.itemsize < parameter.itemsize and bool((narrow.to(parameter.dtype) == parameter.data).all()):
            parameter.data = narrow


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save model and tokenizer in `folder`."""
    with _without_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    # Bars for loading and saving last a moment each and bury the ones that matter; downloads keep theirs.
    from transformers.utils import logging as untyped

    logging: Any = untyped

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
