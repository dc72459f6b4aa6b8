"""From a model's name to the folder that holds it."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import NamedTuple

from subnet_ft.checkpoints import tiny
from subnet_ft.checkpoints.cache import build_once
from subnet_ft.checkpoints.gguf import PACKAGE_PREFIX, gguf_checkpoint
from subnet_ft.checkpoints.settled import check_settled
from subnet_ft.errors import CheckpointError

logger = logging.getLogger(__name__)

TINY_PREFIX = "tiny:"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")

# Everything that loads a model and its tokenizer; not other formats of the same weights, and no subfolder.
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "chat_template.json",
    "adapter_config.json",
)


class Location(NamedTuple):
    """A checkpoint's folder, and its commit where it came from the Hub."""

    folder: Path
    revision: str | None


def resolve_checkpoint(name: str | Path, *, revision: str | None = None) -> Path:
    """Return the checkpoint folder that `name` stands for, without opening it.

    Args:
        name: A local folder, a Hub id, `package:MODULE/FILE.gguf`, a .gguf file, or `tiny:FAMILY`. A local folder
            goes before a Hub id of the same name.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        CheckpointError: There is nothing of that name, or a change in place was interrupted in the folder.
        MissingDependencyError: `name` needs a package that is not installed.
    """
    return locate(name, revision=revision).folder


def is_hub_id(name: str) -> bool:
    """Tell whether a name can only stand for a model on the Hub: no folder here, no file, no tiny model has it."""
    is_ours = name.startswith((TINY_PREFIX, PACKAGE_PREFIX)) or name.endswith(".gguf")
    return not is_ours and not Path(name).expanduser().exists() and _HUB_ID.fullmatch(name) is not None


def locate(name: str | Path, *, revision: str | None = None) -> Location:
    """Return what `resolve_checkpoint` does, and the commit of a Hub id."""
    text = str(name)
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        _refuse_revision(text, revision)
        check_settled(folder)
        return Location(folder, None)
    if text.startswith(TINY_PREFIX):
        _refuse_revision(text, revision)
        return Location(_tiny_checkpoint(text.removeprefix(TINY_PREFIX)), None)
    if text.startswith(PACKAGE_PREFIX) or text.endswith(".gguf"):
        _refuse_revision(text, revision)
        return Location(gguf_checkpoint(text), None)
    if folder.is_file():
        raise CheckpointError(f"`{text}` is a file. Name the checkpoint's folder, `{folder.parent}`.")
    if isinstance(name, Path) or not _HUB_ID.fullmatch(text):
        raise CheckpointError(
            f"There is no checkpoint `{text}`: no folder `{folder.absolute()}`. Check the path, or name a Hub id "
            "(`owner/model`), a GGUF (`package:MODULE/FILE.gguf`) or a tiny model (`tiny:llama`)."
        )
    return _from_hub(text, revision)


def _from_hub(name: str, revision: str | None) -> Location:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"])
    except (OSError, HFValidationError) as error:  # every error of the Hub's client is an OSError
        wanted = f"the Hub model `{name}`" + (f" at revision `{revision}`" if revision else "")
        offline = " HF_HUB_OFFLINE is set: only the local Hub cache was searched." if constants.HF_HUB_OFFLINE else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"There is no checkpoint `{name}`: looked for the folder `{Path(name).absolute()}` and for {wanted}."
            f"{offline} The Hub's client says: {reason} Check the name and your access to it, or name a local folder."
        ) from error
    folder = Path(found)
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
    logger.info("`%s` is `%s`", name, folder)
    return Location(folder, commit)


def _tiny_checkpoint(family: str) -> Path:
    tiny.tiny_config(family)  # an unknown family is an error before anything is written
    import torch
    import transformers

    # Another initialisation or another saved form is another checkpoint.
    identity = f"{torch.__version__}\n{transformers.__version__}\n".encode() + Path(tiny.__file__).read_bytes()
    digest = hashlib.sha256(identity).hexdigest()[:12]

    def build(folder: Path) -> None:
        tiny.save_tiny(family, folder)

    return build_once(f"tiny/{family}-{digest}", build)


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise CheckpointError(f"`{name}` is not a Hub id, so it has no revision `{revision}`. Leave out the revision.")
