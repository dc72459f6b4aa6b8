"""The part of `MaskedBase` that saves and loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.optim import state
from subnet_ft.optim.compact_shard import CompactRange

if TYPE_CHECKING:
    from subnet_ft.masks import SubnetMask
    from subnet_ft.optim.binding import Binding
    from subnet_ft.optim.frozen import FrozenWeights


class SavedState(torch.optim.Optimizer):
    """State keyed by name: tensors, numbers and strings, or the parts of tensors that this process holds."""

    _binding: Binding
    _frozen: FrozenWeights
    _names: dict[torch.nn.Parameter, str]

    @property
    def mask(self) -> SubnetMask:
        """Which weights are trained."""
        return self._binding.mask

    def state_dict(self) -> dict[str, Any]:
        """Return the state keyed by parameter name: tensors, numbers and strings only.

        The first group carries the fingerprints of the frozen weights, so that it is never loaded beside another base.
        Where processes hold parts of the parameters, compact entries are `CompactShard`s of what this process holds,
        which `torch.distributed.checkpoint` saves at their offsets; `full_state_dict` gives the whole.
        """
        names = [self._names[parameter] for group in self.param_groups for parameter in group["params"]]
        saved = state.keyed_by_name(super().state_dict(), names)
        state.mark_parts(self, saved)
        if self._frozen.taken is not None:
            saved["param_groups"][0][state.FROZEN] = dict(self._frozen.taken)
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state bit by bit; nothing is cast to the parameters' dtype. Load the weights of the model first.

        Of a whole state, each process takes the part that belongs to its parts of the parameters.

        Raises:
            OptimizerStateError: The state belongs to another mask, another base, another kind of master or other
                parameters.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, dict(state_dict)) or state_dict
        state.load(self, state_dict)  # type: ignore[arg-type]
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def check_saved_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Check the param groups of a saved state before its tensors are read.

        Raises:
            OptimizerStateError: They belong to another mask, another kind of optimizer or other parameters.
        """
        state.check_groups(self.param_groups, self._names, groups)

    def is_compact(self, group: Mapping[str, Any], key: str, value: torch.Tensor) -> bool:
        """Whether an entry of the state holds a value for each trainable weight, not a number or a table."""
        return value.dim() > 0

    def trains(self, name: str) -> bool:
        """Whether the mask trains anything of a tensor."""
        return name in self.mask.tensors and self.mask.tensors[name].count > 0

    def compact_range(self, name: str) -> CompactRange:
        """Return which of the compact values of a trained tensor this process holds."""
        return self._binding.compact_range(name)
