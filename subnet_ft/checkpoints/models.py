"""Loading a whole model with its tokenizer, and saving it as an ordinary checkpoint."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from subnet_ft.checkpoints.quantized import Quantization, config_of, settle
from subnet_ft.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Kind = Literal["language_model", "reward_model"]
"""What a checkpoint is loaded as: `reward_model`, a sequence classifier with one output, which is the reward."""

# transformers' name of every classifier's class ends so.
_CLASSIFIER = "ForSequenceClassification"


def load_model(
    folder: Path,
    *,
    dtype: str,
    attn_implementation: str | None = None,
    kind: Kind = "language_model",
    quantization: Quantization | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model in `folder` onto the GPU, if there is one, and its tokenizer.

    Args:
        folder: A checkpoint folder.
        dtype: Dtype of the weights in memory, such as `bfloat16`, those excepted that transformers keeps in float32.
        attn_implementation: Passed to transformers; `None` lets it choose.
        kind: A causal language model, or a reward model.
        quantization: Hold the weights of linear layers in 8 or 4 bits, frozen; `None` as they are stored.

    Raises:
        CheckpointError: The folder holds the other kind, transformers refuses it or the options, or this machine cannot
            run quantized layers, or there are none.
        MissingDependencyError: bitsandbytes is not installed, and `quantization` needs it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    _refuse_other_kind(folder, kind)
    auto: Any = AutoModelForSequenceClassification if kind == "reward_model" else AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        options["quantization_config"] = config_of(quantization, folder)
    try:
        with _without_bars():
            model = _load(auto, folder, options)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, ImportError, OSError) as error:
        raise CheckpointError(f"The model in `{folder}` cannot be loaded with {options}: {error}") from error
    if quantization is not None:
        settle(model, quantization=quantization)  # transformers has put it onto the GPU
    elif torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    return model, tokenizer


def _load(auto: Any, folder: Path, options: dict[str, Any]) -> PreTrainedModel:
    """Load a model through transformers, which reads whole files itself; weights in parts are put together for it."""
    from subnet_ft.checkpoints.checkpoint import Checkpoint
    from subnet_ft.checkpoints.parts import parts_folder

    model: PreTrainedModel
    if parts_folder(folder) is None:
        model = auto.from_pretrained(folder, **options)
    else:
        checkpoint = Checkpoint(str(folder), folder)
        architecture: Any = type(checkpoint.empty_model())
        model = architecture.from_pretrained(
            None, config=checkpoint.config, state_dict=checkpoint.state_dict(), **options
        )
    return model


def kind_of(model: torch.nn.Module) -> Kind:
    """Return what a model in memory is."""
    return "reward_model" if type(model).__name__.endswith(_CLASSIFIER) else "language_model"


def save_with_reward_head(language_model: Path, folder: Path, *, dtype: str, seed: int) -> None:
    """Save a language model as a reward model: its weights without the output embedding, and a new head of one output.

    The head is drawn from a normal distribution with the model's own `initializer_range`. Where the model names no
    padding token it gets the tokenizer's, or else the end-of-sequence token: the reward is read at the last token that
    is not padding.

    Args:
        language_model: A causal language model's checkpoint.
        folder: Where the reward model goes, with the tokenizer.
        dtype: Dtype of the saved weights.
        seed: Of the head; the global random state is left as it was.

    Raises:
        CheckpointError: The checkpoint is no language model, or its architecture has no such form.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    _refuse_other_kind(language_model, "language_model")
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    options: dict[str, Any] = {"num_labels": 1, "dtype": getattr(torch, dtype), "output_loading_info": True}
    try:
        with _without_bars(), _without_report(), torch.random.fork_rng(devices=[]):
            model, found = AutoModelForSequenceClassification.from_pretrained(language_model, **options)
    except (ValueError, ImportError, OSError) as error:
        raise CheckpointError(f"`{language_model}` cannot become a reward model: {error}") from error
    new = sorted(found["missing_keys"])
    weights = dict(model.named_parameters())
    if len(new) != 1 or weights[new[0]].shape[:-1] != (1,):
        raise CheckpointError(
            f"`{language_model}` cannot become a reward model: `{type(model).__name__}` lacks {', '.join(new) or 'no'} "
            "weights of it, expected those of one linear head. Choose a decoder whose classifier has one."
        )
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    undo_upcasts(model, dtype=dtype)
    head = weights[new[0]]
    drawn = torch.empty(head.shape).normal_(std=config.initializer_range, generator=torch.Generator().manual_seed(seed))
    head.data = drawn.to(head.dtype)
    save_model(model, tokenizer, folder)


def _refuse_other_kind(folder: Path, kind: Kind) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # transformers says what is wrong with it
    architecture = next(iter(config.get("architectures") or ()), None) or "no architecture"
    is_classifier = architecture.endswith(_CLASSIFIER)
    if is_classifier and kind == "language_model":
        raise CheckpointError(
            f"`{folder}` is a classifier or a reward model ({architecture}), which writes no text. Name a language "
            "model."
        )
    if kind == "reward_model" and not is_classifier:
        raise CheckpointError(
            f"`{folder}` is no reward model but `{architecture}`. Name a run of `algorithm: reward`, such as "
            "`OUTPUT/full`, or its base, `OUTPUT/base`."
        )
    labels = len(config.get("id2label") or "ab")  # transformers writes no names of its default, two labels
    if kind == "reward_model" and labels != 1:
        raise CheckpointError(f"`{folder}` is a classifier of {labels} labels. A reward model has one output.")


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


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save model and tokenizer in `folder`.

    Args:
        model: Whose weights.
        tokenizer: Its tokenizer.
        folder: Gets the files.
        state_dict: The weights, where the model itself holds only parts of them.
    """
    with _without_bars():
        model.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)


def save_config(model: PreTrainedModel, folder: Path) -> None:
    """Save a model's config as `save_pretrained` does, without its weights.

    Args:
        model: In memory; FSDP2 may have put its own class before the model's.
        folder: Gets config.json, and generation_config.json of a model that writes text.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    # It warns that the head is new and the output embedding gone, which is what was asked for.
    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


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
