"""`ImplicitRewardModel`: a language model whose log-ratio to a frozen reference is a process reward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.training.prime.advantages import implicit_rewards, outcome_loss

if TYPE_CHECKING:
    from subnet_ft.optim import MaskedBase


@dataclass(frozen=True)
class Completions:
    """B completions behind their prompts.

    Args:
        ids: (B, P + T) int64; prompts left-padded, completions right-padded.
        attention_mask: (B, P + T) int64.
        mask: (B, T) bool, the completions' tokens that count.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> Completions:
        """Return some rows, by index or by a (B,) bool."""
        return Completions(self.ids[rows], self.attention_mask[rows], self.mask[rows])

    def __len__(self) -> int:
        """Return B."""
        return len(self.ids)


class ImplicitRewardModel:
    """Scores completions token by token, and learns from their outcomes; the reference never changes.

    Both compute in eval mode: no dropout, so that a score and its gradient belong together and no random number is
    drawn.

    Args:
        model: Trained; a causal language model with the policy's vocabulary.
        reference: A causal language model, which is frozen here, or what computes as one that never changes.
        optimizer: On the parameters of `model`.
        beta: Scale of the rewards, > 0.
        micro_batch_size: Completions per forward pass.
        autocast: Makes the context of every forward pass.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        reference: Callable[..., Any],
        optimizer: MaskedBase,
        *,
        beta: float,
        micro_batch_size: int,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model = model.eval()
        self.reference = reference.eval().requires_grad_(False) if isinstance(reference, torch.nn.Module) else reference
        self.optimizer = optimizer
        self._beta = beta
        self._micro_batch_size = micro_batch_size
        self._autocast = autocast

    @torch.no_grad()
    def score(self, completions: Completions) -> torch.Tensor:
        """Return the process rewards (B, T) float32, 0 outside the mask."""
        rows = torch.arange(len(completions), device=completions.ids.device)
        return torch.cat([self._rewards(completions[part]) for part in torch.split(rows, self._micro_batch_size)])

    @torch.enable_grad()
    def update(self, completions: Completions, outcomes: torch.Tensor, *, batch_size: int) -> torch.Tensor:
        """Train one pass over the completions, by cross-entropy on their outcomes.

        Args:
            completions: B > 0 of them.
            outcomes: (B,) float32 in [0, 1].
            batch_size: Largest number of completions per optimizer step; all steps get equally many, give or take one.

        Returns:
            (B, T) float32, the process rewards from before the step that each completion took part in.
        """
        rows = torch.arange(len(completions), device=completions.ids.device)
        found = []
        for step in rows.tensor_split(-(-len(rows) // batch_size)):
            for part in torch.split(step, self._micro_batch_size):
                rewards = self._rewards(completions[part])
                (outcome_loss(rewards, outcomes[part]).sum() / len(step)).backward()  # type: ignore[no-untyped-call]
                found.append(rewards.detach())
            self.optimizer.step()  # which consumes the gradients
        return torch.cat(found)

    def _rewards(self, completions: Completions) -> torch.Tensor:
        log_probs = self._log_probs(self.model, completions)
        with torch.no_grad():
            reference = self._log_probs(self.reference, completions)
        return implicit_rewards(log_probs, reference, completions.mask, beta=self._beta)

    def _log_probs(self, model: Callable[..., Any], completions: Completions) -> torch.Tensor:
        """Return the log-probabilities (B, T) float32 of the completions' tokens, at temperature 1."""
        length = completions.mask.shape[1]
        with self._autocast():
            # No position ids, as in TRL: policy and reward model see the same.
            logits = model(
                input_ids=completions.ids,
                attention_mask=completions.attention_mask,
                logits_to_keep=length + 1,
                use_cache=False,
            ).logits[:, :-1]
        logits = logits.float()
        tokens = completions.ids[:, -length:].unsqueeze(2)
        chosen: torch.Tensor = logits.gather(2, tokens).squeeze(2) - logits.logsumexp(dim=2)
        return chosen
