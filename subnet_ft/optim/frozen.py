"""The weights that must not change: their fingerprints, and who changed."""

from __future__ import annotations

import hashlib
import json

import torch

from subnet_ft.errors import FrozenWeightError
from subnet_ft.masks import SubnetMask, by_canonical_name, format_fingerprint
from subnet_ft.optim.binding import Binding
from subnet_ft.optim.fingerprints import fingerprints


def frozen_fingerprints(model: torch.nn.Module, mask: SubnetMask) -> dict[str, str]:
    """Return name to fingerprint (32 hexadecimal digits) of the weights of a model outside a mask.

    Where processes hold parts of the weights, all of them call it.
    """
    parameters = by_canonical_name(model.named_parameters())
    return FrozenWeights(Binding(parameters, mask)).now()


def weights_digest(model: torch.nn.Module) -> str:
    """Return one digest of all weights of a model, bit by bit and by name; tied weights count once.

    Where processes hold parts of the weights, all of them call it.
    """
    sums = fingerprints(by_canonical_name(model.named_parameters()))
    found = {name: format_fingerprint(pair) for name, pair in sums.items()}
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


class FrozenWeights:
    """Fingerprints of the part of every tensor that lies outside a mask, as it was when they were taken.

    One pass over the weights takes them or compares them; 16 bytes per tensor are kept. A tensor in which everything is
    trainable has nothing to keep.

    Args:
        binding: All parameters, also those in which nothing is trained, and the mask that they have at the time.
    """

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self.taken: dict[str, str] | None = None
        """Name to fingerprint (32 hexadecimal digits), or `None` as long as none were taken."""

    def take(self) -> None:
        """Remember the weights outside the mask as they are now."""
        self.taken = self.now()

    def now(self) -> dict[str, str]:
        """Return the fingerprints of the weights outside the mask as they are now."""
        binding, tensors = self._binding, self._binding.mask.tensors
        parameters = {name: p for p, name in binding.names.items() if tensors[name].count < tensors[name].num_elements}
        found = fingerprints(parameters, lambda name: binding.trained(parameters[name]))
        return {name: format_fingerprint(pair) for name, pair in found.items()}

    def check(self) -> None:
        """Compare the weights with what was taken; take them first if nothing was.

        Raises:
            FrozenWeightError: A weight outside the mask changed.
        """
        if self.taken is None:
            self.take()
            return
        now = self.now()
        changed = [name for name, fingerprint in self.taken.items() if now[name] != fingerprint]
        if changed:
            others = f" and {len(changed) - 1} other tensors" if len(changed) > 1 else ""
            raise FrozenWeightError(
                f"Weights outside the mask changed in `{changed[0]}`{others} (fingerprint {self.taken[changed[0]]} at "
                f"the start, {now[changed[0]]} now). The masked optimizer writes only the mask, so other code wrote "
                "them: a callback, a second optimizer, a weight tied by hand, or `load_state_dict` of another "
                "checkpoint. Nothing trained since the last audit that passed can be called a subnetwork run."
            )
