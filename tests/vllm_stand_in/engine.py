"""A stand-in for vLLM's engine: its interface as TRL uses it, around a transformers model on the CPU.

It is no vLLM: nothing here says how vLLM itself behaves. As in vLLM, projections are fused in memory, so that a weight
of a checkpoint is a part of a tensor; sleep of level 2 drops the weights, here by filling them with NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
FUSED["up_proj"] = "gate_up_proj"


@dataclass
class Logprob:
    """As in vLLM."""

    logprob: float
    rank: int


@dataclass
class CompletionOutput:
    """As in vLLM."""

    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]


@dataclass
class RequestOutput:
    """As in vLLM."""

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class SamplingParams:
    """As in vLLM: whatever it is given."""

    def __init__(self, **options: Any) -> None:
        self.__dict__.update(options)


class StructuredOutputsParams(SamplingParams):
    """As in vLLM."""


class EngineModel:
    """The model of a worker: loads weights by the names of a checkpoint into fused tensors."""

    def __init__(self, path: str) -> None:
        self.module = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval().requires_grad_(False)
        self.loaded: list[list[str]] = []
        """Names of every call of `load_weights`."""
        self.fused = self._fuse()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy weights into the engine's tensors.

        Raises:
            ValueError: The engine has no such weight, or in another shape or dtype.
        """
        names: list[str] = []
        self.loaded.append(names)
        known = dict(self.module.named_parameters())
        for name, tensor in weights:
            if name not in known or (known[name].shape, known[name].dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(f"cannot load {name}: {tensor.dtype} {tuple(tensor.shape)}")
            known[name].data.copy_(tensor)
            names.append(name)
        return set(names)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return copies of the weights by the names of a checkpoint."""
        return {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}

    def drop(self) -> None:
        """Lose the weights, as memory that is given back."""
        for parameter in self.module.parameters():
            parameter.data.fill_(float("nan"))

    @torch.no_grad()
    def generate(self, prompt: Sequence[int], params: SamplingParams) -> RequestOutput:
        """Sample `params.n` completions; an end of sequence stays in the tokens, as in vLLM."""
        ids = torch.tensor([list(prompt)])
        config = self.module.generation_config
        drawn: Any = self.module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            num_return_sequences=params.n,
            max_new_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            repetition_penalty=params.repetition_penalty,
            pad_token_id=config.pad_token_id or 0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        scores = torch.stack(drawn.scores, dim=1).float().log_softmax(-1)
        outputs = []
        for row, logprobs in zip(drawn.sequences[:, ids.shape[1] :].tolist(), scores, strict=True):
            stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
            ranked = [
                {token: Logprob(float(step[token]), int((step > step[token]).sum()) + 1)}
                for token, step in zip(row[:stop], logprobs, strict=False)
            ]
            outputs.append(CompletionOutput(row[:stop], ranked))
        return RequestOutput(list(prompt), outputs)

    def _fuse(self) -> dict[str, torch.Tensor]:
        """Put projections that vLLM fuses into one tensor each; the module's parameters become views of it."""
        groups: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in self.module.named_parameters():
            part = next((part for part in name.split(".") if part in FUSED), None)
            if part is not None:
                groups.setdefault(name.replace(part, FUSED[part]), []).append(parameter)
        fused = {}
        for name, parameters in groups.items():
            fused[name] = torch.cat([parameter.data for parameter in parameters])
            for parameter, rows in zip(parameters, fused[name].split([len(p) for p in parameters]), strict=True):
                parameter.data = rows
        return fused


class LLM:
    """What TRL builds in colocate mode."""

    def __init__(self, model: str, **options: Any) -> None:
        self.options = options
        self.model = EngineModel(model)
        runner = SimpleNamespace(model=self.model)
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor, model_config=SimpleNamespace(max_model_len=128))
        self.asleep: set[str] = set()
        self.num_resets = 0

    def generate(
        self, prompts: list[dict[str, Any]], sampling_params: SamplingParams, use_tqdm: bool
    ) -> list[RequestOutput]:
        """Generate for every prompt; an engine that sleeps cannot."""
        assert not self.asleep, f"generation while {sorted(self.asleep)} sleep"
        return [self.model.generate(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def sleep(self, level: int) -> None:
        """Free memory; level 2 drops the weights."""
        assert level == 2
        self.asleep = {"weights", "kv_cache"}
        self.model.drop()

    def wake_up(self, tags: list[str]) -> None:
        """Take memory again, with whatever is in it."""
        self.asleep -= set(tags)

    def reset_prefix_cache(self) -> None:
        """Forget what was computed with older weights."""
        self.num_resets += 1
