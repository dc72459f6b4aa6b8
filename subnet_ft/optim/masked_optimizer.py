"""`MaskedOptimizer`: any element-wise torch optimizer on the weights of a mask, and on no other."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch

import subnet_kernels
from subnet_ft.errors import OptimizerError, OptimizerStateError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim.base import MaskedBase
from subnet_ft.optim.elementwise import check_elementwise, check_keywords
from subnet_ft.optim.parameters import NamedParameters
from subnet_ft.optim.remap import remap
from subnet_ft.optim.shards import local, local_flat
from subnet_ft.optim.state import check_keys, checked_tensor
from subnet_kernels import BitMask

# What a param group holds besides the wrapped optimizer's options.
_NOT_OPTIONS = frozenset({"params", "param_names", "mask_fingerprint", "optimizer_class", "compact_entries"})

# State of torch's optimizers that is zero for a weight that took no step yet.
_STARTS_AT_ZERO = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg"})


class MaskedOptimizer(MaskedBase):
    """A torch optimizer that trains the weights of a mask; a weight outside it keeps its bits, whatever happens.

    The wrapped optimizer sees one float32 parameter `(K,)` per tensor, the masters of its trainable weights, and their
    compact gradients. After its step the masters are rounded into the weights. So it must treat every weight by itself:
    those that need the shape or the norm of a tensor are refused by name. What `MaskedAdamW` says about gradients,
    skipped tensors, `requires_grad` and weights that somebody else changes holds here, too.

    Between steps, `state` alone holds masters and moments: an entry that is replaced counts and its old tensor is free,
    and a tensor whose state is cleared starts again from its weights.

    Param groups have all options of the wrapped optimizer. A schedule that changes one reaches it at the next step, and
    what the step itself changes comes back.

    Args:
        optimizer_cls: The class to wrap, such as `torch.optim.RAdam`. Where it is element-wise but asks the model for
            more than gradients (a closure, a mode), that part is out of reach.
        named_parameters: Pairs of name and parameter, or dicts with those pairs under `params` and options of their
            own. All parameters of the model.
        mask: Which weights to train.
        max_grad_norm, clip_norm, measure_full_norm, nonfinite, compact_grads, check_base: As in `MaskedAdamW`. Without
            compact gradients every step makes compact copies, 4 bytes per trainable weight, and frees them again.
        kwargs: Options of `optimizer_cls`, such as `lr` or `fused`.

    Raises:
        OptimizerError: `optimizer_cls` is not element-wise.
        TypeError: `optimizer_cls` is no optimizer class, or lacks an option.
        MaskMismatchError: Names, shapes, dtypes or weights are not those of the mask.
        GradientError: Another optimizer compacts the gradients already, or processes train together.

    Example:
        `MaskedOptimizer(torch.optim.RAdam, model.named_parameters(), mask, lr=1e-6, max_grad_norm=1.0)`
    """

    def __init__(
        self,
        optimizer_cls: type[torch.optim.Optimizer],
        named_parameters: NamedParameters | Iterable[dict[str, Any]],
        mask: SubnetMask,
        *,
        max_grad_norm: float | None,
        clip_norm: str = "masked",
        measure_full_norm: bool = False,
        nonfinite: str = "raise",
        compact_grads: bool = True,
        check_base: bool = True,
        **kwargs: Any,
    ) -> None:
        check_elementwise(optimizer_cls)
        if issubclass(optimizer_cls, MaskedBase):
            raise OptimizerError(f"`{optimizer_cls.__name__}` is masked already; use it without `MaskedOptimizer`.")
        check_keywords(optimizer_cls, kwargs)
        self.optimizer_cls = optimizer_cls
        self._kwargs = kwargs
        super().__init__(
            named_parameters,
            mask,
            {},
            max_grad_norm=max_grad_norm,
            clip_norm=clip_norm,
            measure_full_norm=measure_full_norm,
            nonfinite=nonfinite,
            compact_grads=compact_grads,
            check_base=check_base,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state keyed by parameter name: tensors, numbers and strings only.

        The entries of a tensor are `master` and what the wrapped optimizer keeps. Each group lists its
        `compact_entries`: those that every tensor has as (K,), so that loading can check them.
        """
        for group in self.param_groups:
            kept = [self._compact_entries(p, self.state[p]) for p in group["params"] if self.state.get(p)]
            group["compact_entries"] = sorted(set.intersection(*kept)) if kept else []
        return super().state_dict()

    def is_compact(self, group: Mapping[str, Any], key: str, value: torch.Tensor) -> bool:
        """Whether an entry of the state holds a value for each trainable weight, not a number or a table."""
        return key == "master" or key in group["compact_entries"]

    def memory(self) -> dict[str, int]:
        """Return bytes that live from one step to the next: `gradients` (compact), `moments`, `masters` and `mask`.

        `moments` is what the wrapped optimizer keeps in tensors, single numbers aside.
        """
        held = super().memory()
        kept = [value for entries in self.state.values() for key, value in entries.items() if key != "master"]
        tensors = [value for value in kept if isinstance(value, torch.Tensor) and value.dim()]
        # One that all parameters share, such as a table of quantized values, counts once.
        sizes = {(value.data_ptr(), value.shape): value.nbytes for value in tensors}
        return {
            **held,
            "moments": sum(sizes.values()),
            # Those of tensors that took no step yet are not part of the state.
            "masters": held["masters"] + sum(master.nbytes for master in self._masters.values()),
        }

    def _prepare(self) -> None:
        """Build the wrapped optimizer on new masters; it fills in the options that a group leaves open."""
        self._masters = {parameter: torch.nn.Parameter(self._gathered(parameter)) for parameter in self._trained()}
        self._inner = self._wrapped(self._masters)
        for master in self._masters.values():
            self._inner.state.pop(master, None)  # made again at the first step
        self.defaults.update(self._inner.defaults)
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            group.update(_options(inner))
            group["optimizer_class"] = self.optimizer_cls.__name__

    def _update(self, grads: Mapping[torch.nn.Parameter, torch.Tensor], scale: torch.Tensor | None) -> None:
        self._lend_state(grads)
        for parameter, master in self._masters.items():
            master.grad = self._compact_grad(parameter, grads[parameter], scale) if parameter in grads else None
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update(_options(group))
        self._inner.step()
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            group.update(_options(inner))
        for parameter in self._masters:
            if parameter in grads or self.state.get(parameter):
                self._take_back_state(parameter)
        for parameter in grads:
            master = self.state[parameter]["master"]
            weights = subnet_kernels.round_to_weights(master, parameter.dtype)
            subnet_kernels.scatter(local_flat(parameter), self.bit_mask(parameter), weights)
        strangers = self._inner.state.keys() - self._masters.values()
        if strangers:
            raise OptimizerError(
                f"`{self.optimizer_cls.__name__}` keeps state under {sorted(map(str, strangers))}, which is no tensor "
                "that it trains and cannot be saved by name. Use another optimizer."
            )

    def _compact_grad(
        self, parameter: torch.nn.Parameter, grad: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the gradient (K,) times `scale`; a compact one is scaled in place, for the step consumes it."""
        if not self.compact_grads:
            mask = self.bit_mask(parameter)
            dense, grad = grad, torch.empty(mask.count, dtype=torch.float32, device=grad.device)
            subnet_kernels.compact(dense, mask, grad, accumulate=False)
        return grad if scale is None else grad.mul_(scale.to(grad.device))

    def _wrapped(self, parameters: Container[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Build a wrapped optimizer of the masters of some parameters, with the options of their groups now."""
        return self.optimizer_cls(
            [
                {**_options(group), "params": [self._masters[p] for p in group["params"] if p in parameters]}
                for group in self.param_groups
            ],
            **self._kwargs,
        )

    def _lend_state(self, grads: Container[torch.nn.Parameter]) -> None:
        """Give what `self.state` holds, whoever put it there, to the wrapped optimizer; without any, start anew."""
        new: set[torch.nn.Parameter] = set()
        for parameter, master in self._masters.items():
            entries = self.state.get(parameter)
            if entries:
                self._check_master(parameter, entries.get("master"))
                master.data = entries["master"]
                self._inner.state[master] = {key: value for key, value in entries.items() if key != "master"}
            elif parameter in grads:
                # Weights that were loaded since the optimizer was built count.
                master.data = self._gathered(parameter)
                self._inner.state.pop(master, None)
                new.add(parameter)
        if new:
            # Some fill their state when they are built, such as Adagrad its sums.
            self._inner.state.update(self._wrapped(new).state)

    def _check_master(self, parameter: torch.nn.Parameter, master: object) -> None:
        shape = (self.bit_mask(parameter).count,)
        expected, found = f"torch.float32 {shape} {local(parameter).device}", type(master).__name__
        if isinstance(master, torch.Tensor):
            found = f"{master.dtype} {tuple(master.shape)} {master.device}"
            if found == expected and master.is_contiguous():
                return
        raise OptimizerStateError(
            f"The `master` of `{self._names[parameter]}` in the optimizer's `state` is {found}, expected contiguous "
            f"{expected}. Put such a tensor there, or remove the whole entry of this parameter to start again from its "
            "weights."
        )

    def _take_back_state(self, parameter: torch.nn.Parameter) -> None:
        """Make `self.state` the only holder of a parameter's masters and of what the wrapped optimizer keeps."""
        master = self._masters[parameter]
        grad, master.grad = master.grad, None
        kept = self._inner.state.pop(master, {})
        for key, value in kept.items():
            if key == "master" or not _is_savable(value):
                raise OptimizerError(
                    f"`{self.optimizer_cls.__name__}` keeps `{key}`, a {type(value).__name__}. Beside the "
                    "`master` of a tensor only tensors, numbers and strings of other names can be saved. Use another "
                    "optimizer."
                )
            # The buffer of the gradient is used again at the next step.
            if grad is not None and _is_same_memory(value, grad):
                kept[key] = value.clone()
        self.state[parameter] = {"master": master.detach(), **kept}
        master.data = master.new_empty(0)

    def _gathered(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        return subnet_kernels.gather(local_flat(parameter), self.bit_mask(parameter))

    def _new_master(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        return self._gathered(parameter)

    def _compact_entries(self, parameter: torch.nn.Parameter, values: Mapping[str, Any]) -> set[str]:
        shape = (self.bit_mask(parameter).count,)
        return {key for key, value in values.items() if isinstance(value, torch.Tensor) and value.shape == shape}

    def _checked_entries(
        self, parameter: torch.nn.Parameter, values: Mapping[str, Any], saved_group: Mapping[str, Any]
    ) -> dict[str, Any]:
        name, compact = self._names[parameter], {"master", *saved_group.get("compact_entries", ())}
        check_keys(name, values, required=sorted(compact), allowed=values)
        device = local(parameter).device
        # As torch has it: scalars that the host reads stay there, unless a kernel reads them.
        on_device = saved_group.get("capturable") or saved_group.get("fused")
        entries: dict[str, Any] = {}
        for key, value in values.items():
            if not _is_savable(value):
                raise OptimizerStateError(
                    f"The saved `{key}` of `{name}` is {type(value).__name__}, expected a tensor, number or string."
                )
            if key in compact:
                dtype = torch.float32 if key == "master" else getattr(value, "dtype", torch.float32)
                shape = (self.bit_mask(parameter).count,)
                entries[key] = checked_tensor(name, key, value, dtype, shape, device)
            elif isinstance(value, torch.Tensor):
                entries[key] = value.to(device if value.dim() or on_device else "cpu", copy=True)
            else:
                entries[key] = value
        return entries

    def _remapped_entries(
        self, parameter: torch.nn.Parameter, entries: Mapping[str, Any], old: BitMask, new: BitMask
    ) -> dict[str, Any]:
        weight = local_flat(parameter)
        gathered = subnet_kernels.gather(weight, new)
        master = gathered if gathered.dtype == torch.float32 else gathered.to(torch.float32)
        has_new_weights = bool((new.bits & ~old.bits).any())
        remapped: dict[str, Any] = {"master": remap(entries["master"], old, new, into=master)}
        for key, value in entries.items():
            if key == "master" or not isinstance(value, torch.Tensor) or not value.dim():
                remapped.setdefault(key, value)
                continue
            is_compact = value.shape == (old.count,) and value.is_floating_point()
            if not is_compact or (has_new_weights and key not in _STARTS_AT_ZERO):
                why = "which has no value for the weights that enter the mask" if is_compact else "which is not compact"
                raise OptimizerError(
                    f"`{self.optimizer_cls.__name__}` keeps `{key}` of `{self._names[parameter]}`, {why}, so its mask "
                    "cannot change in the middle of training. Use MaskedAdamW, or build a new optimizer."
                )
            remapped[key] = remap(value, old, new, into=value.new_zeros(new.count))
        return remapped

    def _adopt(self, loaded: Mapping[torch.nn.Parameter, dict[str, Any]]) -> None:
        # What was there before leaves no trace, and its memory is free before new masters take theirs.
        self._masters.clear()
        del self._inner
        super()._adopt(loaded)
        self._prepare()
        for parameter in loaded:
            self._masters[parameter].data = torch.empty(0)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _NOT_OPTIONS}


def _is_savable(value: object) -> bool:
    return value is None or isinstance(value, (torch.Tensor, bool, int, float, str))


def _is_same_memory(value: object, grad: torch.Tensor) -> bool:
    return (
        type(value) is torch.Tensor
        and (value.dtype, value.shape, value.device) == (grad.dtype, grad.shape, grad.device)
        and value.is_set_to(grad)
    )
