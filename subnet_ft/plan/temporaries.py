"""What comes and goes within a step: the model's own code runs on tensors that have a shape and no memory.

Nothing is computed: `FakeTensorMode` passes shapes and dtypes through every operation, forward and backward, and every
storage is counted from when it would be allocated until it would be freed. What is left out is what an allocator adds,
and what a GPU's library takes as workspace. Attention is torch's fused one with a mask for padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from subnet_ft.bench.tracker import StorageTracker
from subnet_ft.plan.trained import Trained

if TYPE_CHECKING:
    import torch

ACTIVATIONS, GRADIENT = "activations", "dense gradients"


@dataclass(frozen=True)
class Pass:
    """The temporaries of a forward and a backward pass through a model's decoder, in bytes.

    Args:
        saved: Lives from the forward to the backward pass.
        peak: The largest sum of activations at any time.
        gradient: The largest sum of dense gradients at any time; each is compacted as soon as it is whole.
        total: The largest sum of both.
    """

    saved: int
    peak: int
    gradient: int
    total: int


@dataclass(frozen=True)
class Prefill:
    """What sampling holds after it has read the prompts, in bytes.

    Args:
        cache: Keys and values.
        peak: The largest sum at any time.
    """

    cache: int
    peak: int


def owner_of(shapes: set[tuple[int, ...]]) -> Callable[[str, torch.Tensor], str]:
    """Return who a storage belongs to, by its shape: that of a matrix is a dense gradient, everything else activations.

    Args:
        shapes: Of the trained parameters.
    """
    matrices = {shape for shape in shapes if len(shape) > 1}
    matrices |= {(*shape[:-2], shape[-1], shape[-2]) for shape in matrices}

    def owner(op: str, tensor: torch.Tensor) -> str:
        return GRADIENT if tuple(tensor.shape) in matrices else ACTIVATIONS

    return owner


@functools.lru_cache(maxsize=128)
def training_pass(trained: Trained, sequences: int, length: int, *, activation_checkpointing: bool) -> Pass:
    """Run the decoder forward and backward.

    Args:
        trained: The model, and what of it is trained.
        sequences: B.
        length: L, tokens of each.
        activation_checkpointing: Layers are computed again in the backward pass.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    shapes = {tensor.shape for tensor in trained.tensors if tensor.count}
    tracker = StorageTracker(owner_of(shapes))
    built = trained.build()
    with FakeTensorMode():
        decoder = _decoder(_without_memory(built)).train()
        if activation_checkpointing:
            enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop)
        ids = torch.zeros(sequences, length, dtype=torch.long)
        mask = torch.ones(sequences, 1, length, length, dtype=torch.bool)
        with tracker:
            hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            saved = tracker.live.get(ACTIVATIONS, 0)
            tracker.mark()
            # Of the gradient of the hidden states only the shape matters.
            torch.autograd.backward(hidden, torch.empty_like(hidden))
            del hidden
    peaks = tracker.peaks()
    return Pass(
        saved=saved,
        peak=max(peak.highest.get(ACTIVATIONS, 0) for peak in peaks),
        gradient=max(peak.highest.get(GRADIENT, 0) for peak in peaks),
        total=max(peak.total for peak in peaks),
    )


@functools.lru_cache(maxsize=128)
def prefill(trained: Trained, sequences: int, length: int) -> Prefill:
    """Run the decoder over prompts, as sampling does first.

    Args:
        trained: The model.
        sequences: B.
        length: Tokens of each prompt.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    tracker = StorageTracker(lambda op, tensor: ACTIVATIONS)
    built = trained.build()
    with FakeTensorMode(), torch.no_grad():
        decoder = _decoder(_without_memory(built)).eval()
        ids = torch.zeros(sequences, length, dtype=torch.long)
        mask = torch.ones(sequences, 1, length, length, dtype=torch.bool)
        with tracker:
            # The output holds the cache, under a name that changes with transformers' releases.
            output = decoder(input_ids=ids, attention_mask=mask, use_cache=True)
    held = tracker.live.get(ACTIVATIONS, 0) - output.last_hidden_state.nbytes
    return Prefill(cache=held, peak=max(peak.total for peak in tracker.peaks()))


def _decoder(model: Any) -> Any:
    """Return the layers of a model without its head, with an adapter's weights among them if it has one."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return inner.base_model


def _without_memory(model: torch.nn.Module) -> torch.nn.Module:
    """Replace the meta tensors of a model by those of the `FakeTensorMode` around, which claim to lie on the CPU."""
    import torch

    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None
