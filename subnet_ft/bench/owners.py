"""Who a storage that was allocated during a training step belongs to, for the memory of the bench."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from subnet_ft.optim import MaskedBase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OURS = "ours"
_OUR_MODULES = ("subnet_ft.optim", "subnet_kernels")

SMALLEST_CHUNK = 1024
"""Rows: a larger copy of rows of the output embedding counts; activations stay below, or `check_tokens` raises."""


class Owners:
    """Names the owner of a storage: ours, a copy or gradient as large as a matrix, or a chunk of the output embedding.

    What counts is the number of elements, whatever shape, dtype or strides: as many as some matrix of the model has;
    or, while code of ours runs (a step, a gradient hook, clipping), at least as many as its smallest one. Beyond that,
    rows of the output embedding, more than `SMALLEST_CHUNK` at once. Activations and logits do not count.

    Args:
        model: A causal language model, all of whose matrices are trained.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, torch.nn.Embedding)
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        self._vocabulary, self._hidden = embedding.weight.shape
        self._widths = {width for matrix in matrices for width in matrix.shape}
        self._sizes = {matrix.numel() for matrix in matrices}
        self._smallest = min(self._sizes)
        self._tokens: set[int] = set()
        embedding.register_forward_pre_hook(lambda module, args: self._tokens.add(args[0].numel()))

    def __call__(self, op: str, tensor: torch.Tensor) -> str | None:
        """Return the owner of a storage by an op and a tensor in it, which may be a view."""
        sizes = {tensor.untyped_storage().nbytes() // tensor.element_size(), tensor.numel()}
        what = self._what(sizes, tensor)
        if what is None:
            return None
        dtype = str(tensor.dtype).removeprefix("torch.")
        return f"{what}, {dtype}, {op.removeprefix('aten.').partition('.')[0]}"

    def check_tokens(self) -> None:
        """Make sure that no activation was taken for a matrix.

        Raises:
            ValueError: A batch had so many tokens that an activation has as many elements as a matrix.
        """
        for tokens in self._tokens:
            mistaken = [width for width in self._widths if tokens * width in self._sizes]
            if mistaken or tokens > SMALLEST_CHUNK:
                raise ValueError(
                    f"Activations of {tokens} tokens (widths {mistaken}) cannot be told from matrices by their size; "
                    "change the number of pairs per batch."
                )

    def _what(self, sizes: set[int], tensor: torch.Tensor) -> str | None:
        if max(sizes) >= self._smallest and _is_ours():
            return OURS
        if sizes & self._sizes:
            largest = self._vocabulary * self._hidden
            return "tied output embedding" if largest in sizes else "one matrix at a time"
        if tensor.dim() == 2 and tensor.is_floating_point() and self._hidden in tensor.shape:
            rows = tensor.numel() // self._hidden
            if SMALLEST_CHUNK < rows <= self._vocabulary:
                return "trainer's head, chunk of the output embedding"
        return None


def persistent_tensors(optimizer: MaskedBase) -> Iterator[torch.Tensor]:
    """Yield what outlives a step and stands in the ledger: state, compact gradients and masks."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield from (value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor))
            mask = optimizer.bit_mask(parameter)
            yield from (mask.bits, mask.offsets, mask.bases)
    yield from optimizer.gradient_buffers()


def _is_ours() -> bool:
    """Whether code of ours is among the callers; on the CPU gradient hooks run in the thread that called backward."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith(_OUR_MODULES):
            return True
    return False
