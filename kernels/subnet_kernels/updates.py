"""What one tensor brings to an optimizer step over many tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from subnet_kernels.layout import BitMask


@dataclass(eq=False)
class AdamWUpdate:
    """One tensor's part in a `masked_adamw` call.

    Args:
        param: (N,) bfloat16, float16 or float32, contiguous. In-out.
        mask: Bits of N elements, K of them set. In.
        grad: (K,) float32, compact; or (N,) bfloat16, float16 or float32, dense, of which only the masked elements are
            read. In.
        exp_avg, exp_avg_sq: (K,) float32, compact moments. In-out.
        master: (K,) float32 masters; or (K,) int16 remainders beside a bfloat16 `param`, which together are the exact
            float32 master; or `None`: then a float32 `param` is its own master and a bfloat16 one is rounded
            stochastically. In-out.
        lr: Step size, >= 0.
        betas: Decay rates of the moments, each in [0, 1).
        eps: Added to the denominator, > 0.
        weight_decay: Decoupled decay rate, >= 0; applied on the mask only.
        step: Number of this update for the tensor, >= 1; the bias corrections use it.
        is_rounded: The masked elements of `param` are its float32 masters rounded, as the last update left them. An
            implementation may then leave those alone whose rounding does not change. Without float32 masters it means
            nothing.
        rounding_key: What `rounding_key` returns; used only where `param` is rounded stochastically.
    """

    param: torch.Tensor
    mask: BitMask
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    master: torch.Tensor | None
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int
    is_rounded: bool = False
    rounding_key: int | None = None

    @property
    def scalars(self) -> tuple[float, float, float, float, float, float, float]:
        """What every element needs, computed in float64: decay factor, 1 - beta1, beta2, 1 - beta2, step size,
        reciprocal square root of the second bias correction, eps."""
        beta1, beta2 = self.betas
        return (
            1.0 - self.lr * self.weight_decay,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            self.lr / (1.0 - beta1**self.step),
            (1.0 - beta2**self.step) ** -0.5,
            self.eps,
        )


@dataclass(eq=False)
class SGDUpdate:
    """One tensor's part in a `masked_sgd` call.

    Args:
        param: (N,) bfloat16, float16 or float32, contiguous. In-out.
        mask: Bits of N elements, K of them set. In.
        grad: (K,) float32, compact; or (N,) bfloat16, float16 or float32, dense. In.
        momentum_buffer: (K,) float32, zeros before the first update; `None` without momentum. In-out.
        master: As in `AdamWUpdate`. In-out.
        lr: Step size, >= 0.
        momentum: Decay rate of the buffer, in [0, 1); 0 where there is no buffer.
        weight_decay: L2 rate, >= 0, added to the gradient as torch.optim.SGD does; on the mask only.
        nesterov: Use the gradient after the momentum step (Nesterov).
        is_rounded: As in `AdamWUpdate`.
        rounding_key: As in `AdamWUpdate`.
    """

    param: torch.Tensor
    mask: BitMask
    grad: torch.Tensor
    momentum_buffer: torch.Tensor | None
    master: torch.Tensor | None
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool = False
    is_rounded: bool = False
    rounding_key: int | None = None
