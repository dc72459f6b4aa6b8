"""What every masked optimizer does, whatever its arithmetic: bind to a mask, take gradients, clip, save and load."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

import subnet_kernels
from subnet_ft.errors import OptimizerError
from subnet_ft.masks import SubnetMask, by_canonical_name
from subnet_ft.optim import state
from subnet_ft.optim.gradients import CompactGradients, flat_grad, norm_of_squares, refuse_many_processes
from subnet_ft.optim.parameters import NamedParameters, check_parameters, named_groups, trainable_groups
from subnet_kernels import BitMask


class MaskedBase(torch.optim.Optimizer):
    """An optimizer that trains the weights of a mask; a weight outside it keeps its bits, whatever happens.

    The mask alone says what is trained, so building the optimizer sets `requires_grad` of every tensor: False without a
    trainable weight, and autograd never computes its gradient; True with one, whoever froze it before.

    With compact gradients, a dense gradient lives only until autograd has accumulated it: its part on the mask is added
    to a float32 buffer, and `.grad` is `None` again. `step` consumes the buffers and `zero_grad` clears them. A tensor
    that got no gradient since the last step is skipped whole: no decay, no momentum, no step count. Gradients outside
    the mask, NaN included, are never read.
    """

    def __init__(
        self,
        named_parameters: NamedParameters | Iterable[dict[str, Any]],
        mask: SubnetMask,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        compact_grads: bool,
        check_base: bool,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"`max_grad_norm` must be > 0, or None for no clipping, got {max_grad_norm}")
        groups = named_groups(named_parameters, type(self).__name__)
        parameters = by_canonical_name(pair for group in groups for pair in group["params"])
        check_parameters(parameters, mask, check_base=check_base)
        if compact_grads:
            refuse_many_processes()
        self.mask = mask
        self.max_grad_norm = max_grad_norm
        self.compact_grads = compact_grads
        self._clip_coefficient: torch.Tensor | None = None
        self._names: dict[torch.nn.Parameter, str] = {parameter: name for name, parameter in parameters.items()}
        self._bit_masks: dict[str, BitMask] = {}
        self._written: dict[int, tuple[int, ...]] = {}
        self._cache: dict[torch.device, dict[Any, Any]] = {}
        super().__init__(trainable_groups(groups, mask), defaults)
        for group in self.param_groups:
            group["mask_fingerprint"] = mask.fingerprint
        self._prepare()
        # Nothing of the model was changed so far: what is refused leaves it as it was.
        self._gradients = CompactGradients(parameters, self.bit_mask)
        for name, parameter in parameters.items():
            parameter.requires_grad_(mask.tensors[name].count > 0)
            if not parameter.requires_grad:
                parameter.grad = None
        if compact_grads:
            self._gradients.hook(self._trained())
        self._is_built = True

    @abstractmethod
    def _update(self, grads: Mapping[torch.nn.Parameter, torch.Tensor], scale: torch.Tensor | None) -> None:
        """Update every parameter that has a gradient, compact (K,) or dense (N,), times the () `scale`."""

    @abstractmethod
    def _prepare(self) -> None:
        """Check the options of the param groups, and build what depends on them; no parameter was changed so far."""

    @abstractmethod
    def _checked_entries(
        self, parameter: torch.nn.Parameter, values: Mapping[str, Any], saved_group: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return copies of a parameter's saved entries where this optimizer wants them.

        Raises:
            OptimizerStateError: An entry is missing, unknown, or of another dtype or shape.
        """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the subnetwork once from the gradients that arrived since the last step.

        Args:
            closure: Re-evaluates the model and returns the loss, as in `torch.optim`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._clip_coefficient is None and self.max_grad_norm is not None:
            self.clip_grad_norm_(self.max_grad_norm)
        grads = self._grads()
        self._update(grads, self._clip_coefficient)
        # The kernels write behind autograd's back; this is what makes a backward through old weights an error.
        torch.autograd.graph.increment_version(grads)
        for parameter in grads:
            self._mark_rounded(parameter)
        self._gradients.clear()
        self._clip_coefficient = None
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a group while the optimizer is built; afterwards the mask is bound, and a group is refused."""
        if getattr(self, "_is_built", False):
            raise OptimizerError(
                f"{type(self).__name__} is bound to its mask and takes no further parameters. Build a new one on all "
                "of them."
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be copied or pickled: hooks and mask belong to this model's parameters."""
        raise OptimizerError(
            f"{type(self).__name__} cannot be copied or pickled, because its hooks belong to the parameters of this "
            "model. Build one on the other model and load this one's `state_dict()`."
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and with them what `clip_grad_norm_` decided about them.

        Args:
            set_to_none: As in `torch.optim`; without compact gradients, a tensor whose `.grad` is zero instead of
                `None` is not skipped.
        """
        super().zero_grad(set_to_none)
        self._gradients.clear()
        self._clip_coefficient = None

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        """Return the 2-norm () float32 of the accumulated gradient on the mask, before any clipping, on its device."""
        if self.compact_grads:
            self._gradients.collect()
            return self._gradients.norm()
        return norm_of_squares(self._squares(parameter) for parameter in self._trained() if parameter.grad is not None)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Make the next `step` scale the gradient so that its norm on the mask is at most `max_norm`.

        The gradients themselves stay as they are. A step that is left out must end with the optimizer's `zero_grad()`:
        `model.zero_grad()` does not take the scale back. As with `torch.nn.utils.clip_grad_norm_`, a norm that is not
        finite is no error here: the next `step` writes NaN wherever the scaled gradient is NaN, so check the returned
        norm to leave that step out.

        Of several calls before one step, the strictest counts.

        Returns:
            () float32, the norm before clipping.

        Raises:
            ValueError: `max_norm` is negative or NaN.
        """
        if not max_norm >= 0:
            raise ValueError(f"`max_norm` must be >= 0, got {max_norm}")
        norm = self.grad_norm()
        # The small constant is that of torch.nn.utils.clip_grad_norm_.
        coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        earlier = self._clip_coefficient
        self._clip_coefficient = coefficient if earlier is None else torch.minimum(earlier, coefficient)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return the state keyed by parameter name: tensors, numbers and strings only."""
        names = [self._names[parameter] for parameter in self._trained()]
        return state.keyed_by_name(super().state_dict(), names)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state bit by bit; nothing is cast to the parameters' dtype.

        Raises:
            OptimizerStateError: The state belongs to another mask, another kind of master or other parameters.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, dict(state_dict)) or state_dict
        loaded = state.checked_state(self.param_groups, self._names, state_dict, self._checked_entries)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        self._adopt(loaded)
        self._written.clear()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def release(self) -> None:
        """Let the model go: remove the gradient hooks and free the gradients. The optimizer trains no longer."""
        self._gradients.release()
        self._cache.clear()

    def bit_mask(self, parameter: torch.nn.Parameter) -> BitMask:
        """Return a parameter's mask on its device, brought there once."""
        name = self._names[parameter]
        if name not in self._bit_masks or self._bit_masks[name].device != parameter.device:
            tensor = self.mask.tensors[name]
            self._bit_masks[name] = BitMask.from_bits(tensor.bits, tensor.num_elements, parameter.device)
        return self._bit_masks[name]

    def memory(self) -> dict[str, int]:
        """Return bytes that live from one step to the next: `gradients` (compact), `moments`, `masters` and `mask`."""
        kept = [
            item for entries in self.state.values() for item in entries.items() if isinstance(item[1], torch.Tensor)
        ]
        return {
            "gradients": self._gradients.nbytes,
            "moments": sum(value.nbytes for key, value in kept if key not in ("step", "master")),
            "masters": sum(value.nbytes for key, value in kept if key == "master"),
            "mask": sum(mask.nbytes for mask in self._bit_masks.values()) + _nbytes(self._cache),
        }

    def _adopt(self, loaded: Mapping[torch.nn.Parameter, dict[str, Any]]) -> None:
        """Make loaded entries the state; the options of the groups are loaded already."""
        self.state.clear()
        self._cache.clear()
        for parameter, entries in loaded.items():
            self.state[parameter] = entries

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _grads(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return the gradient of every parameter that got one: compact (K,), or dense (N,) without compaction."""
        trained = self._trained()
        for parameter in trained:
            if parameter not in self._names:
                raise OptimizerError(
                    f"A parameter of shape {tuple(parameter.shape)} took the place of one that this optimizer was "
                    "built on, so its name and mask are unknown. Build the optimizer after whatever replaces "
                    "parameters."
                )
        if not self.compact_grads:
            return {p: flat_grad(p, self._names[p]) for p in trained if p.grad is not None}
        self._gradients.collect()
        found = ((parameter, self._gradients.get(parameter)) for parameter in trained)
        return {parameter: grad for parameter, grad in found if grad is not None}

    def _squares(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return the sum of squares () of a dense gradient on the mask."""
        mask = self.bit_mask(parameter)
        grad = flat_grad(parameter, self._names[parameter])
        scratch = torch.empty(mask.count, dtype=torch.float32, device=grad.device)
        return subnet_kernels.compact(grad, mask, scratch, accumulate=False)

    def _is_rounded(self, parameter: torch.nn.Parameter) -> bool:
        """Whether nobody wrote to a parameter or its masters since these were rounded into it."""
        return self._written.get(id(parameter)) == self._versions(parameter)

    def _mark_rounded(self, parameter: torch.nn.Parameter) -> None:
        self._written[id(parameter)] = self._versions(parameter)

    def _versions(self, parameter: torch.nn.Parameter) -> tuple[int, ...]:
        """Return numbers that change when torch writes to a parameter or its masters, or gives it another storage."""
        master = self.state[parameter].get("master")
        written = (parameter._version, parameter.data_ptr())
        return written if master is None else (*written, master._version, master.data_ptr())


def _nbytes(cache: Mapping[Any, Any]) -> int:
    """Count the bytes of the tensors and arrays anywhere in a cache; the masks it names are counted elsewhere."""
    total = 0
    for value in cache.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, dict):
                total += _nbytes(item)
            elif not isinstance(item, BitMask):
                total += getattr(item, "nbytes", 0)
    return total
