"""What `MaskedAdamW` and `MaskedSGD` share: masters, and one kernel call for all tensors of a device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

import subnet_kernels
from subnet_ft.masks import SubnetMask
from subnet_ft.optim.base import MaskedBase
from subnet_ft.optim.masters import check_master, forget_remainder, master_dtype, new_masters
from subnet_ft.optim.parameters import NamedParameters
from subnet_ft.optim.remap import remap
from subnet_ft.optim.shards import local, local_flat
from subnet_ft.optim.state import check_keys, checked_tensor
from subnet_ft.optim.watching import StepWatch
from subnet_kernels import BitMask


class FusedBase(MaskedBase):
    """A masked optimizer with a kernel of its own, which updates many tensors in a few launches."""

    watch: StepWatch | None = None
    """Sees what every step changes, to the same bits but slice by slice; not for stochastic rounding."""

    def __init__(
        self,
        named_parameters: NamedParameters | Iterable[dict[str, Any]],
        mask: SubnetMask,
        defaults: dict[str, Any],
        *,
        master: str,
        seed: int,
        **options: Any,
    ) -> None:
        check_master(master)
        self.master = master
        super().__init__(
            named_parameters,
            mask,
            {**defaults, "master": master, "rounding_seed": seed},
            **options,
        )

    @abstractmethod
    def _check_options(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError for a hyper-parameter out of range."""

    @abstractmethod
    def _moments(self, group: Mapping[str, Any]) -> Sequence[str]:
        """Return the names of the compact float32 state entries under a group's options."""

    @abstractmethod
    def _describe(self, group: Mapping[str, Any], values: Mapping[str, Any], step: int, shared: dict[str, Any]) -> Any:
        """Return the kernel's description of one tensor's update number `step`; all descriptions have `shared`."""

    @abstractmethod
    def _run(self, updates: list[Any], grad_scale: torch.Tensor | None, cache: dict[Any, Any]) -> None:
        """Run the kernel on the updates of one device."""

    def _prepare(self) -> None:
        for group in self.param_groups:
            self._check_options(group)

    def _checked_entries(
        self, parameter: torch.nn.Parameter, values: Mapping[str, Any], saved_group: Mapping[str, Any]
    ) -> dict[str, Any]:
        name = self._names[parameter]
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        dtypes = dict.fromkeys(("step", *self._moments(group)), torch.float32)
        kept = master_dtype(parameter.dtype, self.master)
        if kept is not None:
            dtypes["master"] = kept
        check_keys(name, values, required=dtypes, allowed=dtypes)
        # The step count is read by the host at every step: on a GPU each reading would wait for the device.
        return {
            key: checked_tensor(name, key, values[key], dtype, (), torch.device("cpu"))
            if key == "step"
            else checked_tensor(
                name, key, values[key], dtype, (self.bit_mask(parameter).count,), local(parameter).device
            )
            for key, dtype in dtypes.items()
        }

    def _remapped_entries(
        self, parameter: torch.nn.Parameter, entries: Mapping[str, Any], old: BitMask, new: BitMask
    ) -> dict[str, Any]:
        weight = local_flat(parameter)
        remapped: dict[str, Any] = {}
        for key, value in entries.items():
            into = new_masters(weight, new, self.master) if key == "master" else value.new_zeros(new.count)
            assert into is not None  # entries have masters where weights have them
            remapped[key] = value if key == "step" else remap(value, old, new, into=into)
        return remapped

    def _new_master(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        return new_masters(local_flat(parameter), self.bit_mask(parameter), self.master)

    def _update(self, grads: Mapping[torch.nn.Parameter, torch.Tensor], scale: torch.Tensor | None) -> None:
        streams = {id(parameter): number for number, parameter in enumerate(self._names)}
        batches: dict[torch.device, list[Any]] = {}
        counts: list[torch.Tensor] = []
        for group in self.param_groups:
            self._check_options(group)
            for parameter in group["params"]:
                grad = grads.get(parameter)
                if grad is not None:
                    values = self.state[parameter]
                    update = self._one(parameter, group, values, grad, streams[id(parameter)])
                    counts.append(values["step"])
                    if grad.numel():  # nothing of a tensor's mask may lie in this process's part
                        batches.setdefault(grad.device, []).append(update)
        # Plans of a device that the model has left would keep its memory.
        self._cache = {device: self._cache.get(device, {}) for device in batches}
        for device, batch in batches.items():
            on_device = None if scale is None else scale.to(device)
            if self.watch is None:
                self._run(batch, on_device, self._cache[device])
                continue
            for update in batch:
                for part in self.watch.slices(update):
                    self._run([part], on_device, {})
        if self.master == "none":
            for parameter in grads:
                forget_remainder(self.state[parameter].get("master"))
        if counts:
            torch._foreach_add_(counts, 1.0)  # last, so that a refused step does not count

    def _one(
        self,
        parameter: torch.nn.Parameter,
        group: Mapping[str, Any],
        values: dict[str, Any],
        grad: torch.Tensor,
        stream: int,
    ) -> Any:
        """Return the kernel's description of one tensor's update; nothing of it is kept after the step."""
        weight = local_flat(parameter)
        if not values:
            self._start(parameter, group, values, weight)
        step = int(values["step"]) + 1
        key = None
        if self.master == "stochastic" and weight.dtype == torch.bfloat16:
            seed = group["rounding_seed"] + self._binding.parts[parameter].start
            key = subnet_kernels.rounding_key(seed, stream, step)
        shared = {
            "param": weight,
            "mask": self.bit_mask(parameter),
            "grad": grad,
            "master": values.get("master"),
            "lr": float(group["lr"]),
            "weight_decay": group["weight_decay"],
            "is_rounded": self._roundings.has(parameter, values.get("master")),
            "rounding_key": key,
        }
        return self._describe(group, values, step, shared)

    def _start(
        self, parameter: torch.nn.Parameter, group: Mapping[str, Any], values: dict[str, Any], weight: torch.Tensor
    ) -> None:
        mask = self.bit_mask(parameter)
        values["step"] = torch.tensor(0.0)
        for name in self._moments(group):
            values[name] = torch.zeros(mask.count, dtype=torch.float32, device=weight.device)
        masters = new_masters(weight, mask, self.master)
        if masters is not None:
            values["master"] = masters
        self._roundings.mark(parameter, masters)  # the masters are the weights
