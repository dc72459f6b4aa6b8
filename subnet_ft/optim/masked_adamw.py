"""`MaskedAdamW`: AdamW with fp32 masters on the weights of a mask, and on no other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

import subnet_kernels
from subnet_ft.errors import MaskMismatchError
from subnet_ft.masks import SubnetMask, by_canonical_name
from subnet_ft.optim import state

logger = logging.getLogger(__name__)

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]
MASTERS = ("fp32", "remainder")
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW that trains the weights of a mask; a weight outside it keeps its bits, whatever happens.

    Moments are float32 and compact, `(K,)` per tensor. Weights below float32 also have float32 masters, so that updates
    smaller than a weight's rounding step add up. With a full mask this is plain AdamW.

    The mask alone says what is trained, so building the optimizer sets `requires_grad` of every tensor: False without a
    trainable weight, and autograd never computes its gradient; True with one, whoever froze it before. DDP decides when
    it wraps a model which gradients it reduces: build the optimizer before that, unless `requires_grad` fits already.

    A tensor whose `.grad` is `None` is skipped whole: no decay, no momentum, no step count. Gradients outside the mask,
    NaN included, are never read. Weights that somebody else changes between two steps are overwritten by their master.

    Args:
        named_parameters: Pairs of name and parameter, or dicts with those pairs under `params` and options of their own
            (`lr`, `betas`, `eps`, `weight_decay`). All parameters of the model: the mask names each of them.
        mask: Which weights to train.
        lr: Step size, >= 0.
        betas: Decay rates of the moments, each in [0, 1).
        eps: Added to the denominator, > 0.
        weight_decay: Decoupled decay rate, >= 0, applied on the mask only.
        max_grad_norm: Every step clips the gradient on the mask to this norm; `None` does not clip. A trainer that
            clips by itself cannot see the masked norm: `restrict` hooks it.
        master: `fp32`, or `remainder`: for bfloat16 weights the low 16 bits of the master beside the weight, an exact
            float32 master for 2 bytes instead of 4.
        check_base: Compare the weights with the base that the mask was made for. Switch it off only when the weights
            are already those of a run in progress, and a check was made before.

    Raises:
        MaskMismatchError: Names, shapes, dtypes or weights are not those of the mask.
        ValueError: A hyper-parameter is out of range.

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), Algorithm 2.
    """

    def __init__(
        self,
        named_parameters: NamedParameters | Iterable[dict[str, Any]],
        mask: SubnetMask,
        *,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None,
        master: str = "fp32",
        check_base: bool = True,
    ) -> None:
        if master not in MASTERS:
            raise ValueError(f"`master` must be one of {', '.join(MASTERS)}, got {master!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"`max_grad_norm` must be > 0, or None for no clipping, got {max_grad_norm}")
        groups = _named_groups(named_parameters)
        parameters = by_canonical_name(pair for group in groups for pair in group["params"])
        _check_parameters(parameters, mask, check_base=check_base)
        self.mask = mask
        self.max_grad_norm = max_grad_norm
        self.master = master
        self._clip_coefficient: torch.Tensor | None = None
        self._names: dict[torch.nn.Parameter, str] = {parameter: name for name, parameter in parameters.items()}
        self._bits: dict[str, torch.Tensor] = {}
        for name, parameter in parameters.items():
            parameter.requires_grad_(mask.tensors[name].count > 0)
            if not parameter.requires_grad:
                parameter.grad = None
        trainable = [
            {
                **group,
                "params": [
                    (name, p) for name, p in by_canonical_name(group["params"]).items() if mask.tensors[name].count
                ],
            }
            for group in groups
        ]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([group for group in trainable if group["params"]], defaults)
        for group in self.param_groups:
            _check_options(group)
            group["mask_fingerprint"] = mask.fingerprint
            group["master"] = master

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the subnetwork once from the parameters' `.grad`.

        Args:
            closure: Re-evaluates the model and returns the loss, as in `torch.optim`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._clip_coefficient is None and self.max_grad_norm is not None:
            self.clip_grad_norm_(self.max_grad_norm)
        scale, self._clip_coefficient = self._clip_coefficient, None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, self._compact_grad(parameter), scale)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and with them what `clip_grad_norm_` decided about them.

        Args:
            set_to_none: As in `torch.optim`; a tensor whose `.grad` is zero instead of `None` is not skipped.
        """
        super().zero_grad(set_to_none)
        self._clip_coefficient = None

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        """Return the 2-norm () float32 of the gradient on the mask, before any clipping, on the gradients' device."""
        grads = (self._compact_grad(p) for group in self.param_groups for p in group["params"] if p.grad is not None)
        return _norm(grads)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Make the next `step` scale the gradient so that its norm on the mask is at most `max_norm`.

        The gradients themselves stay as they are. A step that is left out must end with the optimizer's `zero_grad()`:
        `model.zero_grad()` does not take the scale back. As with `torch.nn.utils.clip_grad_norm_`, a norm that is not
        finite is no error here: the next `step` writes NaN wherever the scaled gradient is NaN, so check the returned
        norm to leave that step out.

        Returns:
            () float32, the norm before clipping.
        """
        norm = self.grad_norm()
        self._clip_coefficient = _clip_coefficient(norm, max_norm)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return the state keyed by parameter name: tensors, numbers and strings only."""
        return state.keyed_by_name(super().state_dict(), self._ordered_names())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state bit by bit; nothing is cast to the parameters' dtype.

        Raises:
            OptimizerStateError: The state belongs to another mask, another kind of master or other parameters.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, dict(state_dict)) or state_dict
        state.load_state(self, self._names, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _ordered_names(self) -> list[str]:
        return [self._names[parameter] for group in self.param_groups for parameter in group["params"]]

    def _compact_grad(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        grad = parameter.grad
        assert grad is not None
        if grad.is_sparse:
            raise RuntimeError(
                f"`{self._names[parameter]}` has a sparse gradient; build its embedding with sparse=False."
            )
        count = self.mask.tensors[self._names[parameter]].count
        return subnet_kernels.gather(grad.reshape(-1), self._mask_bits(parameter), count)

    def _mask_bits(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return the (ceil(N / 8),) bits of a parameter's mask on its device, moved there once."""
        name = self._names[parameter]
        if name not in self._bits or self._bits[name].device != parameter.device:
            self._bits[name] = self.mask.tensors[name].bits.to(parameter.device)
        return self._bits[name]

    def _update(
        self, parameter: torch.nn.Parameter, group: dict[str, Any], grad: torch.Tensor, scale: torch.Tensor | None
    ) -> None:
        values = self.state[parameter]
        bits = self._mask_bits(parameter)
        weight = parameter.detach().view(-1)
        if not values:
            values.update(self._new_state(weight, bits, grad.numel()))
        values["step"] += 1.0
        subnet_kernels.masked_adamw(
            weight,
            bits,
            grad,
            values["exp_avg"],
            values["exp_avg_sq"],
            values.get("master"),
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=int(values["step"]),
            grad_scale=scale if scale is None else scale.to(grad.device),
        )

    def _new_state(self, weight: torch.Tensor, bits: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
        zeros = torch.zeros(count, dtype=torch.float32, device=weight.device)
        values = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        master_dtype = state.entry_dtypes(weight.dtype, self.master).get("master")
        if master_dtype == torch.int16:
            values["master"] = torch.zeros(count, dtype=torch.int16, device=weight.device)
        elif master_dtype is not None:
            values["master"] = subnet_kernels.gather(weight, bits, count)
        return values


def _named_groups(named_parameters: NamedParameters | Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return groups whose `params` are lists of pairs of name and parameter."""
    items: list[Any] = list(named_parameters)
    groups = items if items and all(isinstance(item, dict) for item in items) else [{"params": items}]
    named: list[dict[str, Any]] = []
    for group in groups:
        pairs = list(group["params"])
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise TypeError(
                "MaskedAdamW finds a parameter's mask by its name: pass `model.named_parameters()`, or groups with "
                "such pairs under `params`."
            )
        named.append({**group, "params": pairs})
    return named


def _check_parameters(parameters: Mapping[str, torch.nn.Parameter], mask: SubnetMask, *, check_base: bool) -> None:
    mask.check_shapes({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    if not mask.num_trainable:
        raise MaskMismatchError("The mask has no trainable weight: nothing would be trained.")
    for name, parameter in parameters.items():
        if mask.tensors[name].count and parameter.dtype not in _WEIGHT_DTYPES:
            raise MaskMismatchError(
                f"`{name}` is {parameter.dtype}; masked training needs bfloat16, float16 or float32."
            )
        if mask.tensors[name].count and not parameter.is_contiguous():
            raise MaskMismatchError(f"`{name}` is not contiguous; call `.contiguous()` on it before training.")
    if check_base:
        mask.check_weights((name, parameter.detach()) for name, parameter in parameters.items())


def _check_options(group: Mapping[str, Any]) -> None:
    if not group["lr"] >= 0.0:
        raise ValueError(f"`lr` must be >= 0, got {group['lr']}")
    if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
        raise ValueError(f"`betas` must lie in [0, 1), got {group['betas']}")
    if not group["eps"] > 0.0:
        raise ValueError(f"`eps` must be > 0, got {group['eps']}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"`weight_decay` must be >= 0, got {group['weight_decay']}")


def _norm(grads: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the 2-norm () float32 of all compact gradients together, without waiting for their device."""
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    if not norms:
        return torch.tensor(0.0)
    together = torch.stack([norm.to(norms[0].device) for norm in norms])
    wide = torch.float32 if together.device.type == "mps" else torch.float64  # MPS has no float64
    return together.to(wide).square().sum().sqrt().to(torch.float32)


def _clip_coefficient(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    # The small constant is that of torch.nn.utils.clip_grad_norm_.
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)
