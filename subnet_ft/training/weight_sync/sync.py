"""`sync_values_only`: a restricted TRL trainer sends its engine the trained weights only."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from subnet_ft.errors import WeightSyncError
from subnet_ft.masks import SubnetMask, canonical_name
from subnet_ft.optim.shards import is_sharded
from subnet_ft.training.mixin import SubnetTrainerMixin
from subnet_ft.training.weight_sync.message import Acknowledgement
from subnet_ft.training.weight_sync.receiver import ValuesReceiver
from subnet_ft.training.weight_sync.sender import Channel, ValuesSender, check_covers
from subnet_ft.training.weight_sync.vllm import VLLMChannel

logger = logging.getLogger(__name__)


def sync_values_only(trainer: Any, channel: Channel | None = None, *, mask: SubnetMask | None = None) -> ValuesSender:
    """Make every weight sync of a restricted trainer with `use_vllm=True` carry the trained weights only.

    TRL's own `sync_weights` still decides when, wakes the engine and resets its cache; what it iterates over and where
    it sends that are replaced on the trainer's `vllm_generation`. Call it after `restrict`, before `train()`.

    In server mode the values go through `channel`, by default a `VLLMChannel` of TRL's client. In colocate mode the
    engine of each process gets the tensors in which something is trained, whole, from the policy itself; where the
    policy is sharded, `channel` is a `ValuesReceiver` of that process with the dense base, so that only values are
    gathered.

    Args:
        trainer: What `restrict` returned.
        channel: The way to the engine's weights.
        mask: The weights that may change: the union of the masks of a schedule. `None`: those of the trainer's mask.

    Returns:
        The sender, whose `version` counts what the engine has verified.

    Raises:
        WeightSyncError: The trainer is not restricted, has no vLLM, or its channel does not go with its mode.
    """
    generation = getattr(trainer, "vllm_generation", None)
    if not isinstance(trainer, SubnetTrainerMixin) or generation is None:
        what = "generates without vLLM" if isinstance(trainer, SubnetTrainerMixin) else "is not restricted to a mask"
        raise WeightSyncError(
            f"`{type(trainer).__name__}` {what}. Build it with `use_vllm=True`, call `restrict`, then this."
        )
    if generation.mode == "colocate" and channel is not None and not isinstance(channel, ValuesReceiver):
        raise WeightSyncError(
            f"In colocate mode the engine lives in this process, so the channel is a `ValuesReceiver`, not a "
            f"{type(channel).__name__}. Leave `channel` out unless FSDP2 shards the policy."
        )
    sender = ValuesSender(generation.model, trainer.subnet_mask if mask is None else mask)
    sync = _ServerSync if generation.mode == "server" else _ColocateSync
    sync(trainer, generation, sender, channel).install()
    return sender


class _Sync(ABC):
    """What both modes share: the seams of TRL's `VLLMGeneration`, and one answer for all processes."""

    def __init__(self, trainer: Any, generation: Any, sender: ValuesSender, channel: Channel | None) -> None:
        self.trainer, self.generation, self.sender, self.channel = trainer, generation, sender, channel
        self.all_params = generation._iter_named_params

    def install(self) -> None:
        self.generation._iter_named_params = self.iterate

    @abstractmethod
    def iterate(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what TRL hands to the engine."""

    def check_mask(self) -> None:
        """Refuse a mask that trains more than what is sent; there is no optimizer before training."""
        if self.trainer._masked is not None:
            check_covers(self.sender.mask, self.trainer._masked.mask)

    def is_sharded(self) -> bool:
        return any(is_sharded(parameter) for parameter in self.generation.model.parameters())


class _ServerSync(_Sync):
    """The main process pushes; the others take part in gathering what is sharded, and learn how it went."""

    def install(self) -> None:
        super().install()
        # TRL walks the parameters once to announce them, unless it did before: nothing is announced.
        self.generation._weight_metadata = []
        if self.trainer.accelerator.is_main_process:
            client = self.generation.vllm_client
            if self.channel is None:
                self.channel = VLLMChannel(client)
            client.update_named_params = self.drain

    def drain(self, metadata: Any, named_params: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take the place of TRL's dense sync: nothing is left to send when the iterator ends."""
        for _ in named_params:
            pass

    def iterate(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Push, together in all processes, and yield nothing."""
        self.check_mask()
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            assert self.channel is not None
            self.sender.push(self.channel)
        else:
            self._push_together(accelerator.is_main_process, accelerator.device)
        logger.info("the engine has version %s of the weights", self.sender.version)
        yield from ()

    def _push_together(self, is_main: bool, device: torch.device) -> None:
        if self.sender.version is None:
            opening = self.sender.open()
            self._all_learn(lambda channel: channel.open(opening), is_main, device)
        update = self.sender.update() if is_main or self.is_sharded() else None
        self._all_learn(lambda channel: channel.update(update), is_main, device)

    def _all_learn(self, send: Any, is_main: bool, device: torch.device) -> None:
        """Send from the main process, and end the same way in all."""
        failure: WeightSyncError | None = None
        version = torch.tensor([-1], device=device)
        if is_main:
            try:
                acknowledgement: Acknowledgement = send(self.channel)
                self.sender.acknowledge(acknowledgement)
                version.fill_(acknowledgement.version)
            except WeightSyncError as error:
                failure = error
        dist.broadcast(version, 0)
        if failure is not None:
            raise failure
        if int(version) < 0:
            raise WeightSyncError("The engine did not take the weights of the main process, which says why.")
        if not is_main:
            self.sender.version = int(version)


class _ColocateSync(_Sync):
    """Every process loads its own engine; TRL's loop hands over what is iterated."""

    def iterate(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what changed, or everything where a sleeping engine has dropped its weights."""
        self.check_mask()
        if self.channel is None and self.is_sharded():
            raise WeightSyncError(
                "The policy is sharded, and whole tensors would be gathered for the engine. Pass `sync_values_only` a "
                "`ValuesReceiver` over the dense base of this process, or leave it out for TRL's dense sync."
            )
        trained = {name for name, tensor in self.sender.mask.tensors.items() if tensor.count}
        is_whole = bool(self.generation.enable_sleep_mode)
        if self.channel is None:
            for name, tensor in self.all_params():
                if is_whole or canonical_name(name) in trained:
                    yield name, tensor
            return
        assert isinstance(self.channel, ValuesReceiver)
        self.sender.push(self.channel)
        for name, tensor in self.channel.tensors.items():
            if is_whole or name in trained:
                yield name, tensor
