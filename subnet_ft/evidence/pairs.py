"""Held-out pairs that a reward model tells apart: the chosen completion must get the higher reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.errors import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Score both completions of every pair.

    Texts become tokens as TRL's `RewardTrainer` makes them, but none is left out for its length.

    Args:
        model: A reward model, with a padding token in its config; its mode is left as it was.
        tokenizer: Its tokenizer; chat messages need its chat template.
        pairs: In TRL's preference format: `chosen`, `rejected` and, unless it is part of both, `prompt`.
        batch_size: Texts scored at a time.
        progress: Show a bar on stderr.

    Returns:
        One record per pair, in order. `correct`: the chosen completion's reward is higher; a tie is not correct.
        `score` is 1 or 0 after it. `chosen_reward` and `rejected_reward` are numbers; `completion` says the same in
        words and `answer` has the pair, so that the records have the fields of those of `evaluate_model`.

    Raises:
        TaskError: There is no pair.
    """
    if not pairs:
        raise TaskError("There is no held-out pair to judge by. Raise task.num_eval.")
    texts = [_tokenize(tokenizer, pair, name) for pair in pairs for name in ("chosen", "rejected")]
    rewards = _rewards(model, texts, batch_size, progress=progress)
    return [
        _record(pair, chosen, rejected)
        for pair, chosen, rejected in zip(pairs, rewards[::2], rewards[1::2], strict=True)
    ]


def _record(pair: Mapping[str, Any], chosen: float, rejected: float) -> dict[str, Any]:
    return {
        "prompt": pair.get("prompt", ""),
        "completion": f"chosen {chosen:.4g}, rejected {rejected:.4g}",
        "answer": f"chosen: {_last(pair['chosen'])}\nrejected: {_last(pair['rejected'])}",
        "score": float(chosen > rejected),
        "correct": chosen > rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }


def _last(completion: str | list[dict[str, Any]]) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _tokenize(tokenizer: PreTrainedTokenizerBase, pair: Mapping[str, Any], name: str) -> list[int]:
    tokens: Any
    completion = pair[name]
    if isinstance(completion, str):
        end = str(tokenizer.eos_token or "")
        text = pair.get("prompt", "") + completion
        tokens = tokenizer(text if completion.endswith(end) else text + end)["input_ids"]
    else:
        messages = [*pair.get("prompt", []), *completion]
        tokens = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    return list(tokens)


def _rewards(model: Any, texts: list[list[int]], batch_size: int, *, progress: bool) -> list[float]:
    """Return the reward of each text; texts of like length are scored together, padded on the right."""
    from tqdm import tqdm

    pad = model.config.get_text_config().pad_token_id
    # A text scored twice may differ in its last bits from one batch to the next, which would break a tie.
    order = sorted({tuple(text) for text in texts}, key=lambda text: (len(text), text))
    rewards: dict[tuple[int, ...], float] = {}
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), tqdm(total=len(order), desc="score", unit="text", disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                longest = len(batch[-1])
                rows = [[*text, *[pad] * (longest - len(text))] for text in batch]
                seen = [[1] * len(text) + [0] * (longest - len(text)) for text in batch]
                logits = model(
                    input_ids=torch.tensor(rows, device=model.device),
                    attention_mask=torch.tensor(seen, device=model.device),
                    use_cache=False,
                ).logits
                rewards.update(zip(batch, logits.squeeze(-1).float().tolist(), strict=True))
                bar.update(len(batch))
    finally:
        model.train(training)
    return [rewards[tuple(text)] for text in texts]
