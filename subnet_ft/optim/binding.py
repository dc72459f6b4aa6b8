"""What ties the parameters of a model to a mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from subnet_ft.errors import OptimizerError
from subnet_ft.masks import SubnetMask
from subnet_ft.masks.slices import count_before
from subnet_ft.optim.compact_shard import CompactRange
from subnet_ft.optim.shards import Part, local, part_mask, part_of
from subnet_kernels import BitMask


class Binding:
    """The mask of every parameter, or of the part of it that this process holds, brought to its device once.

    Args:
        parameters: Name to parameter, also those in which nothing is trained.
        mask: Which weights are trained now.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], mask: SubnetMask) -> None:
        self.names: dict[torch.nn.Parameter, str] = {parameter: name for name, parameter in parameters.items()}
        self.parts: dict[torch.nn.Parameter, Part] = {p: part_of(name, p) for name, p in parameters.items()}
        self._mask = mask
        self._bit_masks: dict[str, BitMask] = {}
        self.untouched = self.untouched_by([mask])
        """Names of the tensors in which no mask has trained anything, so that they are still the base's."""

    @property
    def mask(self) -> SubnetMask:
        """Which weights are trained now."""
        return self._mask

    @mask.setter
    def mask(self, mask: SubnetMask) -> None:
        self._mask = mask
        self._bit_masks.clear()
        self.untouched &= self.untouched_by([mask])

    @property
    def nbytes(self) -> int:
        """Bytes of the masks on their devices."""
        return sum(mask.nbytes for mask in self._bit_masks.values())

    def untouched_by(self, masks: Iterable[SubnetMask]) -> set[str]:
        """Return the names of the tensors in which none of these masks trains anything."""
        return set(self.names.values()) - {n for mask in masks for n, tensor in mask.tensors.items() if tensor.count}

    def check_known(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Raise OptimizerError if other parameters took the place of those that have a name and a mask."""
        for parameter in parameters:
            if parameter not in self.names:
                raise OptimizerError(
                    f"A parameter of shape {tuple(parameter.shape)} took the place of one that has a name and a mask. "
                    "Build the optimizer after whatever replaces parameters, or call its `rebind` with those of the "
                    "sharded model."
                )

    def bit_mask(self, parameter: torch.nn.Parameter) -> BitMask:
        """Return the mask of what this process holds of a parameter in which something is trained, on its device."""
        name = self.names[parameter]
        if name not in self._bit_masks or self._bit_masks[name].device != local(parameter).device:
            self._bit_masks[name] = self.under(self._mask, parameter)
        return self._bit_masks[name]

    def trained(self, parameter: torch.nn.Parameter) -> BitMask | None:
        """Return the mask of a parameter on its device, `None` where nothing is trained."""
        return self.bit_mask(parameter) if self.is_trained(parameter) else None

    def is_trained(self, parameter: torch.nn.Parameter) -> bool:
        """Whether anything of a parameter is trained, here or in the part of another process."""
        return self._mask.tensors[self.names[parameter]].count > 0

    def under(self, mask: SubnetMask, parameter: torch.nn.Parameter) -> BitMask:
        """Return what another mask says of what this process holds of a parameter, on its device."""
        bits = mask.tensors[self.names[parameter]].full_bits()
        return part_mask(bits, self.parts[parameter], local(parameter).device)

    def compact_range(self, name: str) -> CompactRange:
        """Return which of the compact values of a trained tensor this process holds."""
        parameter = next(parameter for parameter, other in self.names.items() if other == name)
        part, tensor, held = self.parts[parameter], self._mask.tensors[name], self.bit_mask(parameter)
        start = 0 if part.group is None else count_before(tensor.bits, part.start)
        return CompactRange(start, held.count, tensor.count, held.device, part.group, part.device)


def set_requires_grad(found: Iterable[tuple[torch.nn.Parameter, bool]]) -> None:
    """Give parameters the `requires_grad` that was found on them."""
    for parameter, requires_grad in found:
        parameter.requires_grad_(requires_grad)
