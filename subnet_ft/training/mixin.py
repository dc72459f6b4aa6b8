"""`SubnetTrainerMixin`: what a trainer does differently when it trains a subnetwork."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from subnet_ft.checkpoints.listing import listing
from subnet_ft.errors import TrainerError
from subnet_ft.masks import SubnetMask, by_canonical_name
from subnet_ft.optim import prepare_ddp
from subnet_ft.optim.parameters import check_base_weights
from subnet_ft.optim.shards import is_sharded
from subnet_ft.training.audit import FrozenWeightAudit
from subnet_ft.training.build_optimizer import build_optimizer
from subnet_ft.training.checkpoint_mixin import CheckpointMixin
from subnet_ft.training.delta_checkpoints import DeltaCheckpoints
from subnet_ft.training.free_reference import take_reference_from_policy
from subnet_ft.training.options import SubnetOptions, check, compacts, is_replicated, loads_later
from subnet_ft.training.processes_check import check_wrapped

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class SubnetTrainerMixin(CheckpointMixin):
    """Put it before a trainer class, and that trainer trains only the weights of a mask.

    The trainer's own arguments set the hyper-parameters. Clipping goes by the masked gradient, `grad_norm` in the logs
    is the norm used, checkpoints are whole or not there, and a resumed run ends with the bits of one that was never
    interrupted. `restrict` does the same to a trainer that exists.

    Args:
        args, kwargs: What the trainer class takes.
        subnet_mask: Which weights to train.
        subnet_options: Keywords of `restrict`.

    Raises:
        MaskMismatchError: The mask belongs to another model, or to another base.
        TrainerError: The trainer is set up in a way that a masked optimizer cannot serve.

    Example:
        `class SubnetDPOTrainer(SubnetTrainerMixin, DPOTrainer): ...`, then
        `SubnetDPOTrainer(model, args=args, train_dataset=pairs, subnet_mask=mask).train()`
    """

    def __init__(
        self, *args: Any, subnet_mask: SubnetMask, subnet_options: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        options = SubnetOptions(**(subnet_options or {}))
        check(self, subnet_mask, options)
        if options.free_reference:
            take_reference_from_policy(self, subnet_mask)
        self._begin_subnet(subnet_mask, options)

    def _begin_subnet(self, mask: SubnetMask, options: SubnetOptions) -> None:
        """Remember what was checked; nothing of the model changes before training starts."""
        self.subnet_mask = mask
        self.subnet_options = options
        self._own_model = self.model
        self._masked = None
        self._only_delta = DeltaCheckpoints(self._own_model, mask) if options.save_only_delta else None
        if options.audit_steps is not None:
            self.add_callback(FrozenWeightAudit(options.audit_steps))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the masked optimizer, unless this trainer has trained before."""
        if self.model is not self._own_model:
            raise TrainerError(
                "The trainer got another model after `restrict`, which would stay untrained. Give the trainer its "
                "model first, and call `restrict` last."
            )
        if self.state.global_step == 0:
            self._check_schedule_starts()
        if self._masked is not None and self.optimizer is not None:
            # The trainer itself may have loaded other weights at the end of its last run: the best ones.
            self._masked.adopt_weights()
        if self._masked is not None:
            # A run that was broken off leaves the gradients of its last micro-batches; the trainer drops only `.grad`.
            self._masked.zero_grad()
        if self.optimizer is None:
            # Built when training starts, because other tools replace parameter objects before that. A resumed run
            # already holds trained weights then, so the base was checked before.
            if self._masked is not None:
                self._masked.release()  # the trainer dropped it, as a retry with smaller batches does
            target: Any = self._own_model if model is None else model
            if is_replicated(self) and compacts(self, self.subnet_options):
                prepare_ddp(target)
            self._masked = build_optimizer(self, target, self.subnet_mask, self.subnet_options)
            self.optimizer = self._masked
        # A second `train()` finds the optimizer of the first in the wrapper that accelerate put around it.
        elif self._masked is None or getattr(self.optimizer, "optimizer", self.optimizer) is not self._masked:
            raise TrainerError(
                f"The trainer got an optimizer, {type(self.optimizer).__name__}, after `restrict`, which builds its "
                "own. Do not set `trainer.optimizer`."
            )
        return self.optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Create the schedule; by now the model is sharded, and the optimizer takes the parameters that will train."""
        self._meet_parameters()
        return super().create_scheduler(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the trainer does, with both norms if asked for, steps left out, and what the audits cost."""
        if "grad_norm" in logs and self.subnet_options.log_norms:
            logs = {**logs, **{f"grad_norm_{kind}": float(norm) for kind, norm in self._norms.items()}}
        if self._masked is not None and self._masked.num_skipped_steps:
            logs = {**logs, "skipped_steps": self._masked.num_skipped_steps}
        if "train_runtime" in logs:
            for audit in self._callbacks(FrozenWeightAudit):
                logs = {**logs, "audits": audit.num_audits, "audit_seconds": round(audit.seconds, 3)}
        super().log(logs, *args, **kwargs)

    def _meet_parameters(self) -> None:
        if self._masked is None:
            return
        parameters = by_canonical_name(self._own_model.named_parameters())
        sharded = [name for name, parameter in parameters.items() if is_sharded(parameter)]
        if self.is_fsdp_enabled and not sharded:
            raise TrainerError(
                "FSDP2 has sharded nothing of the model that the trainer was restricted with. Restrict the trainer "
                "last, and let it shard the model itself."
            )
        if sharded and not any(self._masked.state.values()):
            self._masked.rebind(parameters.items())
            if loads_later(self):
                check_base_weights(parameters, self.subnet_mask)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        return self.masked_optimizer.clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
        optimizer = self.masked_optimizer
        if not optimizer.state:
            check_wrapped(self)
        missing, total = (
            optimizer.names_without_gradient(),
            sum(len(group["params"]) for group in optimizer.param_groups),
        )
        if missing and not optimizer.state:
            logger.warning(
                "%d of the %d tensors that the mask trains got no gradient in the first step: %s",
                *(len(missing), total, listing(missing)),
            )
        if len(missing) == total:
            raise TrainerError(
                "No gradient reached any tensor of the mask in this step, so nothing would be trained. Under "
                "re-entrant activation checkpointing the embeddings must train, or call "
                "`model.enable_input_require_grads()`; otherwise look at how the loss is computed."
            )
        if self.subnet_options.log_norms:
            self._norms = optimizer.grad_norms()
        return optimizer.grad_norm() if grad_norm is None else grad_norm
