"""Structure of a mask: how it spreads over rows, columns, heads and the kernels' tiles, against random masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import subnet_kernels
from subnet_ft.masks.density import layer_and_kind

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from subnet_ft.masks import SubnetMask, TensorMask

_CHUNK = 1 << 20  # weights unpacked at a time
_BYTES = 1 << 17  # bytes of a mask looked at a time: a multiple of the runs' sizes
_WORD = 32  # weights whose bits the kernels read at once

# Projection to the axis along which heads lie side by side, and whether query heads share them.
_HEADS_OF: dict[str, tuple[Literal["rows", "columns"], bool]] = {
    "q_proj": ("rows", False),
    "k_proj": ("rows", True),
    "v_proj": ("rows", True),
    "o_proj": ("columns", False),
    "out_proj": ("columns", False),
}


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


def mask_structure(
    mask: SubnetMask,
    *,
    config: PretrainedConfig | None = None,
    control: SubnetMask | None = None,
    progress: bool = False,
) -> Structure:
    """Measure how a mask's weights spread; memory is the masks and a few pieces of a tensor.

    Independent draws are a uniformly random mask with as many weights in the tensor. It is a null that small weights
    alone break, since magnitudes differ from row to row: judge clustering by `control`.

    Args:
        mask: The mask.
        config: The model's configuration, such as `Checkpoint.config`, for its attention heads.
        control: A mask of the same size, such as `control_mask(mask, "magnitude_matched", ...)`.
        progress: Show a progress bar on standard error.

    Raises:
        MaskMismatchError: `control` has other tensors or shapes.
    """
    from tqdm import tqdm

    masks = [mask] if control is None else [mask, control]
    mask.check_shapes({name: tensor.shape for name, tensor in masks[-1].tensors.items()})
    found: list[Structure] = []
    done = 0
    with tqdm(
        total=len(masks) * mask.num_parameters,
        desc="Counting rows and columns",
        unit="weight",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for one in reversed(masks):
            tensors = {}
            for name, tensor in one.tensors.items():
                tensors[name] = _tensor_structure(tensor, head_split(name, tensor.shape, config), bar.update)
                done += tensor.num_elements
                bar.update(done - bar.n)  # vectors and empty tensors took no time
            found.append(Structure(tensors, _by_kind(tensors), found[-1] if found else None))
    return found[-1]


def head_split(
    name: str, shape: tuple[int, ...], config: PretrainedConfig | None
) -> tuple[Literal["rows", "columns"], int] | None:
    """Say how a projection is cut into attention heads: along its rows or columns, and into how many.

    `None` without a configuration, for other tensors, for fused projections, and where the sizes do not fit.
    """
    leaf = name.split(".")[-2] if "." in name else ""
    if config is None or len(shape) != 2 or leaf not in _HEADS_OF:
        return None
    settings = config.get_text_config()
    num_heads = getattr(settings, "num_attention_heads", None)
    if not isinstance(num_heads, int):
        return None
    axis, is_shared = _HEADS_OF[leaf]
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // num_heads
    heads = (getattr(settings, "num_key_value_heads", None) or num_heads) if is_shared else num_heads
    return (axis, heads) if shape[0 if axis == "rows" else 1] == heads * head_dim else None


def _tensor_structure(
    tensor: TensorMask, split: tuple[Literal["rows", "columns"], int] | None, advance: Callable[[int], object]
) -> TensorStructure:
    rows = columns = heads = None
    head_densities: list[float] = []
    if len(tensor.shape) >= 2 and tensor.num_elements:
        row_counts, column_counts = _row_and_column_counts(tensor, advance)
        rows, columns = _spread(row_counts, tensor), _spread(column_counts, tensor)
        if split is not None:
            counts = (row_counts if split[0] == "rows" else column_counts).reshape(split[1], -1).sum(axis=1)
            heads = _spread(counts, tensor)
            head_densities = [float(share) for share in counts * len(counts) / tensor.num_elements]
    return TensorStructure(
        num_tensors=1,
        shape=list(tensor.shape),
        density=tensor.count / max(tensor.num_elements, 1),
        rows=rows,
        columns=columns,
        heads=heads,
        head_densities=head_densities,
        empty_tiles=_empty_runs(tensor, subnet_kernels.TILE_SIZE),
        empty_tiles_expected=_chance_of_none(tensor, subnet_kernels.TILE_SIZE),
        empty_words=_empty_runs(tensor, _WORD),
        empty_words_expected=_chance_of_none(tensor, _WORD),
    )


def _row_and_column_counts(
    tensor: TensorMask, advance: Callable[[int], object]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Count the trainable weights of every row and column, matrix after matrix of a stack, piece by piece."""
    *stack, num_rows, num_columns = tensor.shape
    num_matrices = math.prod(stack)
    rows = np.zeros((num_matrices, num_rows), dtype=np.int64)
    columns = np.zeros((num_matrices, num_columns), dtype=np.int64)
    step = max(1, _CHUNK // max(num_columns, 1))
    for matrix in range(num_matrices if tensor.count else 0):
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            first = (matrix * num_rows + start) * num_columns
            dense = _dense(tensor, first, first + (stop - start) * num_columns).reshape(-1, num_columns)
            rows[matrix, start:stop] = np.count_nonzero(dense, axis=1)
            columns[matrix] += np.count_nonzero(dense, axis=0)
            advance(dense.size)
    return rows.reshape(-1), columns.reshape(-1)


def _dense(tensor: TensorMask, start: int, stop: int) -> np.ndarray[Any, Any]:
    """Return (stop - start,) bool, the mask of the flat elements from `start` on."""
    first = start // 8
    bits = tensor.bits[first : (stop + 7) // 8]
    return subnet_kernels.unpack_bits(bits, stop - 8 * first)[start - 8 * first :].numpy()


def _spread(counts: np.ndarray[Any, Any], tensor: TensorMask) -> Spread:
    """Summarise the (G,) counts of groups of equal size that make up a tensor."""
    num_groups, count, num_elements = len(counts), tensor.count, tensor.num_elements
    size = num_elements // num_groups
    density = count / num_elements
    expected = size * density * (1 - density) * (num_elements - size) / max(num_elements - 1, 1)
    observed = float(np.mean((counts - count / num_groups) ** 2))
    shares = counts[counts > 0] / max(count, 1)
    ordered = np.sort(counts)
    places = np.arange(1, num_groups + 1)
    low, median, high = (float(value) for value in np.quantile(counts / size, (0.05, 0.5, 0.95)))
    return Spread(
        num_groups=num_groups,
        variance_ratio=observed / expected if expected else None,
        gini=float(2 * (places * ordered).sum() / (num_groups * count) - (num_groups + 1) / num_groups)
        if count
        else None,
        entropy=float(-(shares * np.log(shares)).sum() / math.log(num_groups)) if count and num_groups > 1 else None,
        low=low,
        median=median,
        high=high,
        empty_share=float(np.mean(counts == 0)),
        empty_expected=_chance_of_none(tensor, size),
    )


def _empty_runs(tensor: TensorMask, size: int) -> float:
    """Share of runs of `size` consecutive weights, the last one maybe shorter, without a trainable one."""
    if not tensor.count:
        return 1.0
    bits, width = tensor.bits.numpy(), size // 8
    num_empty = 0
    for start in range(0, bits.size, _BYTES):
        part = bits[start : start + _BYTES]
        runs = np.bitwise_or.reduceat(part, np.arange(0, part.size, width))
        num_empty += int(np.count_nonzero(runs == 0))
    return num_empty / -(-bits.size // width)


def _chance_of_none(tensor: TensorMask, size: int) -> float:
    """Probability that `size` given weights are all frozen when the tensor's trainable ones are drawn at random."""
    others = tensor.num_elements - tensor.count
    size = min(size, tensor.num_elements)
    if size > others:
        return 0.0

    def log_factorial_ratio(number: int) -> float:
        return math.lgamma(number + 1) - math.lgamma(number - size + 1)

    return math.exp(min(log_factorial_ratio(others) - log_factorial_ratio(tensor.num_elements), 0.0))


def _by_kind(tensors: dict[str, TensorStructure]) -> dict[str, TensorStructure]:
    kinds: dict[str, list[TensorStructure]] = {}
    for name, entry in tensors.items():
        kinds.setdefault(layer_and_kind(name)[1], []).append(entry)
    return {kind: _mean_structure(entries) for kind, entries in kinds.items()}


def _mean_structure(entries: list[TensorStructure]) -> TensorStructure:
    def mean_spread(spreads: list[Spread | None]) -> Spread | None:
        present = [spread for spread in spreads if spread is not None]
        if not present:
            return None
        means = {key.name: _mean(getattr(spread, key.name) for spread in present) for key in fields(Spread)}
        return Spread(**{**means, "num_groups": sum(spread.num_groups for spread in present)})  # type: ignore[arg-type]

    return TensorStructure(
        num_tensors=len(entries),
        shape=entries[0].shape,
        density=_mean(entry.density for entry in entries) or 0.0,
        rows=mean_spread([entry.rows for entry in entries]),
        columns=mean_spread([entry.columns for entry in entries]),
        heads=mean_spread([entry.heads for entry in entries]),
        head_densities=[],
        empty_tiles=_mean(entry.empty_tiles for entry in entries) or 0.0,
        empty_tiles_expected=_mean(entry.empty_tiles_expected for entry in entries) or 0.0,
        empty_words=_mean(entry.empty_words for entry in entries) or 0.0,
        empty_words_expected=_mean(entry.empty_words_expected for entry in entries) or 0.0,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
