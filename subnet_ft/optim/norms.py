"""What users ask a masked optimizer about the gradient that has accumulated, and how they clip it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from subnet_ft.errors import GradientError

if TYPE_CHECKING:
    from subnet_ft.optim.clipping import Clipping
    from subnet_ft.optim.dense_gradients import DenseGradients
    from subnet_ft.optim.gradients import CompactGradients


class GradientNorms:
    """The part of `MaskedBase` that is about norms. Processes that train together ask together."""

    compact_grads: bool
    """Whether gradients are compacted as soon as autograd has them."""

    _clipping: Clipping
    _gradients: CompactGradients | DenseGradients

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch's GradScaler asks before its step; it has unscaled `.grad` only, and only where weights train."""
        if self.compact_grads or self._clipping.measure_full:
            raise GradientError(
                "A GradScaler unscales what stands in `.grad` of trained tensors, and misses compact gradients and the "
                "rest of a full norm. Train in bfloat16, or with `compact_grads=False` and the masked norm alone."
            )
        return False

    @property
    def num_skipped_steps(self) -> int:
        """How many steps were left out since the optimizer was built, because a gradient was not finite."""
        return self._clipping.num_skipped_steps

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        """Return the 2-norm () float32 of the accumulated gradient that clipping goes by, before any, on its device."""
        return self._clipping.norm(self._gradients)

    @torch.no_grad()
    def grad_norms(self) -> dict[str, torch.Tensor]:
        """Return the 2-norms () float32 of the accumulated gradient: `masked`, and `full` where that is measured."""
        return self._clipping.norms(self._gradients)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Make the next `step` scale the gradient so that its norm (see `clip_norm`) is at most `max_norm`.

        The gradients themselves stay as they are. A step that is left out must end with the optimizer's `zero_grad()`:
        `model.zero_grad()` does not take the scale back. What the step does with a norm that is not finite is said by
        `nonfinite`. Of several calls before one step, the strictest counts.

        Returns:
            () float32, the norm before clipping.

        Raises:
            ValueError: `max_norm` is negative or NaN.
        """
        return self._clipping.clip(self._gradients, max_norm)

    def gradient_buffers(self) -> list[torch.Tensor]:
        """Return the compact gradients (K,) float32 that it keeps allocated; none without compaction."""
        return self._gradients.buffers()
