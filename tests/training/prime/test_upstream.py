"""What PRIME takes for granted about TRL's GRPO trainer; it runs here without our trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training.every_trainer import build
from training.upstream import PRIME, expect

WHERE = "trl:GRPOTrainer"


@pytest.fixture
def grpo(tmp_path: Path) -> Any:
    trainer: Any = build("GRPO", tmp_path)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def rows(*prompts: str) -> list[dict[str, str]]:
    return [{"prompt": prompt} for prompt in prompts for _ in range(2)]


def loss_of(trainer: Any, batch: dict[str, Any]) -> float:
    return trainer._compute_loss(trainer.model, batch).item()


def test_grpo_returns_the_rewards_of_every_completion_in_order_before_it_forms_advantages(grpo: Any) -> None:
    seen: list[Any] = []
    score = grpo._calculate_rewards
    grpo._calculate_rewards = lambda *args: seen.append((args, score(*args))) or seen[-1][1]
    batch = grpo._generate_and_score_completions(rows("1 + 2 = ", "3 + 3 = "))
    ((_, prompts, _, completion_ids), rewards) = seen[0]
    expect(prompts, ["1 + 2 = "] * 2 + ["3 + 3 = "] * 2, f"{WHERE}._generate_and_score_completions", PRIME)
    expect(tuple(rewards.shape), (4, 1), f"{WHERE}._calculate_rewards", PRIME)
    kept = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    expect(kept, [list(ids) for ids in completion_ids], f"{WHERE}._generate_and_score_completions", PRIME)
    expect(int(batch["num_items_in_batch"]), int(batch["completion_mask"].sum()), WHERE, PRIME)
    expect([name for name in ("prompt_ids", "prompt_mask") if name not in batch], [], WHERE, PRIME)
    expect(len(grpo._logs["advantages"]), 4, f"{WHERE}._generate_and_score_completions", PRIME)


def test_grpo_takes_advantages_per_token(grpo: Any) -> None:
    batch = grpo._generate_and_score_completions(rows("1 + 2 = ", "3 + 3 = "))
    mask = batch["completion_mask"].bool()
    batch["advantages"] = torch.arange(mask.numel()).view(mask.shape) / 10
    expected = -float(batch["advantages"][mask].mean())
    expect(round(loss_of(grpo, batch), 4), round(expected, 4), f"{WHERE}._compute_loss", PRIME)


def test_grpo_leaves_out_what_the_completion_mask_does(grpo: Any) -> None:
    batch = grpo._generate_and_score_completions(rows("1 + 2 = ", "3 + 3 = "))
    batch["advantages"] = torch.tensor([1.0, 2.0, 4.0, 8.0])
    batch["completion_mask"][2:] = 0
    tokens = batch["completion_mask"].sum(dim=1)
    batch["num_items_in_batch"] = tokens.sum()
    expected = -float((tokens * batch["advantages"]).sum() / tokens.sum())
    expect(round(loss_of(grpo, batch), 4), round(expected, 4), f"{WHERE}._compute_loss", PRIME)
    batch["completion_mask"][:] = 0
    batch["num_items_in_batch"] = torch.tensor(0)
    grpo._compute_loss(grpo.model, batch).backward()
    found = {float(value.grad.abs().sum()) for value in grpo.model.parameters()}
    expect(found, {0.0}, f"{WHERE}._compute_loss", PRIME)
