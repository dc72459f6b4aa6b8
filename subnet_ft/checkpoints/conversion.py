"""How the tensors on disk become the parameters in memory: transformers' own rules, one group at a time.

transformers renames, fuses, stacks and splits weights while it loads them, and offers no public way to do so for a
single tensor. This module is the only one that uses its internals. `check_internals` compares every call made here with
the installed signatures, and the tests compare the outcome with `from_pretrained` for every family.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.checkpoints.listing import listing
from subnet_ft.checkpoints.parts import Reader
from subnet_ft.checkpoints.shards import TensorSpec
from subnet_ft.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_SHOWN = 5

# The leading parameters of every internal that is called here; whatever follows them must have a default.
_INTERNALS: dict[str, tuple[str, ...]] = {
    "conversion_mapping:get_model_conversion_mapping": ("model",),
    "core_model_loading:dot_natural_key": ("s",),
    "core_model_loading:rename_source_key": (
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
    ),
    "core_model_loading:WeightConverter.add_tensor": ("self", "target_key", "source_key", "source_pattern", "future"),
    "core_model_loading:WeightConverter.convert": ("self", "layer_name", "model", "config"),
    "modeling_utils:PreTrainedModel._adjust_missing_and_unexpected_keys": ("self", "loading_info"),
}


@dataclass
class Group:
    """The tensors on disk that are converted together.

    Args:
        first: Name in memory under which the group is collected: that of its first, and mostly only, target.
        converter: The conversion, still empty; `None` when the one source is taken as it is.
        sources: Each tensor's name on disk and the converter's pattern that it matched, in the order of collection.
    """

    first: str
    converter: Any
    sources: list[tuple[str, str | None]] = field(default_factory=list)


@dataclass(frozen=True)
class ConversionPlan:
    """What a checkpoint's model is in memory, and from which tensors on disk each parameter comes.

    Args:
        specs: Shape and stored dtype of every parameter, in `named_parameters()` order, tied weights once.
        ignored: The tensors on disk that make no parameter, each with the reason.
        copies: Those of them that repeat a parameter which they are tied to, by their names on disk.
    """

    specs: dict[str, TensorSpec]
    ignored: dict[str, str]
    copies: dict[str, str]
    _model: PreTrainedModel
    _groups: dict[str, Group]  # by parameter
    _saved: dict[str, str]  # parameter -> the name, of several tied ones, under which it is on disk
    _members: dict[str, list[str]]  # first target of a group -> all parameters of the group

    def convert(self, name: str, reader: Reader) -> dict[str, torch.Tensor]:
        """Read and convert the group of the parameter `name`; returns every parameter that comes out of it."""
        group = self._groups[name]
        produced = _convert(group, self._model, reader.read)
        return {member: produced[self._saved[member]] for member in self._members[group.first]}

    def stored_as_is(self, name: str) -> str | None:
        """Return the name on disk of a parameter that is there as it is in memory; `None` for a converted one."""
        group = self._groups[name]
        return group.sources[0][0] if group.converter is None else None

    def sources(self, name: str) -> list[str]:
        """Return the names on disk of the group of the parameter `name`."""
        return [key for key, _ in self._groups[name].sources]

    def origins(self, name: str, reader: Reader) -> tuple[list[str], dict[str, torch.Tensor]]:
        """Say where on disk every element of the group of `name` lies: a conversion moves elements and computes none.

        Returns:
            The names on disk of the group's tensors; and, per parameter, integers of its shape: flat indices into those
            tensors, flattened and put one after another.

        Raises:
            CheckpointError: The conversion does more than move elements.
        """
        group = self._groups[name]
        keys = self.sources(name)
        sizes = [math.prod(reader[key].shape) for key in keys]
        total = sum(sizes)
        dtype = torch.int32 if total < 2**31 else torch.int64
        starts = dict(zip(keys, itertools.accumulate(sizes, initial=0), strict=False))

        def indices(key: str) -> torch.Tensor:
            shape = reader[key].shape
            return torch.arange(starts[key], starts[key] + math.prod(shape), dtype=dtype).view(shape)

        produced = _convert(group, self._model, indices)
        found = {member: produced[self._saved[member]] for member in self._members[group.first]}
        used = torch.zeros(total, dtype=torch.bool)
        for member, index in found.items():
            is_index = index.dtype == dtype and (not index.numel() or 0 <= int(index.min()) <= int(index.max()) < total)
            if not is_index or bool(used[index.view(-1)].any()):
                raise CheckpointError(
                    f"transformers computes `{member}` from {listing(keys, limit=_SHOWN)} instead of only moving their "
                    "elements, so new values cannot be put back there."
                )
            used[index.view(-1)] = True
        return keys, found


def plan_conversion(config: PretrainedConfig, reader: Reader, where: object) -> ConversionPlan:
    """Match the tensors on disk with the parameters of the model that `config` describes; weights stay unread.

    Args:
        config: Names the architecture and its sizes.
        reader: The tensors on disk.
        where: What messages call the checkpoint.

    Raises:
        CheckpointError: The architecture is unknown; a parameter has no tensor; a tensor belongs nowhere or has another
            shape than its parameter; or transformers' internals are not the ones that this module was written for.
    """
    check_internals()
    model = meta_model(config, where)
    groups, unmatched = _group(model, reader, where)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ignored: dict[str, str] = {}
    copies: dict[str, str] = {}
    found: dict[str, TensorSpec] = {}
    origin: dict[str, Group] = {}
    for group in groups:
        if group.first in parameters:
            for target, spec in _converted_specs(group, model, reader).items():
                found[target], origin[target] = spec, group
        else:
            ignored |= {key: "a buffer" for key, _ in group.sources}

    saved = _saved_names(model, found, lambda name: _convert(origin[name], model, reader.read)[name])
    names = {id(parameter): name for name, parameter in reversed(parameters.items())}  # tied: the first
    for target in found.keys() - set(saved.values()):
        if target in parameters:
            ignored |= {key: "a copy of the weight it is tied to" for key, _ in origin[target].sources}
            copies |= {key: names[id(parameters[target])] for key, _ in origin[target].sources}
        else:
            unmatched |= {key: target for key, _ in origin[target].sources}
    unexpected = _unexpected(model, unmatched.values())
    ignored |= {key: "not used by this architecture" for key, name in unmatched.items() if name not in unexpected}
    _refuse_unfit(
        f"`{where}` ({type(model).__name__})",
        missing=[name for name, source in saved.items() if source is None],
        unexpected=[key for key, name in unmatched.items() if name in unexpected],
        resized=[
            f"`{name}`: {found[source].shape} on disk, {tuple(parameters[name].shape)} by the config"
            for name, source in saved.items()
            if source is not None and found[source].shape != tuple(parameters[name].shape)
        ],
    )
    complete = {name: source for name, source in saved.items() if source is not None}
    members: dict[str, list[str]] = {}
    for name, source in complete.items():
        members.setdefault(origin[source].first, []).append(name)
    return ConversionPlan(
        specs={name: found[source] for name, source in complete.items()},
        ignored=ignored,
        copies=copies,
        _model=model,
        _groups={name: origin[source] for name, source in complete.items()},
        _saved=complete,
        _members=members,
    )


def check_internals() -> None:
    """Raise when an internal of the installed transformers is not called the way this module calls it."""
    import transformers

    for where, leading in _INTERNALS.items():
        module, _, path = where.partition(":")
        try:
            function = attrgetter(path)(importlib.import_module(f"transformers.{module}"))
            parameters = inspect.signature(function).parameters
        except (ImportError, AttributeError):
            problem = "is gone"
        else:
            rest = list(parameters.values())[len(leading) :]
            required = [
                extra.name
                for extra in rest
                if extra.default is extra.empty and extra.kind not in (extra.VAR_POSITIONAL, extra.VAR_KEYWORD)
            ]
            if tuple(parameters)[: len(leading)] == leading and not required:
                continue
            problem = f"takes ({', '.join(parameters)}) and not ({', '.join(leading)})"
        raise CheckpointError(
            f"transformers {transformers.__version__} changed how it converts weights: `transformers.{module}.{path}` "
            f"{problem}, so weights cannot be read safely. Install a transformers release that this version of "
            "subnet-ft was tested with (see its changelog), or a newer subnet-ft."
        )


def meta_model(config: PretrainedConfig, where: object) -> PreTrainedModel:
    """Return the model that `config` describes, on the meta device.

    Args:
        config: Names the architecture and its sizes.
        where: What messages call the checkpoint.

    Raises:
        CheckpointError: The architecture is unknown.
    """
    import transformers

    architecture = next(iter(config.architectures or ()), None)
    model_class = getattr(transformers, architecture, None) if architecture else None
    if model_class is None:
        custom = " It needs code from its repository, which is never run here." if hasattr(config, "auto_map") else ""
        raise CheckpointError(
            f"`{where}` is of the architecture {architecture!r} by its config.json, which transformers "
            f"{transformers.__version__} does not have.{custom} Use a model whose `architectures` names a class of "
            "transformers, or copy the base's config.json there where this one names none."
        )
    with torch.device("meta"):
        model: PreTrainedModel = model_class(copy.deepcopy(config))
    return model


def _group(model: PreTrainedModel, reader: Reader, where: object) -> tuple[list[Group], dict[str, str]]:
    """Collect the tensors on disk by their target; the others are returned with the name they would have in memory."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    in_memory: dict[str, Any] = model.state_dict()
    prefix = model.base_model_prefix
    mapping = get_model_conversion_mapping(model)
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    groups: dict[str, Group] = {}
    unmatched: dict[str, str] = {}
    for key in sorted(reader, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, in_memory)
        if name not in in_memory and key in in_memory:
            name, pattern = rename_source_key(key, [], [], prefix, in_memory)
        if name not in in_memory:
            unmatched[key] = name
            continue
        group = groups.setdefault(name, Group(name, by_pattern[pattern] if pattern is not None else None))
        if group.sources and (group.converter is None or pattern is None):
            raise CheckpointError(
                f"`{group.sources[0][0]}` and `{key}` of `{where}` both stand for `{name}`, so which one counts is "
                "unclear. Remove one of them, or save the model again with `save_pretrained`."
            )
        group.sources.append((key, pattern))
    return list(groups.values()), unmatched


def _convert(group: Group, model: PreTrainedModel, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    if group.converter is None:
        return {group.first: read(group.sources[0][0])}
    converter = copy.deepcopy(group.converter)  # it collects tensors, and the plan must not keep them
    for key, pattern in group.sources:
        converter.add_tensor(group.first, key, pattern, read(key))
    try:
        produced = converter.convert(group.first, model=model, config=model.config)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        made_of = listing([key for key, _ in group.sources], limit=_SHOWN)
        raise CheckpointError(
            f"transformers cannot make `{group.first}` out of {made_of}: {error}. "
            "The checkpoint may be incomplete or belong to another model; save it again with `save_pretrained`."
        ) from error
    single = {target: value[0] if isinstance(value, list) else value for target, value in produced.items()}
    return {target: value.contiguous() for target, value in single.items()}


def _converted_specs(group: Group, model: PreTrainedModel, reader: Reader) -> dict[str, TensorSpec]:
    specs = {key: reader[key].spec(key) for key, _ in group.sources}
    if group.converter is None:
        return {group.first: specs[group.sources[0][0]]}

    def outline(key: str) -> torch.Tensor:
        return torch.empty(specs[key].shape, dtype=specs[key].dtype, device="meta")

    produced = _convert(group, model, outline)
    return {target: TensorSpec(tuple(tensor.shape), tensor.dtype) for target, tensor in produced.items()}


def _saved_names(
    model: PreTrainedModel, found: Mapping[str, object], read: Callable[[str], torch.Tensor]
) -> dict[str, str | None]:
    """Map every parameter, tied ones once, to the name under which it is on disk (`None`: under none)."""
    first: dict[int, str] = {}
    saved: dict[str, str | None] = {}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        name = first.setdefault(id(parameter), alias)
        if name == alias:
            saved[name] = alias if alias in found else None
        elif alias in found:
            source = saved[name]
            if source is None:
                saved[name] = alias
            elif not torch.equal(read(source), read(alias)):
                saved[alias] = alias  # transformers does not tie two stored weights that differ
    return saved


def _unexpected(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Keep the names that transformers, too, would report; each architecture knows leftovers that it drops."""
    report: Any = SimpleNamespace(missing_keys=set(), unexpected_keys=set(names))
    model._adjust_missing_and_unexpected_keys(report)
    return set(report.unexpected_keys)


def _refuse_unfit(what: str, *, missing: list[str], unexpected: list[str], resized: list[str]) -> None:
    problems = [
        f"{len(names)} {text}: {listing(names, limit=_SHOWN)}"
        for names, text in (
            (missing, "parameters without a tensor"),
            (unexpected, "tensors without a parameter"),
            (resized, "tensors of another shape"),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"The weights of {what} do not fit its config.json. {'. '.join(problems)}. The checkpoint may be "
            "incomplete or its config.json of another model; save the whole model again with `save_pretrained`."
        )
