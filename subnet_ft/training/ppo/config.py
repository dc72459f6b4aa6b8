"""`PPOConfig`: GRPO's config with what PPO adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trl.trainer.grpo_config import GRPOConfig

VALUE_TRAINS = ("full", "subnet")

LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo")
"""How losses per token are summed up; all four clip the ratio as PPO does."""


@dataclass
class PPOConfig(GRPOConfig):
    """The fields of `GRPOConfig`, which say how completions are sampled and how the ratio is clipped, and those below.

    `epsilon` clips the ratio, `num_iterations` is the number of epochs over a batch of completions, and `max_grad_norm`
    clips the gradient of the policy. `num_generations`, which TRL wants to be at least 2, is only how a batch is laid
    out: so many completions per prompt, each with the baseline of the value model, none with that of its group.
    `scale_rewards` therefore says nothing here.
    """

    value_learning_rate: float = 1e-5
    """Step size of the value model, >= 0; constant, whatever `lr_scheduler_type` does to that of the policy."""

    value_trains: str = "full"
    """Which weights of the value model are trained: `full`, all in every run; `subnet`, those that the mask of the
    policy's run trains in the policy, and the head. In a full run both are all."""

    value_max_grad_norm: float | None = 1.0
    """Norm to which the gradient of the value model is clipped, > 0; `None` does not clip. `max_grad_norm` never looks
    at it."""

    vf_coef: float = 1.0
    """Weight of the value loss in the loss, > 0. The value model has an optimizer of its own, to which only clipping
    makes this matter."""

    cliprange_value: float | None = 0.2
    """How far a value may move from what it was when the completions were sampled, > 0; `None`: any distance."""

    gamma: float = 1.0
    """Discount from one token to the next, in [0, 1]."""

    lam: float = 0.95
    """Lambda of the advantage estimate (GAE), in [0, 1]: 1 trusts returns only, 0 the value model only."""

    kl_coef: float = 0.05
    """Price of one nat that a token's log-probability is above that of the reference model, paid from its reward, >= 0.
    0 needs no reference model. The reference is the policy as it was when the trainer was built; of a policy with an
    adapter it is the base."""

    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the tokens of a batch of completions."""

    missing_eos_penalty: float = 0.0
    """Taken from the score of a completion that was cut off at `max_completion_length`, >= 0. Such a completion is
    judged as it stands and ends there, without the value of what might have followed; `mask_truncated_completions`
    leaves it out instead."""

    def __post_init__(self) -> None:
        """Check every field at once.

        Raises:
            ValueError: A field is out of range, or asks for what PPO does not do.
        """
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        super().__post_init__()  # type: ignore[no-untyped-call]  # upstream has no types here

    def _problems(self) -> Iterator[str]:
        for name in ("gamma", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                yield f"`{name}` must lie in [0, 1], got {getattr(self, name)}"
        for name in ("value_learning_rate", "kl_coef", "missing_eos_penalty"):
            if not getattr(self, name) >= 0.0:
                yield f"`{name}` must be >= 0, got {getattr(self, name)}"
        if not self.vf_coef > 0.0:
            yield f"`vf_coef` must be > 0, got {self.vf_coef}; `value_learning_rate: 0` keeps the value model as it is"
        for name, meaning in (("value_max_grad_norm", "no clipping"), ("cliprange_value", "any distance")):
            if getattr(self, name) is not None and not getattr(self, name) > 0.0:
                yield f"`{name}` must be > 0, or None for {meaning}, got {getattr(self, name)}"
        if self.value_trains not in VALUE_TRAINS:
            yield f"`value_trains` must be {' or '.join(map(repr, VALUE_TRAINS))}, got {self.value_trains!r}"
        if self.beta != 0.0:
            yield (
                f"`beta` adds a KL term to GRPO's loss and must stay 0, got {self.beta}; PPO pays for KL in the "
                "reward: set `kl_coef`"
            )
        yield from per_token_problems(self)
        if self.multi_objective_aggregation != "sum_then_normalize":
            yield (
                f"`multi_objective_aggregation` must stay 'sum_then_normalize', got "
                f"{self.multi_objective_aggregation!r}: the score is the sum of the rewards, each times its weight in "
                "`reward_weights`, and is not normalized by group"
            )
        if self.fp16:
            yield "`fp16` scales a loss that serves two optimizers; load the model in bfloat16 instead"


def per_token_problems(config: GRPOConfig) -> Iterator[str]:
    """Yield what of GRPO does not go with advantages per token and a reference that stays: PPO's, and PRIME's."""
    if config.loss_type not in LOSS_TYPES:
        yield f"`loss_type` must be one of {', '.join(LOSS_TYPES)}, which clip as PPO does, got {config.loss_type!r}"
    if config.importance_sampling_level != "token":
        yield (
            "`importance_sampling_level` must be 'token', because advantages are per token, got "
            f"{config.importance_sampling_level!r}"
        )
    if config.sync_ref_model:
        yield "`sync_ref_model` must stay false: the reference is the policy as it started, and does not follow it"
