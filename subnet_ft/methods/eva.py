"""EVA: LoRA that starts from the singular vectors of what each layer sees, ranks moved to where they explain most.

Paischer et al. 2024, arXiv 2410.07170; PEFT does the decomposition.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from subnet_ft.errors import MethodError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

_TOKENS = 1024
"""Tokens of a batch, where there are so many; fewer make the decomposition, which sees one at a time, coarser."""

_MOST_BATCHES = 1000
"""After how many batches the directions must have settled; usually a few dozen are enough."""


def start_from_activations(model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Set every `lora_A` to the leading right singular vectors of its layer's inputs, and redistribute the ranks.

    `lora_B` is zero, so the model still computes what its base does.

    Args:
        model: A fresh LoRA model with `init_lora_weights="eva"`. In-out.
        tokenizer: Its tokenizer.
        texts: Training prompts.

    Raises:
        MethodError: There are too few tokens for the ranks asked for, or the directions do not settle.
    """
    import torch
    from peft import initialize_lora_eva_weights
    from peft.tuners.lora.eva import get_eva_state_dict

    config: Any = model.peft_config["default"]
    least = max(round(rank * config.eva_config.rho) for rank in (config.r, *config.rank_pattern.values()))
    batches = _Batches(model, tokenizer, texts, least=least)
    directions = get_eva_state_dict(model, batches, forward_fn=_Limited(), show_progress_bar=False)
    with warnings.catch_warnings():
        # PEFT names layers without inputs of their own, which stay ordinary LoRA.
        initialize_lora_eva_weights(model, eva_state_dict=dict(directions))
    modules = dict(model.named_modules())
    for name, vectors in directions.items():
        if len(vectors):  # a layer of rank 0 is the base's own again
            layer: Any = modules[name]
            layer.lora_A["default"].weight.data = vectors.to(torch.float32).contiguous()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" in name:  # not the head of a reward model
            parameter.data = parameter.data.to(torch.float32)


class _Limited:
    """Runs the model on batch after batch, which PEFT repeats from the first on until all directions have settled."""

    def __init__(self) -> None:
        self._left = _MOST_BATCHES

    def __call__(self, model: Any, inputs: Any) -> Any:
        if self._left == 0:
            raise MethodError(
                f"The singular vectors of `eva` have not settled after {_MOST_BATCHES} batches. Lower "
                "`methods.eva.config.eva_config.tau`, or `r`."
            )
        self._left -= 1
        return model(**inputs)


class _Batches:
    """Tokenized prompts, each batch with enough tokens for the singular vectors that are wanted of it.

    Args:
        model: Says on which device.
        tokenizer: Its tokenizer.
        texts: The prompts.
        least: Tokens without which a batch cannot be decomposed.

    Raises:
        MethodError: There are fewer in all.
    """

    def __init__(self, model: Any, tokenizer: Any, texts: Sequence[str], *, least: int) -> None:
        self._device = next(model.parameters()).device
        self._tokenizer = tokenizer
        self._groups: list[list[str]] = []
        group: list[str] = []
        tokens = 0
        for text in texts:
            group.append(text)
            tokens += len(tokenizer(text)["input_ids"])
            if tokens >= max(least, _TOKENS):
                self._groups.append(group)
                group, tokens = [], 0
        if tokens >= least:
            self._groups.append(group)
        if not self._groups:
            raise MethodError(
                f"`eva` needs {least} tokens of training prompts for its singular vectors (`r` x `rho`), and there are "
                f"{tokens}. Ask for more prompts (`task.num_train`), or lower `methods.eva.config.r`."
            )

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for group in self._groups:
            encoded = self._tokenizer(group, return_tensors="pt", padding=True)
            yield {key: encoded[key].to(self._device) for key in ("input_ids", "attention_mask")}
