"""Saving an adapter beside the name of its base, and loading what any method trained.

A stage of an adapter holds PEFT's own files (`adapter_config.json`, `adapter_model.safetensors`), the tokenizer, and
`adapter_base.json`, which says which base the weights belong to: on another one they mean nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.checkpoints.models import Kind, load_model, undo_upcasts
from subnet_ft.checkpoints.quantized import Quantization
from subnet_ft.checkpoints.resolve import is_hub_id
from subnet_ft.errors import CheckpointError, CheckpointMismatchError
from subnet_ft.masks import record_base
from subnet_ft.methods.adapters import ADAPTER, wrap
from subnet_ft.recipe.methods import METHODS

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
BASE = "adapter_base.json"
"""Which base an adapter belongs to."""

_FORMAT = 1


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter, not a whole model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, method: str, base: Path, base_name: str
) -> None:
    """Save an adapter's weights with its tokenizer, bound to its base.

    Args:
        model: The base with its trained adapter.
        tokenizer: Its tokenizer.
        folder: Gets the files.
        method: Name of the method.
        base: Folder of the checkpoint that the adapter was trained on.
        base_name: What the recipe calls it.
    """
    if is_hub_id(base_name):
        # Others who get the adapter have the Hub, not the folder of this machine's cache.
        config: Any = model.peft_config[ADAPTER]
        config.base_model_name_or_path = base_name
    # Without its row for every token: the vocabulary is the base's, and `auto` would look the base up on the Hub.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a model card, all blanks
    tokenizer.save_pretrained(folder)
    belongs_to = {
        "format": _FORMAT,
        "method": method,
        "base": base_name,
        "base_sha256": base_digest(open_checkpoint(base)),
        "quantization": METHODS[method].quantization,
    }
    (folder / BASE).write_text(json.dumps(belongs_to, indent=1) + "\n")


def base_digest(base: Checkpoint) -> str:
    """Return the SHA-256 over the names, dtypes and fingerprints of a base's weights, however they are sharded."""
    record = record_base(base)
    entries = [[name, record.dtypes[name], record.fingerprints[name]] for name in sorted(record.fingerprints)]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def load_trained(
    folder: Path,
    base: str | Path,
    *,
    revision: str | None = None,
    dtype: str,
    attn_implementation: str | None = None,
    quantization: Quantization | None = None,
    kind: Kind = "language_model",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what a stage saved: a whole checkpoint, or an adapter on its base.

    Args:
        folder: The stage's folder, or any checkpoint's.
        base: Folder or name of the recipe's base, opened only for an adapter.
        revision: Branch, tag or commit of a base on the Hub.
        dtype: Dtype of the base's weights in memory; those of an adapter are float32.
        attn_implementation: Passed to transformers; `None` lets it choose.
        quantization: Hold the model, or the base under an adapter, in 8 or 4 bits; `None`: as it was trained.
        kind: A language model or a reward model.

    Raises:
        CheckpointMismatchError: The adapter belongs to another base.
        CheckpointError: A file is missing, or does not hold what its config says.
    """
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation, "kind": kind}
    if not is_adapter(folder):
        return load_model(folder, **options, quantization=quantization)
    checkpoint, belongs_to = open_checkpoint(base, revision=revision), _belongs_to(folder)
    _check_base(folder, belongs_to, checkpoint)
    model, _ = load_model(checkpoint.folder, **options, quantization=quantization or belongs_to["quantization"])
    undo_upcasts(model, dtype=dtype)  # as it was when the adapter was trained
    from transformers import AutoTokenizer

    adapted: Any = load_adapter(model, folder)  # generates and computes as its base does
    return adapted, AutoTokenizer.from_pretrained(folder)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter in `folder` on its base, with the bits that were saved.

    Args:
        model: The base. In-out: its modules are wrapped.
        folder: Holds the adapter.

    Raises:
        CheckpointError: The file lacks weights that its config asks for, or has others.
    """
    import torch
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from subnet_ft.methods import bottleneck  # noqa: F401  # puts its config in PEFT's table

    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"`{folder}` has no `{WEIGHTS}`. Remove the folder to train again.")
    config: Any = PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # where the base lay then; which one it is, its digest says
    with torch.random.fork_rng():
        adapted: Any = wrap(model, config)
    try:
        stored = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(
            f"`{folder / WEIGHTS}` is not whole: {error}. Remove the folder to train again."
        ) from error
    own = get_peft_model_state_dict(adapted, adapter_name=ADAPTER, save_embedding_layers=False)
    wanted, found = _shapes(own), _shapes(stored)
    odd = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    if odd:
        raise CheckpointError(
            f"`{folder / WEIGHTS}` does not hold the adapter of its `{CONFIG}`: {len(odd)} weights are missing, odd "
            f"or of another shape, the first is `{odd[0]}`, {found.get(odd[0], 'not there')} instead of "
            f"{wanted.get(odd[0], 'none')}. Remove the folder to train again."
        )
    set_peft_model_state_dict(adapted, stored, adapter_name=ADAPTER)
    adapted.requires_grad_(False)
    return adapted.eval()  # type: ignore[no-any-return]  # `Any`, because upstream's types are wider


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _belongs_to(folder: Path) -> dict[str, Any]:
    try:
        belongs_to = json.loads((folder / BASE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"`{folder}` is an adapter without `{BASE}`, so its base is not known. Name a stage that "
            "`subnet-ft train` or `compare` finished."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"`{folder / BASE}` is not JSON: {error}") from error
    if not isinstance(belongs_to, dict) or belongs_to.get("format") != _FORMAT:
        raise CheckpointError(
            f"`{folder / BASE}` is of another format than {_FORMAT}. Use the subnet-ft that wrote it."
        )
    if not {"method", "base", "base_sha256", "quantization"} <= belongs_to.keys():
        raise CheckpointError(f"`{folder / BASE}` lacks what it should say. Remove the folder to train again.")
    return belongs_to


def _check_base(folder: Path, belongs_to: dict[str, Any], base: Checkpoint) -> None:
    found = base_digest(base)
    wanted = str(belongs_to["base_sha256"])
    if found != wanted:
        raise CheckpointMismatchError(
            f"The adapter in `{folder}` ({belongs_to['method']}) was trained on `{belongs_to['base']}`, whose "
            f"weights are not those of `{base.name}` (digest {wanted[:16]} there, {found[:16]} here). "
            "Load it on the base that it was trained on: `model.name` of its recipe."
        )
