"""`PPOTrainer`: TRL's GRPO trainer with a value model in the place of the group's baseline."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import ProcessorMixin
from trl.trainer.grpo_trainer import GRPOTrainer

from subnet_ft.errors import TrainerError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW
from subnet_ft.training.base_of import BaseOf
from subnet_ft.training.ppo.config import PPOConfig
from subnet_ft.training.ppo.functions import (
    aggregate,
    explained_variance,
    gae,
    last_tokens,
    masked_mean,
    per_token_rewards,
    value_loss,
    whiten,
)
from subnet_ft.training.ppo.value_model import ValueModel, value_mask_like
from subnet_ft.training.ppo.value_steps import ValueSteps


class PPOTrainer(GRPOTrainer):
    """PPO: completions are sampled, clipped and iterated over as in GRPO; advantages are per token, from a value model.

    The score of a completion, the sum of its weighted rewards, is paid at its last token, also where it was cut off;
    every token pays for KL to the reference. A completion that no reward function scored is left out of everything.
    One backward pass serves policy and value model; each has its optimizer, and both step or neither.

    The policy may be a model with an adapter (PEFT). The reference is then its base, computed with the adapter switched
    off: no weights more, and where the adapter starts is not where the base is (prompt tuning, an adapter trained
    before), that distance costs from the first step on. The value model starts from the base, has no adapter, and is
    trained whole.

    Logged beside GRPO's metrics: `value/loss`, `value/clip_ratio`, `value/explained_variance`, `value/mean_return`,
    `value/grad_norm` and, with a reference, `kl`: per token of the completions, as it enters the reward. The column
    `advantage` of `log_completions` stays GRPO's, which nothing here uses.

    Args:
        args, kwargs: What `GRPOTrainer` takes; its `args` is a `PPOConfig`.
        value_model: Trained in place of the default, which starts from the policy's own weights.
        value_mask: Which weights of the value model to train, under the names it has there; `None` trains those that
            `value_trains` says.

    Raises:
        TrainerError: The trainer is set up in a way that PPO here does not support.
        MaskMismatchError: `value_mask` belongs to another model.

    Source: Schulman et al. 2017 (arXiv 1707.06347).
    """

    # For the model card.
    _name = "PPO"
    _tag_names = ["trl", "ppo"]  # noqa: RUF012  # declared as TRL declares it
    _paper = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}  # noqa: RUF012  # the same

    model: Any
    ref_model: Any
    max_completion_length: Any
    args: PPOConfig

    def __init__(
        self,
        *args: Any,
        value_model: ValueModel | None = None,
        value_mask: SubnetMask | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._check()
        policy = self.model
        self._follows = self.args.value_trains == "subnet"
        if self._follows and (value_mask is not None or is_peft_model(policy)):
            raise TrainerError(
                "`value_trains: subnet` gives the value model the mask of the policy, and here "
                + ("`value_mask` names another one." if value_mask is not None else "that is a mask of an adapter.")
                + " Set `value_trains` to `full`."
            )
        self.value_model = (ValueModel(policy) if value_model is None else value_model).to(self.args.device)
        if value_mask is None:
            value_mask = SubnetMask.full({n: tuple(p.shape) for n, p in self.value_model.named_parameters()})
        self.value_mask = value_mask
        self.value_optimizer = MaskedAdamW(
            self.value_model.named_parameters(),
            value_mask,
            lr=self.args.value_learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            max_grad_norm=self.args.value_max_grad_norm,
            nonfinite="ignore",  # `ValueSteps` looks, before the policy steps
        )
        if self.args.kl_coef > 0 and not is_peft_model(policy):
            self.ref_model = self._frozen_copy(policy)
        self._scores: torch.Tensor
        self.add_callback(ValueSteps(self))

    def checkpoint_extras(self) -> dict[str, Any]:
        """Return what is trained beside the policy, by name, for the checkpoints of a restricted trainer."""
        self.mask_value_model()  # before its state is loaded, which belongs to a mask
        return {"value_model": self.value_model, "value_optimizer": self.value_optimizer}

    def mask_value_model(self) -> None:
        """Give the value model the mask of the policy, if it is to have it and has not yet.

        Raises:
            TrainerError: The policy has no mask, or the value model is of another architecture.
        """
        if not self._follows:
            return
        subnet_mask = getattr(self, "subnet_mask", None)
        if subnet_mask is None:
            raise TrainerError(
                "`value_trains: subnet` gives the value model the mask of the policy, which has none. Call "
                "`restrict(trainer, mask)` before `train()`, or set `value_trains` to `full`."
            )
        self.value_mask = value_mask_like(subnet_mask, self.value_model)
        self.value_optimizer.set_mask(self.value_mask)
        self._follows = False

    def log_value_metric(self, name: str, value: float) -> None:
        """Add to a metric whose mean is logged as `value/NAME`."""
        self._metrics[self._mode][f"value/{name}"].append(value)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        """Keep the score (B,) float32 of every completion, NaN where nobody scored it, before it is normalized."""
        rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        scores = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        self._scores = scores.masked_fill(rewards.isnan().all(1), float("nan"))
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Replace the advantages by those of the value model, (B, T), and add what its loss needs.

        Added are `old_values`, `returns` and `returns_mask`, (B, T) each, so that the buffer keeps them in order with
        the completions.
        """
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        scored = self._scores.isfinite()
        mask = _loss_mask(output) * scored.unsqueeze(1)
        with torch.no_grad():
            values = self._in_chunks(self._values, output)
            has_price = self.args.kl_coef > 0
            kl = self._policy_logps(output) - self._reference_logps(output) if has_price else None
        scores = self._scores - self.args.missing_eos_penalty * self._is_cut_off(output)
        rewards = per_token_rewards(scores, kl, mask, kl_coef=self.args.kl_coef)
        advantages, returns = gae(rewards, values, mask, gamma=self.args.gamma, lam=self.args.lam)
        self.log_value_metric("explained_variance", explained_variance(values, returns, mask))
        self.log_value_metric("mean_return", masked_mean(returns, mask))
        if kl is not None:
            self._metrics[self._mode]["kl"].append(masked_mean(kl, mask))
        output["advantages"] = whiten(advantages, mask) if self.args.whiten_advantages else advantages
        return {**output, "old_values": values, "returns": returns, "returns_mask": mask}

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the loss of the policy plus `vf_coef` times that of the value model, summed up alike."""
        policy_loss: torch.Tensor = super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]  # no types there
        per_token, is_clipped = value_loss(
            self._values(inputs), inputs["old_values"], inputs["returns"], cliprange=self.args.cliprange_value
        )
        scored = inputs["returns_mask"]
        is_training = self.model.training
        num_micro_batches = self.current_gradient_accumulation_steps if is_training else 1
        num_items = inputs["num_items_in_batch"].clamp(min=1.0)
        if is_training:
            num_items = num_items * num_micro_batches / self.args.steps_per_generation
        loss = aggregate(
            torch.where(scored.bool(), per_token, 0.0),
            _loss_mask(inputs),
            loss_type=self.loss_type,
            num_micro_batches=num_micro_batches,
            num_items=num_items,
            max_completion_length=self.max_completion_length,
        )
        self.log_value_metric("loss", masked_mean(per_token.detach(), scored))
        self.log_value_metric("clip_ratio", masked_mean(is_clipped, scored))
        return policy_loss + self.args.vf_coef * loss

    def _frozen_copy(self, policy: Any) -> Any:
        """Return a copy of the policy as it is now, which computes with its own weights alone."""
        copied = copy.deepcopy(policy).requires_grad_(False).eval()
        if vars(copied).pop("forward", None) is not None:
            # TRL's since 1.15: its fused head, beside which it goes on calling the policy for logits.
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(copied, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        return copied

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _values(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the value (B, T) float32 of what stands before every token of the completions."""
        with self.accelerator.autocast():
            values: torch.Tensor = self.value_model(*_tokens(batch))
        return values

    def _policy_logps(self, output: dict[str, Any]) -> torch.Tensor:
        """Return the log-probabilities (B, T) under the policy that sampled; TRL has them, or it has not moved yet."""
        known: torch.Tensor | None = output.get("old_per_token_logps")
        if known is not None:
            return known
        was_training = self.model.training
        self.model.eval()
        try:
            return self._logps(self.model, output)
        finally:
            self.model.train(was_training)

    def _reference_logps(self, output: dict[str, Any]) -> torch.Tensor:
        """Return the log-probabilities (B, T) under the reference: a copy, or the base of a policy with an adapter."""
        return self._logps(BaseOf(self.model) if self.ref_model is None else self.ref_model, output)

    def _logps(self, model: Any, output: dict[str, Any]) -> torch.Tensor:
        """Return the log-probability (B, T) float32 of every token of the completions under a model."""
        logps: torch.Tensor = self._get_per_token_logps_and_entropies(
            model, *_tokens(output), batch_size=self._batch_size
        )[0]
        return logps.float()

    def _in_chunks(self, function: Any, output: dict[str, Any]) -> torch.Tensor:
        keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        pieces = zip(*(output[key].split(self._batch_size) for key in keys), strict=True)
        return torch.cat([function(dict(zip(keys, piece, strict=True))) for piece in pieces])

    @property
    def _batch_size(self) -> int:
        training, evaluation = self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size
        return training if self.model.training else evaluation

    def _is_cut_off(self, output: dict[str, Any]) -> torch.Tensor:
        """Return (B,) bool: which completions do not end with a token that ends one."""
        ids = self.model.generation_config.eos_token_id
        ends = {*(ids if isinstance(ids, list) else [ids]), self._tokenizer.eos_token_id, self._tokenizer.pad_token_id}
        is_last = last_tokens(output["completion_mask"])
        last = (output["completion_ids"] * is_last).sum(1)
        return ~torch.isin(last, torch.tensor(sorted(ends - {None}), device=last.device))

    def _check(self) -> None:
        args: Any = self.args
        if not isinstance(args, PPOConfig):
            raise TrainerError(f"`args` must be a `PPOConfig`, got `{type(args).__name__}`.")
        if args.world_size > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise TrainerError(
                f"PPO trains its value model in one process, and this run has {args.world_size}. Start it without "
                "torchrun, accelerate, DeepSpeed or FSDP."
            )
        if isinstance(self.processing_class, ProcessorMixin):
            raise TrainerError("PPO here reads text only; pass a tokenizer as `processing_class`, and a text model.")


def _tokens(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return ids (B, L) and attention mask (B, L) of prompts and completions, and the length T of the latter."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return ids, attention_mask, batch["completion_ids"].size(1)


def _loss_mask(batch: dict[str, Any]) -> torch.Tensor:
    """Return GRPO's own mask (B, T): tokens of the completions that the policy chose."""
    mask: torch.Tensor = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask
