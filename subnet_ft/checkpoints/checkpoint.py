"""A checkpoint as the model that it becomes in memory, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from subnet_ft.checkpoints.conversion import meta_model, plan_conversion
from subnet_ft.checkpoints.foreign import pickled_parts
from subnet_ft.checkpoints.parts import SHARDED, PartsReader, parts_folder
from subnet_ft.checkpoints.resolve import locate
from subnet_ft.checkpoints.shards import INDEX_FILE, SINGLE_FILE, ShardReader, StoredTensor, TensorSpec
from subnet_ft.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


class Checkpoint:
    """The parameters of a saved model, under the names and in the shapes that they have in memory.

    Invariant: `specs` and what `tensor` returns are what `from_pretrained` would give in the stored dtype, name by name
    and bit by bit; at most one conversion group is in memory at a time, beyond pages mapped from the files.

    Args:
        name: What the user called the model.
        folder: Where it is.
        revision: Its commit, where it came from the Hub.

    Raises:
        CheckpointError: The folder does not hold a whole, dense, native model in safetensors.
    """

    name: str
    revision: str | None
    folder: Path
    config: PretrainedConfig
    specs: dict[str, TensorSpec]
    """Shape and stored dtype of every parameter, in `named_parameters()` order, tied weights once."""
    ignored: dict[str, str]
    """The tensors on disk that make no parameter, each with the reason: buffers and copies of tied weights."""
    copies: dict[str, str]
    """Those of them that repeat a parameter, by their names on disk."""
    is_in_parts: bool
    """Whether every process of a run has saved its part of the weights, so that no file holds them whole."""

    def __init__(self, name: str, folder: Path, revision: str | None = None) -> None:
        self.name, self.folder, self.revision = name, folder, revision
        self.config = load_config(folder)
        parts = parts_folder(folder)
        self.is_in_parts = parts is not None
        self._reader = ShardReader(folder) if parts is None else PartsReader(parts, self._names())
        self._plan = plan_conversion(self.config, self._reader, folder)
        self.specs = self._plan.specs
        self.ignored = self._plan.ignored
        self.copies = self._plan.copies

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, {len(self.specs)} parameters in {str(self.folder)!r})"

    def empty_model(self) -> PreTrainedModel:
        """Return the model on the meta device: its modules and names, without weights."""
        return meta_model(self.config, self.folder)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one parameter in its stored dtype, contiguous.

        It may be mapped from its file: writing to it changes the copy in memory, never the file.

        Raises:
            CheckpointError: The model has no parameter of that name.
        """
        return next(self.tensors([name]))[1]

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield parameters one after another; what is converted together is read and converted once.

        Args:
            names: Which parameters, in the order in which to yield them; all, in the order of `specs`, when `None`.

        Raises:
            CheckpointError: The model has no parameter of that name.
        """
        return self._stream(self._known(names))

    def pieces(self, size: int, names: Iterable[str] | None = None) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        """Yield parameters one after another, each as flat pieces in C order; the fastest way to see all weights once.

        What is on disk as it is in memory goes through one buffer, so that memory does not grow with a tensor. A piece
        is valid until the next one is asked for; take all pieces of a parameter before the next parameter.

        Args:
            size: Elements per piece, the last one of a parameter excepted; a multiple of 8.
            names: As in `tensors`.

        Raises:
            CheckpointError: The model has no parameter of that name, or a file changes while it is read.
        """
        return self._cut_up(self._known(names), size)

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Where every tensor on disk lies, by its name there.

        Raises:
            CheckpointError: The checkpoint is in parts.
        """
        self.check_whole()
        assert isinstance(self._reader, ShardReader)
        return self._reader

    def check_whole(self) -> None:
        """Check that whole files hold the weights, which whoever writes like them, or trains from them, needs.

        Raises:
            CheckpointError: The checkpoint is in parts.
        """
        if self.is_in_parts:
            raise CheckpointError(
                f"`{self.name}` holds its weights in parts, a file per process, which are only read here: no model is "
                "trained from them, and no delta applied to them. Make a whole checkpoint of it first: `subnet-ft "
                "delta export BASE FOLDER -o DELTA`, then `subnet-ft delta apply BASE DELTA -o WHOLE`."
            )

    def stored_as_is(self, name: str) -> str | None:
        """Return the name on disk of a parameter that is there as it is in memory; `None` for a converted one."""
        return self._plan.stored_as_is(name)

    def sources(self, name: str) -> list[str]:
        """Return the names on disk of the tensors that the parameter `name` is made of, with all that comes of them."""
        return self._plan.sources(name)

    def read_stored(self, key: str) -> torch.Tensor:
        """Return one tensor as it is on disk, by its name there; writing to it changes the copy in memory only."""
        return self._reader.read(key)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all tensors as they are on disk, by their names there: what transformers loads a model from."""
        return {key: self._reader.read(key) for key in self._reader}

    def origins(self, name: str) -> tuple[list[str], dict[str, torch.Tensor]]:
        """Say where on disk every element lies of the parameters that are converted together with `name`.

        Returns:
            Names on disk; and, per parameter, integers of its shape: flat indices into those tensors, flattened and put
            one after another.

        Raises:
            CheckpointError: The conversion does more than move elements.
        """
        return self._plan.origins(name, self._reader)

    def _names(self) -> set[str]:
        """Return the names that parameters have in memory, all of those of tied ones."""
        return {name for name, _ in self.empty_model().named_parameters(remove_duplicate=False)}

    def _known(self, names: Iterable[str] | None) -> list[str]:
        wanted = list(self.specs if names is None else names)
        unknown = [name for name in wanted if name not in self.specs]
        if unknown:
            raise CheckpointError(
                f"`{self.name}` has no parameter `{unknown[0]}`; it has {len(self.specs)}, the first is "
                f"`{next(iter(self.specs))}`. Names are those of `named_parameters()`; a tied weight has one name."
            )
        return wanted

    def _cut_up(self, wanted: list[str], size: int) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        import torch

        plain = {name: key for name in wanted if (key := self._plan.stored_as_is(name)) is not None}
        converted = self._stream([name for name in wanted if name not in plain])
        widths = {name: self.specs[name].dtype.itemsize for name in plain}
        buffer = torch.empty(size * max(widths.values(), default=0), dtype=torch.uint8)
        for name in wanted:
            if name in plain:
                yield name, self._reader.pieces(plain[name], buffer[: size * widths[name]])
            else:
                flat = next(converted)[1].view(-1)
                yield name, (flat[start : start + size] for start in range(0, flat.numel(), size))
                del flat  # or the next group is converted while this one is still held

    def _stream(self, wanted: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        last = {name: position for position, name in enumerate(wanted)}
        waiting: dict[str, torch.Tensor] = {}
        for position, name in enumerate(wanted):
            if name not in waiting:
                group = self._plan.convert(name, self._reader)
                waiting |= {member: value for member, value in group.items() if last.get(member, -1) >= position}
                del group
            yield name, waiting[name] if last[name] > position else waiting.pop(name)


def open_checkpoint(name: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and match its tensors with the model's parameters; weights stay on disk.

    Args:
        name: A local folder (one safetensors file or several, also one that a trainer saved, or the processes of an
            FSDP run in safetensors parts), a Hub id, `package:MODULE/FILE.gguf`, a .gguf file, or `tiny:FAMILY`.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        CheckpointError: There is nothing of that name, or it is not a whole, dense, native model in safetensors.
        MissingDependencyError: `name` needs a package that is not installed.
    """
    folder, commit = locate(name, revision=revision)
    return Checkpoint(str(name), folder, commit)


def load_config(folder: Path) -> PretrainedConfig:
    """Read the config.json of a checkpoint folder, whose weights need not be there.

    Raises:
        CheckpointError: There is none, it cannot be read, or the model is quantized.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(_without_config(folder))
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(folder))
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"transformers cannot read `{folder / 'config.json'}`: {reason} Check that the file is whole and that the "
            "installed transformers knows this model."
        ) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        described = quantization if isinstance(quantization, dict) else vars(quantization)
        raise CheckpointError(
            f"`{folder}` is quantized ({described.get('quant_method', 'unknown method')}); a subnetwork is a set of "
            "dense weights. Load it with transformers, call `model.dequantize()`, save it with `save_pretrained`, and "
            "use that folder, or use the model's unquantized checkpoint."
        )
    return config


def _without_config(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        try:
            adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            base = adapter.get("base_model_name_or_path")
        except (ValueError, AttributeError):
            base = None
        return (
            f"`{folder}` is a PEFT adapter{f' of `{base}`' if base else ''}, not a whole model. Merge it first: "
            "`AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(merged)`, then use "
            "the merged folder."
        )
    steps = sorted(folder.glob("checkpoint-*"), key=lambda entry: (len(entry.name), entry.name))
    whole = [entry for entry in steps if (entry / "config.json").is_file()]
    if whole:
        return f"`{folder}` has no config.json, but checkpoints inside it. Name one of them, such as `{whole[-1]}`."
    gguf = sorted(folder.glob("*.gguf"))
    if gguf:
        return f"`{folder}` has no config.json, but a GGUF inside it. Name the file: `{gguf[0]}`."
    if folder.name == SHARDED and (folder.parent / "config.json").is_file():
        return f"`{folder}` has no config.json, but the folder around it has. Name that one, `{folder.parent}`."
    if parts_folder(folder) or (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return (
            f"`{folder}` has weights, but no config.json that says of which model. Copy config.json and the "
            "tokenizer's files there from the model that the run started from, or call "
            f"`model.config.save_pretrained({str(folder)!r})`."
        )
    pickled = next(filter(None, map(pickled_parts, (folder, *reversed(steps)))), None)
    if pickled:
        return pickled
    names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
    return (
        f"`{folder}` has no config.json, so it is no model checkpoint; it holds {names}. Name a folder written by "
        "`save_pretrained` or by a trainer."
    )
