"""What happens to a gradient that is too large, or not finite, before a step takes it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
import torch.distributed as dist

from subnet_ft.errors import NonFiniteGradientError
from subnet_ft.optim.binding import Binding
from subnet_ft.optim.shards import groups_of

logger = logging.getLogger(__name__)

CLIP_NORMS = ("masked", "full")
"""`masked`: the norm of the gradient on the mask. `full`: of the whole gradient, as if everything were trained."""

NONFINITE = ("raise", "skip", "ignore")
"""`raise`: NonFiniteGradientError, and no weight changed. `skip`: the step is left out whole, and a warning says so.
`ignore`: nobody looks; NaN reaches the weights as in `torch.optim`, and the host never waits for the norm."""

# Elements at a time, for torch's norm in another dtype makes a copy.
_CHUNK = 1 << 20


class Gradients(Protocol):
    """What is measured here: compact or dense gradients."""

    keeps_squares: bool
    """Whether sums of squares are at hand; otherwise each time is a pass over the gradients."""

    def squares(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return the sum of squares () on the mask of every gradient that arrived."""

    def full_squares(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return the sum of squares () of every whole gradient that arrived."""


class Clipping:
    """The norms of an accumulated gradient, and the scale that the next step takes it with.

    Args:
        binding: The parameters; where processes hold parts of them, they sum their squares, once for each norm.
        max_grad_norm: What every step clips to by itself; `None` does not clip.
        clip_norm: One of `CLIP_NORMS`.
        measure_full: Also measure the norm of the whole gradient, which clipping by it does anyway.
        nonfinite: One of `NONFINITE`.

    Raises:
        ValueError: An option is out of range or unknown.
    """

    def __init__(
        self, binding: Binding, *, max_grad_norm: float | None, clip_norm: str, measure_full: bool, nonfinite: str
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"`max_grad_norm` must be > 0, or None for no clipping, got {max_grad_norm}")
        if clip_norm not in CLIP_NORMS:
            raise ValueError(f"`clip_norm` must be one of {', '.join(CLIP_NORMS)}, got {clip_norm!r}")
        if nonfinite not in NONFINITE:
            raise ValueError(f"`nonfinite` must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
        self.bind(binding)
        self.max_grad_norm = max_grad_norm
        self.clip_norm = clip_norm
        self.measure_full = measure_full or clip_norm == "full"
        self.nonfinite = nonfinite
        self.coefficient: torch.Tensor | None = None
        """() float32 that the next step multiplies the gradient with, if it clips."""
        self._clipped_norm: torch.Tensor | None = None
        self.num_skipped_steps = 0

    def bind(self, binding: Binding) -> None:
        """Measure the gradients of these parameters from now on."""
        self._parts = binding.parts

    def norm(self, gradients: Gradients) -> torch.Tensor:
        """Return the 2-norm () float32 that clipping goes by."""
        squares = gradients.squares() if self.clip_norm == "masked" else gradients.full_squares()
        return self._norm(squares)

    def norms(self, gradients: Gradients) -> dict[str, torch.Tensor]:
        """Return the 2-norms () float32: `masked`, and `full` where that is measured."""
        norms = {"masked": self._norm(gradients.squares())}
        if self.measure_full:
            norms["full"] = self._norm(gradients.full_squares())
        return norms

    def clip(self, gradients: Gradients, max_norm: float) -> torch.Tensor:
        """Set the coefficient so that the norm is at most `max_norm`; the strictest of several calls counts.

        Returns:
            () float32, the norm before clipping.
        """
        if not max_norm >= 0:
            raise ValueError(f"`max_norm` must be >= 0, got {max_norm}")
        norm = self._clipped_norm = self.norm(gradients)
        # The small constant is that of torch.nn.utils.clip_grad_norm_.
        coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        self.coefficient = coefficient if self.coefficient is None else torch.minimum(self.coefficient, coefficient)
        return norm

    def clip_by_itself(self, gradients: Gradients) -> None:
        """Clip to `max_grad_norm`, unless it is `None` or somebody clipped before this step."""
        if self.coefficient is None and self.max_grad_norm is not None:
            self.clip(gradients, self.max_grad_norm)

    def forget(self) -> None:
        """Forget what was decided about gradients that are gone."""
        self.coefficient = self._clipped_norm = None

    def problem(self, gradients: Gradients, names: Mapping[torch.nn.Parameter, str]) -> str | None:
        """Say what keeps a step from taking the gradients: NaN or infinite values, and where; `None` if nothing."""
        if self.nonfinite == "ignore":
            return None
        norm = None if gradients.keeps_squares else self._clipped_norm  # dense gradients are not read twice
        norm = self.norm(gradients) if norm is None else norm
        if bool(torch.isfinite(norm)):
            return None
        found = [names[p] for p, square in gradients.squares().items() if not torch.isfinite(square)]
        where = "outside the mask" if not groups_of(self._parts.values()) else "in the part of another process"
        if found:
            where = f"in `{found[0]}`" + (f" and {len(found) - 1} other tensors" if len(found) > 1 else "")
        return f"the gradient has NaN or infinite values {where}"

    def leave_out(self, problem: str) -> None:
        """Count and report a step that is left out.

        Raises:
            NonFiniteGradientError: `nonfinite` is `raise`.
        """
        if self.nonfinite == "raise":
            raise NonFiniteGradientError(
                f"The step was not taken and no weight was changed: {problem}. Look at the loss of this batch, or pass "
                "`nonfinite='skip'` to leave such steps out."
            )
        self.num_skipped_steps += 1
        logger.warning("step left out, %d so far: %s", self.num_skipped_steps, problem)

    def _norm(self, squares: Mapping[torch.nn.Parameter, torch.Tensor]) -> torch.Tensor:
        """Return the norm () float32; where processes hold parts of parameters, they sum their squares in one go."""
        whole = [square for parameter, square in squares.items() if self._parts[parameter].group is None]
        for group, device in groups_of(self._parts.values()):
            held = [square for parameter, square in squares.items() if self._parts[parameter].group is group]
            total = torch.zeros((), dtype=torch.float64, device=device)
            if held:
                total = torch.stack(held).sum().to(device, torch.float64)
            dist.all_reduce(total, group=group)
            whole.append(total)
        return norm_of_squares(whole)


def sum_of_squares(grad: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares () float64 of a flat gradient (N,) of any dtype, without a copy of the whole."""
    parts = torch.split(grad, _CHUNK)
    return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in parts]).sum()


def norm_of_squares(squares: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the square root () float32 of the sum of () tensors, without waiting for their device."""
    found = list(squares)
    if not found:
        return torch.tensor(0.0)
    return torch.stack([square.to(found[0].device) for square in found]).sum().sqrt().to(torch.float32)
