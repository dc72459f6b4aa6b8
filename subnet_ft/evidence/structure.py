"""Structure of a mask: how its weights spread over rows, columns, heads and the kernels' tiles, against random masks."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spread:
    """How the trainable weights of one tensor spread over its rows, its columns or its heads.

    In the summary of a kind, `num_groups` is a sum and every other figure a mean over the kind's tensors.
    """

    num_groups: int
    """Rows, columns or heads."""
    variance_ratio: float | None
    """Variance of the groups' counts over that of independent draws (hypergeometric): 1 is no structure. Its root says
    how many times wider the densities spread. `None` where every draw is the same."""
    gini: float | None
    """Gini coefficient of the counts: 0 when all groups have the same, towards 1 when one has all; `None` if empty."""
    entropy: float | None
    """Entropy of the counts over its largest value, in [0, 1]: 1 when all groups have the same; `None` if empty."""
    low: float
    """Density that 5 % of the groups stay below."""
    median: float
    """Density of the middle group."""
    high: float
    """Density that 5 % of the groups exceed."""
    empty_share: float
    """Share of groups without a trainable weight."""
    empty_expected: float
    """The same for independent draws of the same count."""


@dataclass(frozen=True)
class TensorStructure:
    """The structure of one tensor, or the means of a kind's tensors."""

    num_tensors: int
    """1, or how many tensors the means are over."""
    shape: list[int]
    """Shape of the tensor, or of the kind's first one."""
    density: float
    """Share of trainable weights."""
    rows: Spread | None
    """Rows as stored, of every matrix of a stack; `None` for tensors with fewer than two axes."""
    columns: Spread | None
    """Columns as stored; `None` as for rows."""
    heads: Spread | None
    """Attention heads; `None` where the model's configuration does not say how the tensor is cut into heads."""
    head_densities: list[float]
    """Density of every head, in order; empty without heads, and in means."""
    empty_tiles: float
    """Share of the kernels' tiles of 1,024 consecutive weights without a trainable weight."""
    empty_tiles_expected: float
    """The same for independent draws of the same count."""
    empty_words: float
    """Share of 32 consecutive weights, one word of the bitmap, without a trainable weight."""
    empty_words_expected: float
    """The same for independent draws of the same count."""


@dataclass(frozen=True)
class Structure:
    """The structure of a mask, and of a control mask of the same size."""

    tensors: dict[str, TensorStructure]
    """By parameter name."""
    by_kind: dict[str, TensorStructure]
    """Kind of matrix, such as `mlp.up_proj.weight`, to the means over its layers."""
    control: Structure | None = field(default=None)
    """The same figures of the magnitude-matched control, which tell clustering from the structure of |w|."""
