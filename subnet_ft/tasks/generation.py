"""Completions of prompts: batched, greedy or sampled."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.errors import TaskError
from subnet_ft.tasks.task import Prompt

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    num_samples: int = 1,
    batch_size: int,
    seed: int,
    progress: bool = False,
) -> list[list[str]]:
    """Return `num_samples` completions for each prompt, in the order of `prompts`.

    Prompts are batched by length, so that there is next to no padding, and all samples of a prompt share its prefill.
    Greedy completions do not depend on `batch_size` beyond rounding; sampled ones do, because the draws are dealt out
    batch by batch. What the model's own generation config says about sampling (top_p, penalties, ...) is not used. The
    global random state and the model's mode are left as they were.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; chat messages need its chat template.
        prompts: Text, or chat messages.
        max_new_tokens: Longest completion; it ends earlier at an end-of-sequence token of the model or the tokenizer.
        temperature: 0 takes the likeliest token, above 0 samples from all tokens.
        num_samples: Completions per prompt; more than one needs a temperature above 0.
        batch_size: Sequences in flight at a time, so `batch_size // num_samples` prompts, at least one.
        seed: Of the samples.
        progress: Show a bar on stderr.

    Raises:
        TaskError: A prompt without tokens, chat messages without a template, or several greedy samples.
    """
    if num_samples > 1 and temperature == 0:
        raise TaskError(f"{num_samples} samples at temperature 0 would all be the same. Set a temperature above 0.")
    tokens = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(tokens[index]))
    step = max(1, batch_size // num_samples)
    config = _generation_config(model, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature)
    completions: list[list[str]] = [[] for _ in prompts]
    with _generating(model, seed), _bar(len(prompts), enabled=progress) as bar:
        for start in range(0, len(order), step):
            batch = order[start : start + step]
            rows = _generate_batch(model, [tokens[index] for index in batch], config, num_samples)
            for position, row in enumerate(rows):
                index = batch[position // num_samples]
                completions[index].append(_decode(tokenizer, tokens[index], row))
            bar.update(len(batch))
    return completions


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return the tokens that a model continues.

    Raises:
        TaskError: The prompt has none, or is chat messages and the tokenizer has no chat template.
    """
    tokens: Any
    if isinstance(prompt, str):
        tokens = tokenizer(prompt)["input_ids"]
    else:
        if tokenizer.chat_template is None:
            raise TaskError(
                "The prompts are chat messages, but the model's tokenizer has no chat template. Set task.chat to "
                "false, or use a model that was tuned for chat."
            )
        tokens = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    if not tokens:
        raise TaskError(f"The prompt {prompt!r} has no tokens, so there is nothing to continue. Check task.prompt.")
    return list(tokens)


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    from transformers import GenerationConfig

    ends: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    # A value left out would be filled in from the model's own generation config; those of sampling warn when greedy.
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **(sampling if temperature > 0 else {}),
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(set(ends)) or None,
        pad_token_id=_pad_token(ends),
    )


def _pad_token(ends: list[int]) -> int:
    """Return what fills a row: it is masked on the left of a prompt and cut off on the right of a completion."""
    return ends[0] if ends else 0


@contextmanager
def _generating(model: Any, seed: int) -> Iterator[None]:
    training, device = model.training, model.device
    on_cpu = device.type == "cpu"
    options: dict[str, Any] = {"devices": []} if on_cpu else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**options), torch.no_grad():
        # torch.manual_seed would also reseed every other device, which nobody restores.
        (torch.default_generator if on_cpu else torch.get_device_module(device)).manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def _bar(total: int, *, enabled: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="generate", unit="prompt", disable=not enabled)


def _generate_batch(
    model: Any, prompts: list[list[int]], config: GenerationConfig, num_samples: int
) -> list[list[int]]:
    """Return the new tokens of every sample, prompt by prompt, each up to and without its end token."""
    length = max(map(len, prompts))
    pad = config.pad_token_id
    input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in prompts], device=model.device)
    attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    shared: dict[str, Any] = {}
    if num_samples > 1:
        if length > 1:
            shared = _prefill(model, input_ids, attention_mask, num_samples)
        input_ids = input_ids.repeat_interleave(num_samples, dim=0)
        attention_mask = attention_mask.repeat_interleave(num_samples, dim=0)
    output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config, **shared)
    ends = set(config.eos_token_id or ())
    rows: list[list[int]] = output[:, length:].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def _prefill(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_samples: int) -> dict[str, Any]:
    """Run all but the last prompt token once per prompt and repeat the cache for the samples of each.

    Returns:
        The cache under the name that the model's `forward` and `generate` take it by.
    """
    from transformers import DynamicCache

    # transformers 5.24 renamed the argument and warns of the old name.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    positions = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    output = model(
        input_ids=input_ids[:, :-1],
        attention_mask=attention_mask[:, :-1],
        position_ids=positions[:, :-1],
        use_cache=True,
        logits_to_keep=1,
        **{name: DynamicCache(config=model.config)},
    )
    output[name].batch_repeat_interleave(num_samples)
    return {name: output[name]}


def _decode(tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: list[int]) -> str:
    """Decode a completion after its prompt: some tokenizers drop the space of a text's first token."""

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    before, whole = decode(prompt), decode(prompt + completion)
    return whole[len(before) :] if whole.startswith(before) else decode(completion)
