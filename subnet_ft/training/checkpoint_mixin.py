"""`CheckpointMixin`: checkpoints that are whole or not there, and resuming to the bits of an uninterrupted run."""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.errors import CheckpointError, OptimizerStateError, TrainerError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedBase
from subnet_ft.optim.frozen import frozen_fingerprints, weights_digest
from subnet_ft.training.delta_checkpoints import DeltaCheckpoints, holds_delta
from subnet_ft.training.mask_schedule import MaskSchedule
from subnet_ft.training.options import Stateful, SubnetOptions, loads_later
from subnet_ft.training.resume import newest_complete, problems, read_manifest, replayed, trained_epochs
from subnet_ft.training.saving import clear_staging, publish, rotate, staging_folder
from subnet_ft.training.sharded_checkpoints import is_in_parts, load_model_weights, load_optimizer, save_optimizer
from subnet_ft.training.sidecar import (
    completions_are_used_up,
    load_extras,
    load_rollouts,
    load_start,
    save_extras,
    save_rollouts,
    save_start,
)

if TYPE_CHECKING:
    from transformers import Trainer
    from transformers.trainer_utils import TrainOutput

    _Base = Trainer
else:
    _Base = object


logger = logging.getLogger(__name__)


class CheckpointMixin(_Base):
    """The half of `SubnetTrainerMixin` that saves and resumes."""

    subnet_mask: SubnetMask
    """The mask that training starts with."""

    subnet_options: SubnetOptions
    """What the trainer was restricted with."""

    _own_model: Any
    _masked: MaskedBase | None
    _only_delta: DeltaCheckpoints | None
    _staging: Path | None = None
    _finished_epochs = 0
    _start: torch.Tensor
    """Torch's random state when training began, from which samplers draw their seeds."""

    @property
    def masked_optimizer(self) -> MaskedBase:
        """The masked optimizer; it exists from the start of training on.

        Raises:
            TrainerError: Training has not started.
        """
        if self._masked is None:
            raise TrainerError(
                "There is no masked optimizer yet: `create_optimizer` builds it when `train()` starts. A subclass that "
                "overrides `create_optimizer` must call `super().create_optimizer()`."
            )
        return self._masked

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as the trainer does; resume only from a checkpoint that is whole and belongs to mask and base.

        Args:
            resume_from_checkpoint: A checkpoint, or True for the newest one in `output_dir` that is whole.
            args, kwargs: Passed on.

        Raises:
            CheckpointError: The checkpoint is not whole, or there is none.
            OptimizerStateError: It belongs to another mask or another base; the model was not touched.
        """
        self._finished_epochs = 0
        if self._only_delta is not None and self._callbacks(MaskSchedule):
            raise TrainerError(
                "`save_only_delta=True` writes deltas of one mask, and a `MaskSchedule` changes it. Leave one of them "
                "out."
            )
        if not resume_from_checkpoint:
            self._start = torch.get_rng_state()
            self._warn_of_earlier_runs()
            return super().train(None, *args, **kwargs)
        if isinstance(resume_from_checkpoint, bool):
            checkpoint = self._newest()
            manifest = read_manifest(checkpoint, is_whole=True)
        else:
            checkpoint = Path(resume_from_checkpoint)
            manifest = read_manifest(checkpoint)
        self._check_origin(checkpoint, manifest)
        self._finished_epochs = trained_epochs(checkpoint)
        # The order of the data comes from here; what was drawn before `train` must not change it.
        self._start = load_start(self, checkpoint)
        torch.set_rng_state(self._start)
        if self.args.ignore_data_skip:
            logger.warning("`ignore_data_skip` is on: this run sees other data than one that was not interrupted")
        return super().train(str(checkpoint), *args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return replayed(super()._get_train_sampler(*args, **kwargs), self._finished_epochs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        if self._only_delta is None or self._staging is None or output_dir is None:
            super()._save(output_dir, *args, **kwargs)
        elif self.args.should_save:
            from transformers.trainer import TRAINING_ARGS_NAME

            folder, model = Path(output_dir), self._own_model
            folder.mkdir(parents=True, exist_ok=True)
            self._only_delta.write(model, folder, step=self.state.global_step)
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            for part in (getattr(model, "config", None), getattr(model, "generation_config", None), tokenizer):
                if part is not None:
                    part.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # pushed once it is in its place
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Let the trainer write its checkpoint aside, add what it does not know, and move the whole into place."""
        run_folder = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            clear_staging(run_folder)
        self.accelerator.wait_for_everyone()
        self._staging = staging_folder(run_folder)
        written = self._staging / name
        try:
            super()._save_checkpoint(model, trial)
            written.mkdir(parents=True, exist_ok=True)  # by the processes that had nothing to save so far
            save_rollouts(self, written)
            save_start(self._start, self, written)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        moved = self.state.best_model_checkpoint == str(written)
        if moved:  # in every process: all load it at the end
            self.state.best_model_checkpoint = str(run_folder / name)
        # Where processes hold parts of the weights, all of them have to look.
        facts = self._facts() if self.args.should_save or self.is_fsdp_enabled else {}
        if self.args.should_save:
            save_extras(self._extras(), written)
            if moved:
                self.state.save_to_json(str(written / "trainer_state.json"))
            publish(written, run_folder / name, facts)
            rotate(
                run_folder,
                newest=run_folder / name,
                limit=self.args.save_total_limit,
                best=self.state.best_model_checkpoint,
                max_bytes=self.subnet_options.save_total_bytes,
            )
            clear_staging(run_folder)
            if self.args.push_to_hub:
                super()._push_from_checkpoint(str(run_folder / name))
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            save_optimizer(self, Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            step = self.state.global_step
            self.masked_optimizer.start_over(self._mask_at(step), earlier=[self._trained_so_far(step)])
        if checkpoint is not None and (self.is_fsdp_enabled or is_in_parts(Path(checkpoint))):
            load_optimizer(self, Path(checkpoint))
            self._complete_weights(Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            wrote = read_manifest(Path(checkpoint), is_whole=True)["num_processes"]
            load_rollouts(self, Path(checkpoint), same_processes=wrote == self.args.world_size)
            load_extras(self._extras(), Path(checkpoint))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # a finished run was resumed, and would take one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]  # upstream has no types here

    def _check_schedule_starts(self) -> None:
        first = self._mask_at(0)
        if self._masked is not None and self._masked.mask.fingerprint != first.fingerprint:
            raise TrainerError(
                f"The trainer has trained before and ended under mask {self._masked.mask.fingerprint[:16]}; its "
                f"schedule starts with {first.fingerprint[:16]}. Build a new trainer, or resume from a checkpoint."
            )

    def _newest(self) -> Path:
        run_folder = Path(super()._get_output_dir(None))
        found = newest_complete(run_folder)
        if found is None:
            raise CheckpointError(
                f"`{run_folder}` holds nothing to resume from: {problems(run_folder)}. Call `train()` to start anew."
            )
        return found

    def _warn_of_earlier_runs(self) -> None:
        run_folder = Path(super()._get_output_dir(None))
        if self.args.should_save and self.args.save_strategy != "no" and any(run_folder.glob("checkpoint-*")):
            logger.warning(
                "`%s` holds checkpoints of an earlier run, and `resume_from_checkpoint=True` takes the newest of all. "
                "Choose another `output_dir`, or remove them",
                run_folder,
            )

    def _check_origin(self, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another mask or base before anything of it is loaded."""
        step, mask = manifest["global_step"], self._mask_at(manifest["global_step"])
        if manifest["mask_fingerprint"] != mask.fingerprint:
            raise OptimizerStateError(
                f"`{checkpoint}` was trained under mask {manifest['mask_fingerprint'][:16]}, this trainer has "
                f"{mask.fingerprint[:16]} at step {step}. Resume with the mask that the run was started with."
            )
        if manifest["num_processes"] != self.args.world_size:
            counts = f"{manifest['num_processes']} processes wrote `{checkpoint}`, {self.args.world_size} would go on"
            if hasattr(self, "_buffered_inputs") and not completions_are_used_up(checkpoint):
                raise TrainerError(
                    f"{counts}, and the completions in use belong to each. Start as many as before, or resume from a "
                    "checkpoint at whose step all completions are used up."
                )
            logger.warning("%s: not with the bits of a run that was not interrupted", counts)
        if self._only_delta is not None and holds_delta(checkpoint):
            self._only_delta.check_base(checkpoint)
        # Weights that this process trained under later masks are no longer the base's.
        if self._masked is not None and self._masked.mask.fingerprint != mask.fingerprint:
            return
        if loads_later(self):  # only one process has the weights so far; the optimizer's state is checked with them
            return
        now = frozen_fingerprints(self._own_model, self._trained_so_far(step))
        other = [name for name, found in now.items() if manifest["base_fingerprints"].get(name) != found]
        if other:
            raise OptimizerStateError(
                f"`{checkpoint}` was trained from another base: outside the mask, `{other[0]}` has fingerprint "
                f"{now[other[0]]} in this model and {manifest['base_fingerprints'].get(other[0])} there "
                f"({len(other)} tensors differ). Resume with the base that the run was started from."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        checkpoint = Path(resume_from_checkpoint)
        if is_in_parts(checkpoint):  # loaded with the optimizer's state
            return
        if self.is_fsdp_enabled or holds_delta(checkpoint):
            load_model_weights(self._own_model, checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        self._complete_weights(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and (self.is_fsdp_enabled or is_in_parts(Path(best)) or holds_delta(Path(best))):
            load_model_weights(self._own_model, Path(best))
        else:
            super()._load_best_model()
        if best is not None:
            self._complete_weights(Path(best))

    def _complete_weights(self, checkpoint: Path) -> None:
        """See to it that the model has the weights that it had when the checkpoint was written.

        transformers 5.24 loads by the names in memory, and passes over weights that lie in the file under others, such
        as the experts of a mixture.
        """
        expected = read_manifest(checkpoint, is_whole=True)["weights"]
        if weights_digest(self._own_model) == expected:
            return
        if holds_delta(checkpoint):
            raise CheckpointError(
                f"The delta of `{checkpoint}` does not give back the weights that were saved: outside its values the "
                "model is not the base that it was made from. Load that base before `restrict`."
            )
        lost = CheckpointError(
            f"Loading `{checkpoint}` does not give back the weights that it was saved with. The model's "
            "`save_pretrained` leaves some of them out; restrict the trainer to a mask of those that it saves."
        )
        try:
            load_model_weights(self._own_model, checkpoint)
        except CheckpointError as error:
            raise lost from error
        if weights_digest(self._own_model) != expected:
            raise lost

    def _facts(self) -> dict[str, Any]:
        step = self.state.global_step
        return {
            "global_step": step,
            "num_processes": self.args.world_size,
            "mask_fingerprint": self.masked_optimizer.mask.fingerprint,
            "base_fingerprints": frozen_fingerprints(self._own_model, self._trained_so_far(step)),
            "weights": weights_digest(self._own_model),
        }

    def _trained_so_far(self, step: int) -> SubnetMask:
        """Return the mask of everything that was trained before a step: outside it, weights are the base's."""
        masks = [self.subnet_mask]
        for schedule in self._callbacks(MaskSchedule):
            masks += [mask for start, mask in schedule.masks.items() if start <= step]
        return functools.reduce(operator.or_, masks)

    def _mask_at(self, step: int) -> SubnetMask:
        due = [mask for schedule in self._callbacks(MaskSchedule) if (mask := schedule.mask_at(step)) is not None]
        return due[-1] if due else self.subnet_mask

    def _extras(self) -> dict[str, Stateful]:
        extras = dict(self.subnet_options.extras)
        own = getattr(self, "checkpoint_extras", None)  # of a trainer that trains more than its model, such as PPO
        if own is not None:
            extras.update(own())
        reference = getattr(self, "ref_model", None)
        if reference is not None and getattr(self.args, "sync_ref_model", False):
            extras["ref_model"] = self.accelerator.unwrap_model(reference)  # it moves along with the policy
        return extras

    def _callbacks(self, kind: type) -> list[Any]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, kind)]
