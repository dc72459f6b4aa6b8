"""The compact values of a model's trained tensors, whole or in the parts that FSDP2 made of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

import subnet_kernels
from subnet_ft.masks import SubnetMask, format_fingerprint
from subnet_ft.optim.fingerprints import fingerprints
from subnet_ft.optim.shards import Part, groups_of, local_flat, part_mask, part_of
from subnet_kernels import BitMask


def record_fingerprints(parameters: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the fingerprint of every tensor; processes that hold parts of them call it together."""
    return {name: format_fingerprint(sums) for name, sums in fingerprints(parameters).items()}


class CompactValues:
    """Takes the values on a mask from a model's parameters, as often as asked.

    Keeps the bits of the mask on the devices of the parameters: 0.13 bytes per weight there.

    Args:
        mask: Which weights; the same in every process.
    """

    def __init__(self, mask: SubnetMask) -> None:
        self._mask = mask
        self._bit_masks: dict[tuple[str, torch.device, Part], BitMask] = {}

    def take(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return name to (K,) of every trained tensor, a copy in its dtype.

        Processes that hold parts call it together, and each gets all values: what is exchanged are compact values,
        never a dense tensor.
        """
        trained = {name: parameters[name] for name, tensor in self._mask.tensors.items() if tensor.count}
        parts = {name: part_of(name, parameter) for name, parameter in trained.items()}
        held = {name: self._held(name, parameter, parts[name]) for name, parameter in trained.items()}
        for group, device in groups_of(parts.values()):
            names = [name for name, part in parts.items() if part.group is group]
            held.update(_all_gathered({name: held[name] for name in names}, group, device))
        return held

    def _held(self, name: str, parameter: torch.Tensor, part: Part) -> torch.Tensor:
        flat = local_flat(parameter)
        key = (name, flat.device, part)
        if key not in self._bit_masks:
            self._bit_masks[key] = part_mask(self._mask.tensors[name].bits, part, flat.device)
        return subnet_kernels.gather(flat, self._bit_masks[key], dtype=flat.dtype)


def _all_gathered(
    held: Mapping[str, torch.Tensor], group: dist.ProcessGroup, device: torch.device
) -> dict[str, torch.Tensor]:
    """Join what every process of a group holds of each tensor, in the order of ranks; two exchanges in all."""
    size = dist.get_world_size(group)
    lengths = torch.tensor([values.nbytes for values in held.values()], dtype=torch.int64, device=device)
    all_lengths = [torch.empty_like(lengths) for _ in range(size)]
    dist.all_gather(all_lengths, lengths, group=group)
    longest = max(int(each.sum()) for each in all_lengths)
    own = torch.zeros(longest, dtype=torch.uint8, device=device)
    if (content := torch.cat([values.view(torch.uint8) for values in held.values()])).numel():
        own[: content.numel()] = content.to(device)
    buffers = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(buffers, own, group=group)
    cut = []
    for buffer, each in zip(buffers, all_lengths, strict=True):
        ends = each.cumsum(0).tolist()
        cut.append([buffer[start:end] for start, end in zip([0, *ends], ends, strict=False)])
    return {
        # A copy, because a part of the buffer may lie at an address that its dtype cannot start at.
        name: torch.cat([pieces[index] for pieces in cut]).to(values.device).view(values.dtype)
        for index, (name, values) in enumerate(held.items())
    }
