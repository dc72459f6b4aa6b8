"""`PRIMEConfig`: what PRIME adds to TRL's `GRPOConfig`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trl.trainer.grpo_config import GRPOConfig

from subnet_ft.training.ppo.config import per_token_problems

PRM_TRAINS = ("full", "subnet")
PRM_UPDATES = ("before", "after")


@dataclass
class PRIMEConfig(GRPOConfig):
    """Options of a `PRIMETrainer`: all of `GRPOConfig`, and these.

    The defaults are the paper's, except `prm_update`, which is verl's. `scale_rewards` has no effect: the advantages of
    PRIME take the place of GRPO's. The batch size of the reward model is that of the policy, in the same micro-batches.

    Raises:
        ValueError: A field is out of range, or asks for something of GRPO that PRIME replaces.
    """

    prm_learning_rate: float = 1e-6
    """Learning rate of the implicit reward model, constant; >= 0, and 0 keeps it as it starts."""

    prm_beta: float = 0.05
    """Scale of the implicit rewards, beta in beta log(pi_phi / pi_ref); > 0."""

    prm_weight_decay: float = 0.0
    """Decoupled weight decay of the implicit reward model, on its mask only; >= 0."""

    prm_trains: str = "full"
    """Which weights of the implicit reward model are trained: `full`, all in every run; `subnet`, those that the mask
    of the policy's run trains in the policy. In a full run both are all."""

    prm_max_grad_norm: float = 1.0
    """The reward model's gradient on its mask is clipped to this norm; > 0, and inf does not clip."""

    prm_update: str = "before"
    """Whether the reward model learns from a batch `before` it scores it, which takes a forward pass more and is what
    verl's recipe does by default; or `after` it, as the paper's Algorithm 1 has it: the first batch then has no process
    rewards yet."""

    outcome_coef: float = 1.0
    """Weight of the outcome rewards in the advantages; >= 0."""

    process_coef: float = 1.0
    """Weight of the process rewards in the advantages; >= 0, and 0 leaves RLOO with filtered prompts."""

    gamma: float = 1.0
    """Discount of later process rewards per token; in [0, 1]."""

    accuracy_low: float = 0.2
    """A prompt whose completions have a lower mean outcome teaches nothing, neither policy nor reward model."""

    accuracy_high: float = 0.8
    """A prompt whose completions have a higher mean outcome teaches nothing; 0 and 1 together filter no prompt."""

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        super().__post_init__()  # type: ignore[no-untyped-call]  # upstream has no types here

    def _problems(self) -> Iterator[str]:
        for name in ("prm_learning_rate", "prm_weight_decay", "outcome_coef", "process_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                yield f"`{name}` must be a number >= 0, got {getattr(self, name)}"
        if not 0 < self.prm_beta < math.inf:
            yield f"`prm_beta` must be a number > 0, got {self.prm_beta}; the paper has 0.05"
        if not self.prm_max_grad_norm > 0:
            yield f"`prm_max_grad_norm` must be > 0, got {self.prm_max_grad_norm}; `inf` does not clip"
        if not 0 <= self.gamma <= 1:
            yield f"`gamma` must lie in [0, 1], got {self.gamma}; 1 does not discount"
        if self.prm_trains not in PRM_TRAINS:
            yield f"`prm_trains` must be {' or '.join(map(repr, PRM_TRAINS))}, got {self.prm_trains!r}"
        if self.prm_update not in PRM_UPDATES:
            yield f"`prm_update` must be {' or '.join(map(repr, PRM_UPDATES))}, got {self.prm_update!r}"
        if not 0 <= self.accuracy_low <= self.accuracy_high <= 1:
            yield (
                "`accuracy_low` and `accuracy_high` must be 0 <= low <= high <= 1, got "
                f"{self.accuracy_low} and {self.accuracy_high}; 0 and 1 filter no prompt, the paper has 0.2 and 0.8"
            )
        if self.outcome_coef == self.process_coef == 0:
            yield "`outcome_coef` and `process_coef` are both 0, and so would be every advantage; set one of them"
        if self.beta != 0:
            yield (
                f"`beta` must stay 0, got {self.beta}: it adds GRPO's KL penalty to the loss, which PRIME does not "
                "have; the scale of PRIME's rewards is `prm_beta`"
            )
        yield from per_token_problems(self)
        if self.multi_objective_aggregation != "sum_then_normalize":
            yield (
                "`multi_objective_aggregation` must stay 'sum_then_normalize', got "
                f"{self.multi_objective_aggregation!r}: PRIME's outcome is the sum of the reward functions, each times "
                "its weight in `reward_weights`"
            )
        if self.fp16:
            yield "`fp16` scales gradients, which the reward model's optimizer does not undo; use bfloat16 instead"
