"""What every masked optimizer does, whatever its arithmetic: bind to a mask, take gradients, clip, save and load."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from subnet_ft.errors import OptimizerError
from subnet_ft.masks import SubnetMask, by_canonical_name
from subnet_ft.optim import mask_change
from subnet_ft.optim.binding import Binding, set_requires_grad
from subnet_ft.optim.clipping import Clipping
from subnet_ft.optim.dense_gradients import DenseGradients
from subnet_ft.optim.frozen import FrozenWeights
from subnet_ft.optim.gradients import CompactGradients
from subnet_ft.optim.ledger import cache_nbytes, state_nbytes
from subnet_ft.optim.masters import Roundings
from subnet_ft.optim.norms import GradientNorms
from subnet_ft.optim.parameters import NamedParameters, ParameterGroups, check_parameters, named_groups
from subnet_ft.optim.processes import num_processes
from subnet_ft.optim.reduction import replica_of
from subnet_ft.optim.saved_state import SavedState
from subnet_ft.optim.shards import is_sharded, local
from subnet_kernels import BitMask


class MaskedBase(GradientNorms, SavedState):
    """An optimizer that trains the weights of a mask; a weight outside it keeps its bits, whatever happens.

    The mask alone says what is trained, so building the optimizer sets `requires_grad` of every tensor: False without a
    trainable weight, True with one. Where the norm of the whole gradient is wanted, those without one keep theirs.

    With compact gradients, a dense gradient lives only until autograd has accumulated it (see `CompactGradients`).
    `step` consumes what arrived and `zero_grad` clears it. A tensor that got no gradient since the last step is skipped
    whole: no decay, no momentum, no step count. Gradients outside the mask, NaN included, are never read.
    """

    _is_built = False

    def __init__(
        self,
        named_parameters: NamedParameters | Iterable[dict[str, Any]],
        mask: SubnetMask,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        clip_norm: str,
        measure_full_norm: bool,
        nonfinite: str,
        compact_grads: bool,
        check_base: bool,
    ) -> None:
        groups = named_groups(named_parameters, type(self).__name__)
        parameters = by_canonical_name(pair for group in groups for pair in group["params"])
        self._binding = Binding(parameters, mask)
        self._clipping = Clipping(
            self._binding,
            max_grad_norm=max_grad_norm,
            clip_norm=clip_norm,
            measure_full=measure_full_norm,
            nonfinite=nonfinite,
        )
        check_parameters(parameters, mask, check_base=check_base)
        self.compact_grads = compact_grads
        self._names = self._binding.names
        self._roundings = Roundings()
        self._cache: dict[torch.device, dict[Any, Any]] = {}
        self._frozen = FrozenWeights(self._binding)
        self._groups = ParameterGroups(groups)
        super().__init__(self._groups.trained(mask), defaults)
        self._prepare()
        # Nothing of the model was changed so far: what is refused leaves it as it was.
        self._take_gradients()
        self._bind()
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

    @abstractmethod
    def _remapped_entries(
        self, parameter: torch.nn.Parameter, entries: Mapping[str, Any], old: BitMask, new: BitMask
    ) -> dict[str, Any]:
        """Return a parameter's state under another mask of it, or raise OptimizerError if an entry cannot be kept."""

    @abstractmethod
    def _new_master(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """Return masters (K,) of a parameter's weights as they are; `None` where there are none."""

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
        if self._frozen.taken is None:
            self._frozen.take()
        clipping = self._clipping
        clipping.clip_by_itself(self._gradients)
        grads = self._grads()
        problem = clipping.problem(self._gradients, self._names)
        if problem is not None:
            self._forget_gradients()
            clipping.leave_out(problem)
            return loss
        self._update(grads, clipping.coefficient)
        # The kernels write behind autograd's back; this is what makes a backward through old weights an error.
        torch.autograd.graph.increment_version([local(parameter) for parameter in grads])
        for parameter in grads:
            self._roundings.mark(parameter, self.state[parameter].get("master"))
        self._forget_gradients()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a group while the optimizer is built; afterwards the mask is bound, and a group is refused."""
        if self._is_built:
            raise OptimizerError(f"{type(self).__name__} takes no further parameters. Build a new one on all of them.")
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
        self._forget_gradients()

    def names_without_gradient(self) -> list[str]:
        """Return the tensors that the next step would skip: the mask trains them, and they got no gradient."""
        grads = self._grads()
        return [self._names[parameter] for parameter in self._trained() if parameter not in grads]

    @property
    def frozen_fingerprints(self) -> dict[str, str] | None:
        """Name to fingerprint of the weights outside the mask at the first step or audit; `None` before."""
        return None if self._frozen.taken is None else dict(self._frozen.taken)

    def audit(self) -> None:
        """Compare the weights outside the mask, bit by bit, with what they were at the first step or the first audit.

        One pass over the weights of the model; fingerprints stand for them.

        Raises:
            FrozenWeightError: One changed; the message names the tensor.
        """
        self._frozen.check()

    @torch.no_grad()
    def set_mask(self, mask: SubnetMask) -> None:
        """Train the weights of another mask from the next step on; call it between two steps.

        State is kept where both masks agree and dropped elsewhere: a weight that leaves stops at once, one that enters
        starts from its value, with moments of zero and the step count of its tensor. The weights outside the old mask
        are audited first.

        Raises:
            MaskMismatchError: Names, shapes or dtypes are not those of the mask, or it was made for another base.
            GradientError: Gradients wait for their step, or several processes could not reduce those of a tensor that
                was frozen so far.
            OptimizerError: A wrapped optimizer keeps state that cannot be taken over.
            FrozenWeightError: A weight outside the old mask changed.
        """
        mask_change.set_mask(self, mask)

    def start_over(self, mask: SubnetMask, *, earlier: Sequence[SubnetMask] | None = None) -> None:
        """Train a mask from the beginning, without state or gradients, on whatever weights the model has now.

        What follows is `load_state_dict`, or a first step. Names and shapes are checked; base and frozen weights are
        not, because they are those of another moment.

        Args:
            mask: The mask.
            earlier: The masks that these weights were trained under before; `None` if that is not known.

        Raises:
            MaskMismatchError: Names, shapes or dtypes are not those of the mask.
        """
        mask_change.start_over(self, mask, earlier)

    def adopt_weights(self) -> None:
        """Take the weights that somebody else wrote since the last step as their own masters; moments stay."""
        for parameter in self._trained():
            entries = self.state.get(parameter) or {}
            if entries and self._roundings.was_written(parameter, entries.get("master"), self.bit_mask(parameter)):
                master = self._new_master(parameter)
                if master is not None:
                    entries["master"] = master
                self._roundings.mark(parameter, master)

    @torch.no_grad()
    def rebind(self, named_parameters: NamedParameters) -> None:
        """Train the parameters that took the place of those it was built on, as `fully_shard` replaces them.

        Call it after the model was sharded and before the first step. Names and shapes stay; the weights may have been
        loaded in between.

        Args:
            named_parameters: `model.named_parameters()` of the model as it is now.

        Raises:
            OptimizerError: A step was taken already, names or shapes are others, or parameters are sharded in a way
                that is not supported.
        """
        mask_change.rebind(self, by_canonical_name(named_parameters))

    def release(self) -> None:
        """Let the model go: remove the hooks, free the gradients, and give tensors the `requires_grad` they had."""
        self._gradients.release()
        self._cache.clear()
        self._give_back()

    def bit_mask(self, parameter: torch.nn.Parameter) -> BitMask:
        """Return a parameter's mask on its device, brought there once."""
        return self._binding.bit_mask(parameter)

    def memory(self) -> dict[str, int]:
        """Return bytes that live from one step to the next: `gradients` (compact), `moments`, `masters` and `mask`."""
        mask = self._binding.nbytes + cache_nbytes(self._cache)
        return {"gradients": self._gradients.nbytes, **state_nbytes(self.state), "mask": mask}

    def _take_gradients(self) -> None:
        """Claim the gradients of the bound parameters, and remember what required one."""
        kind = CompactGradients if self.compact_grads else DenseGradients
        self._gradients = kind(self._binding, measure_full=self._clipping.measure_full)
        found = [(parameter, parameter.requires_grad) for parameter in self._names]
        self._give_back = weakref.finalize(self, set_requires_grad, found)
        self._give_back.atexit = False

    def _take_parameters(self, binding: Binding) -> None:
        """Go on with other parameters of the same names and shapes."""
        self.release()
        self._binding, self._names = binding, binding.names
        self._clipping.bind(binding)
        self._frozen = FrozenWeights(binding)
        self._groups.replace({name: parameter for parameter, name in binding.names.items()})
        self._take_gradients()
        self._change_mask(binding.mask, {})

    def _adopt(self, loaded: Mapping[torch.nn.Parameter, dict[str, Any]]) -> None:
        """Make loaded entries the state; the options of the groups are loaded already."""
        self.state.clear()
        self._cache.clear()
        self._roundings.clear()
        for parameter, entries in loaded.items():
            self.state[parameter] = entries

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _grads(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return the gradient of every parameter that got one: compact (K,), or dense (N,) without compaction."""
        trained = self._trained()
        self._binding.check_known(trained)
        self._gradients.collect()
        found = ((parameter, self._gradients.get(parameter)) for parameter in trained)
        return {parameter: grad for parameter, grad in found if grad is not None}

    def _forget_gradients(self) -> None:
        self._gradients.clear()
        self._clipping.forget()

    def _change_mask(self, mask: SubnetMask, entries: Mapping[torch.nn.Parameter, dict[str, Any]]) -> None:
        self._binding.mask = mask
        for group, trained in zip(self.param_groups, self._groups.trained(mask), strict=True):
            group["params"] = [parameter for _, parameter in trained["params"]]
            group["param_names"] = [name for name, _ in trained["params"]]
        self._adopt(entries)
        self._bind()

    def _bind(self) -> None:
        """Make the mask the one that groups, parameters and gradients go by."""
        for group in self.param_groups:
            group["mask_fingerprint"] = self.mask.fingerprint
        for parameter in self._names:
            if self._binding.is_trained(parameter):
                parameter.requires_grad_(True)
            elif not (self._clipping.measure_full or self._is_awaited(parameter)):
                parameter.requires_grad_(False)
            if not parameter.requires_grad:
                parameter.grad = None
        self._gradients.forget_masks()

    def _is_awaited(self, parameter: torch.nn.Parameter) -> bool:
        """Whether others wait for a parameter's gradient: of what required one when they wrapped the model."""
        replica = replica_of(parameter)
        if replica is not None and self.compact_grads:
            return replica.is_kept
        return self._is_built and (num_processes() > 1 or is_sharded(parameter))
