"""The vocabulary projection: TRL's fused head works in tiles, other trainers hold all logits. Estimates, by formula."""

from __future__ import annotations

from dataclasses import dataclass

from subnet_ft.plan.shapes import ModelShapes

# TRL's `TOKEN_CHUNK_SIZE` and `_CHUNKED_LOGPROB_CHUNK_SIZE`; a test compares them with the installed ones.
TOKENS_PER_TILE, COLUMNS_PER_TILE = 4096, 32768
# Without Triton a tile's gradient is built of seven float32 copies of it and one of bools.
_TILE_COPIES_ON_CPU = 7 * 4 + 1


@dataclass(frozen=True)
class Head:
    """The temporaries of the head of one micro-batch, in bytes.

    Args:
        logits: Tiles or logits, with their casts and gradients, and the gradient of the hidden states.
        gradient: The dense gradient of the output embedding in float32, and in its own dtype.
        kept_gradient: What of it stays until the backward pass has reached the input embedding, if that is the same.
    """

    logits: int
    gradient: int
    kept_gradient: int


def fused_head(shapes: ModelShapes, positions: int, *, is_trained: bool, device: str, models: int = 1) -> Head:
    """Return what TRL's fused head takes.

    Args:
        shapes: The model.
        positions: N, tokens of the micro-batch whose log-probability is computed.
        is_trained: Whether the output embedding gets a gradient.
        device: `cuda`, where a kernel works in the tile; `cpu`, where its steps take copies.
        models: Whose tiles are there at a time.
    """
    item, width = shapes.dtype.itemsize, shapes.width
    rows, columns = min(positions, TOKENS_PER_TILE), min(shapes.vocabulary, COLUMNS_PER_TILE)
    # The tile has all columns of a chunk, also where the vocabulary has fewer.
    logits = rows * COLUMNS_PER_TILE * item
    if device == "cpu":
        copies = rows * columns * _TILE_COPIES_ON_CPU
        # Products are added up in float32, from casts of the tile and of the chunk.
        casts = 4 * (rows * columns + max(columns, rows) * width)
        logits += max(copies, casts)
    # The hidden states of the positions, and their gradient in float32.
    logits = models * logits + positions * width * (item + 4)
    embedding = shapes.vocabulary * width
    gradient = embedding * 4 if is_trained else 0
    own = embedding * item if is_trained else 0
    return Head(logits=logits, gradient=gradient, kept_gradient=own)


def whole_head(shapes: ModelShapes, positions: int, *, is_trained: bool) -> Head:
    """Return what a trainer takes that holds all logits: them, their softmax and its gradient.

    Args:
        shapes: The model.
        positions: N, tokens of the micro-batch that have logits.
        is_trained: Whether the output embedding gets a gradient.
    """
    item = shapes.dtype.itemsize
    logits = positions * shapes.vocabulary * item * 3
    own = shapes.vocabulary * shapes.width * item if is_trained else 0
    return Head(logits=logits, gradient=own, kept_gradient=own)


def no_head() -> Head:
    """Return what a model without a vocabulary takes: a reward model has one number per sequence."""
    return Head(0, 0, 0)
