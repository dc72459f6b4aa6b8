"""`PRIMETrainer`: GRPO's rollouts with PRIME's advantages, from a reward model that learns beside the policy."""

from __future__ import annotations

import copy
import math
import textwrap
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from transformers import TrainerCallback
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import create_model_from_path

from subnet_ft.errors import TaskError, TrainerError
from subnet_ft.masks import SubnetMask, canonical_name
from subnet_ft.optim import MaskedAdamW
from subnet_ft.training.base_of import BaseOf, base_of
from subnet_ft.training.options import Stateful
from subnet_ft.training.prime.advantages import outcome_loss, pair_accuracy, prime_advantages, within_accuracy
from subnet_ft.training.prime.config import PRIMEConfig
from subnet_ft.training.prime.reward_model import Completions, ImplicitRewardModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOLERANCE = 1e-6
"""How far a weighted sum of rewards may lie outside [0, 1] by rounding."""


class PRIMETrainer(GRPOTrainer):
    """Trains a policy on outcome rewards and on implicit process rewards, as PRIME does.

    Every generation batch: prompts of medium difficulty are kept; the implicit reward model learns from their outcomes
    and scores their tokens (`prm_update` says which comes first); the advantages (B, T) combine both rewards. A prompt
    that is left out teaches neither policy nor reward model: its completions are masked out of the loss, as TRL does
    with truncated ones under `mask_truncated_completions`. If none is kept, the gradient of the step is zero.

    A completion that was cut off counts with the outcome its reward function gives it, and with process rewards up to
    its last token; under `mask_truncated_completions` it is out of everything, its group's baselines and accuracy
    included. So is one for which every reward function returned `None`.

    The outcome is the weighted sum of the reward functions and must lie in [0, 1]. The reward model and its reference
    start from the policy as it is given to the constructor; together they take its memory twice, and the optimizer's
    state comes on top. Of a policy with an adapter (PEFT) it is the base, whatever the adapter starts as: the reward
    model is a copy of it, trained whole, and the reference is the policy with its adapter switched off, which takes no
    memory.

    Logged beside GRPO's metrics: `prime/prm_loss` and `prime/prm_accuracy` (share of a prompt's pairs in right order),
    both on completions that the reward model has not learned from yet; `prime/process_reward` and `prime/advantage`,
    means per token; `prime/filtered`, the share of prompts left out.

    `restrict(trainer, mask)` trains a subnetwork of the policy, and puts the reward model and its optimizer into every
    checkpoint. Without it checkpoints hold the policy alone, and such a trainer refuses to resume.

    Args:
        model: The policy: a model, one with an adapter, or a path or Hub id.
        reward_funcs: As in `GRPOTrainer`.
        args: The options.
        reward_model: Another start of the implicit reward model, in memory, with the policy's vocabulary; it is trained
            in place. The reference stays the policy's start.
        reward_mask: Which weights of the reward model to train; `None` for those that `prm_trains` says.
        kwargs: As in `GRPOTrainer`.

    Raises:
        MaskMismatchError: `reward_mask` belongs to another model, or to another base.
        TrainerError: PRIME cannot work with this setup.

    Source: Cui et al. 2025, "Process Reinforcement through Implicit Rewards" (arXiv 2502.01456), Algorithm 1.
    """

    _tag_names = ["trl", "prime"]  # noqa: RUF012 - TRL reads it and never writes
    _name = "PRIME"
    _paper = {  # noqa: RUF012 - the same
        "title": "Process Reinforcement through Implicit Rewards",
        "id": "2502.01456",
        "citation": textwrap.dedent("""\
            @article{cui2025process,
                title        = {{Process Reinforcement through Implicit Rewards}},
                author       = {Ganqu Cui and Lifan Yuan and others},
                year         = 2025,
                eprint       = {arXiv:2502.01456},
            }"""),
    }

    args: PRIMEConfig
    ref_model: Any
    """What the policy started as; `None` where that is computed by the policy itself, with its adapter switched off."""

    _rewards_per_func: torch.Tensor
    """(B, F) float32, of the completions that were sampled last."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: PRIMEConfig | None = None,
        *,
        reward_model: PreTrainedModel | None = None,
        reward_mask: SubnetMask | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, PRIMEConfig):
            raise TrainerError(f"`args` must be a `PRIMEConfig`, got {type(args).__name__}. It takes GRPO's fields.")
        # Copied before TRL patches the policy's forward, which a copy would share with it.
        start: Any = None if reward_model is not None and is_peft_model(model) else _copy_of(model, args)
        super().__init__(model, reward_funcs, args, **kwargs)
        self._refuse()
        device = self.accelerator.device
        policy: Any = self.model
        reference: Any
        if is_peft_model(policy):
            self.ref_model, reference = None, BaseOf(policy)
            self.reward_model: Any = start if reward_model is None else reward_model
        else:
            self.ref_model, reference = start.to(device).eval().requires_grad_(False), self._ask_reference
            self.reward_model = copy.deepcopy(start) if reward_model is None else reward_model
        self.reward_model.to(device)
        self._follows = args.prm_trains == "subnet"
        if self._follows and (reward_mask is not None or is_peft_model(policy)):
            raise TrainerError(
                "`prm_trains: subnet` gives the reward model the mask of the policy, and here "
                + ("`reward_mask` names another one." if reward_mask is not None else "that is a mask of an adapter.")
                + " Set `prm_trains` to `full`."
            )
        self.reward_optimizer = MaskedAdamW(
            self.reward_model.named_parameters(),
            _full_mask(self.reward_model) if reward_mask is None else reward_mask,
            lr=args.prm_learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.prm_weight_decay,
            max_grad_norm=args.prm_max_grad_norm,
        )
        self._prm = ImplicitRewardModel(
            self.reward_model,
            reference,
            self.reward_optimizer,
            beta=args.prm_beta,
            micro_batch_size=args.per_device_train_batch_size,
            autocast=self.accelerator.autocast,
        )
        self.add_callback(_Start(self))

    def checkpoint_extras(self) -> dict[str, Stateful]:
        """Return what is trained beside the policy, for checkpoints of a restricted trainer."""
        self.mask_reward_model()  # before its optimizer's state is loaded, which belongs to a mask
        # In this order they are loaded: masters belong to weights that are there.
        return {"reward_model": self.reward_model, "reward_optimizer": self.reward_optimizer}

    def mask_reward_model(self) -> None:
        """Give the reward model the mask of the policy, if it is to have it and has not yet.

        Raises:
            TrainerError: The policy has no mask.
            MaskMismatchError: The reward model is of another architecture.
        """
        if not self._follows:
            return
        subnet_mask = getattr(self, "subnet_mask", None)
        if subnet_mask is None:
            raise TrainerError(
                "`prm_trains: subnet` gives the reward model the mask of the policy, which has none. Call "
                "`restrict(trainer, mask)` before `train()`, or set `prm_trains` to `full`."
            )
        # The tensors alone: a reward model that was passed may have started elsewhere than the mask's base.
        self.reward_optimizer.set_mask(SubnetMask(subnet_mask.tensors))
        self._follows = False

    def _ask_reference(self, **inputs: Any) -> Any:
        """Return what `ref_model` does, whatever it has been replaced by since the trainer was built."""
        return self.ref_model(**inputs)

    @property
    def _is_training(self) -> bool:
        policy: Any = self.model
        return bool(policy.training)

    @property
    def _group_size(self) -> int:
        size: Any = self.num_generations if self._is_training else self.num_generations_eval
        return int(size)

    def _refuse(self) -> None:
        if self.args.world_size > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise TrainerError(
                f"This release trains PRIME's reward model on one process, and here are {self.args.world_size} "
                "(or DeepSpeed, or FSDP). Start one process."
            )
        if self._is_vlm:
            raise TrainerError("PRIME's reward model reads text only. Pass a tokenizer and prompts without images.")

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        # What TRL returns with a batch are advantages, from which outcomes cannot be read back.
        self._rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mask = batch["completion_mask"].bool()
        if "tool_mask" in batch:
            mask = mask & batch["tool_mask"].bool()
        outcomes = self._outcomes()
        is_kept = within_accuracy(
            outcomes,
            mask.any(dim=1) & ~outcomes.isnan(),
            group_size=self._group_size,
            low=self.args.accuracy_low,
            high=self.args.accuracy_high,
        )
        completions = Completions(
            ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            mask=mask,
        )
        rewards = torch.zeros(mask.shape, device=mask.device)
        seen = torch.zeros_like(rewards)
        if is_kept.any():
            seen[is_kept], rewards[is_kept] = self._process_rewards(completions[is_kept], outcomes[is_kept])
        advantages = prime_advantages(
            rewards,
            outcomes,
            mask,
            is_kept,
            group_size=self._group_size,
            gamma=self.args.gamma,
            outcome_coef=self.args.outcome_coef,
            process_coef=self.args.process_coef,
        )
        self._note(seen, rewards, advantages, outcomes, mask, is_kept)
        # Every loss type leaves out what the completion mask does, and "dapo" divides by this number of tokens.
        batch["completion_mask"] = batch["completion_mask"] * is_kept.unsqueeze(1)
        batch["num_items_in_batch"] = (mask & is_kept.unsqueeze(1)).sum()
        batch["advantages"] = advantages
        return batch

    def _process_rewards(self, completions: Completions, outcomes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return process rewards (B, T) of completions not learned from yet, and those for the advantages."""
        if not self._is_training:
            seen = self._prm.score(completions)
            return seen, seen
        batch_size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        seen = self._prm.update(completions, outcomes, batch_size=batch_size)
        return seen, self._prm.score(completions) if self.args.prm_update == "before" else seen

    def _outcomes(self) -> torch.Tensor:
        """Return the outcomes (B,) float32 in [0, 1] of the last completions; NaN where no function gave a reward."""
        rewards = self._rewards_per_func
        outcomes = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        outcomes = outcomes.masked_fill(rewards.isnan().all(dim=1), torch.nan)
        outside = (outcomes < -_TOLERANCE) | (outcomes > 1 + _TOLERANCE)
        if outside.any():
            raise TaskError(
                f"PRIME's outcome, the weighted sum of {', '.join(self.reward_func_names)}, must lie in [0, 1] (1 for "
                f"a right completion, 0 for a wrong one), got {outcomes[outside][0]:g}. Rescale the reward functions, "
                f"or set `reward_weights` (now {self.reward_weights.tolist()})."
            )
        return outcomes.clamp(0, 1)

    def _note(
        self,
        seen: torch.Tensor,
        rewards: torch.Tensor,
        advantages: torch.Tensor,
        outcomes: torch.Tensor,
        mask: torch.Tensor,
        is_kept: torch.Tensor,
    ) -> None:
        """Put the numbers of this batch into TRL's log; loss and accuracy are those on completions not yet seen."""
        metrics = self._metrics["train" if self._is_training else "eval"]
        groups = is_kept.view(-1, self._group_size).any(dim=1)
        metrics["prime/filtered"].append(1 - groups.float().mean().item())
        if is_kept.any():
            tokens = mask & is_kept.unsqueeze(1)
            metrics["prime/prm_loss"].append(outcome_loss(seen[is_kept], outcomes[is_kept]).mean().item())
            accuracy = pair_accuracy(seen.sum(dim=1), outcomes, is_kept, group_size=self._group_size)
            if not math.isnan(accuracy):
                metrics["prime/prm_accuracy"].append(accuracy)
            metrics["prime/process_reward"].append(rewards[tokens].mean().item())
            metrics["prime/advantage"].append(advantages[tokens].mean().item())
        # TRL has put its own advantages into the table of completions.
        table: Any = self._logs["advantages"]
        for _ in range(min(len(table), len(mask))):
            table.pop()
        table.extend((advantages.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).tolist())


class _Start(TrainerCallback):
    """Masks a reward model that follows the policy, and refuses to go on from a checkpoint that does not hold it."""

    def __init__(self, trainer: PRIMETrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and not hasattr(self._trainer, "subnet_mask"):
            raise TrainerError(
                f"This run was resumed at step {state.global_step}, and checkpoints of a trainer without `restrict` "
                "do not hold PRIME's reward model. Start anew after `restrict(trainer, mask)`; a full mask, "
                "`SubnetMask.full`, trains everything."
            )
        self._trainer.mask_reward_model()


def _copy_of(model: str | PreTrainedModel, args: PRIMEConfig) -> Any:
    """Return a copy of the policy as it starts, without its adapter; one by name is loaded as TRL does."""
    if isinstance(model, str):
        options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
        options.update(args.model_init_kwargs or {})  # type: ignore[arg-type]  # TRL has made it a dict
        return create_model_from_path(model, **options)
    if is_peft_model(model):
        policy: Any = model
        return base_of(policy)
    return copy.deepcopy(model)


def _full_mask(model: torch.nn.Module) -> SubnetMask:
    return SubnetMask.full({canonical_name(name): tuple(value.shape) for name, value in model.named_parameters()})
