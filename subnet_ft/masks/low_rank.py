"""Principal weights: how large each entry of a matrix is in the matrix's best approximation of low rank."""

from __future__ import annotations

import torch

from subnet_ft.errors import MaskError
from subnet_ft.masks.selection import tiles

RANK_SHARE = 1 / 32
"""Rank of the approximation, as a part of the smaller side, where none is given: 128 at 4,096, which the authors of
LIFT (Liu et al. 2025, arXiv 2506.00772) recommend for models of that width."""

_BLOCK = 1 << 20  # elements of a matrix that are held in float64 at a time


def low_rank_magnitudes(name: str, weight: torch.Tensor, rank: int | None = None) -> torch.Tensor:
    """Return the absolute entries of the best rank-r approximation of every matrix in a tensor.

    The last two dimensions are a matrix's; a vector is a matrix of one row, and so its own approximation.

    Args:
        name: Of the tensor, for errors.
        weight: (..., m, n) or (n,), any float dtype. In.
        rank: r >= 1; from min(m, n) on, the approximation is the matrix itself. `None`: `RANK_SHARE` of min(m, n), at
            least 1.

    Returns:
        Of the shape of `weight`, float32. Sums are float64, so that the order in which threads add is lost in the
        rounding.

    Raises:
        MaskError: A weight is not finite.

    Source: the principal mask of Zhu et al. 2025 (arXiv 2511.08567), after LIFT. The approximation is the projection
    on the leading eigenvectors of the smaller Gram matrix.
    """
    weight = weight.detach().cpu()
    matrices = weight.reshape(-1, *weight.shape[-2:]) if weight.dim() > 1 else weight.reshape(1, 1, -1)
    smaller = min(matrices.shape[1:])
    if rank is None:
        rank = max(1, int(smaller * RANK_SHARE))
    if rank >= smaller:
        return weight.abs().float()
    result = torch.empty(matrices.shape, dtype=torch.float32)
    for matrix, out in zip(matrices, result, strict=True):
        tall, out = (matrix, out) if matrix.shape[0] >= matrix.shape[1] else (matrix.T, out.T)
        rows = list(tiles(tall.shape[0], max(8, _BLOCK // tall.shape[1] // 8 * 8)))
        gram = torch.zeros(smaller, smaller, dtype=torch.float64)
        for part in rows:
            block = tall[part].double()
            gram.addmm_(block.T, block)
        if not gram.isfinite().all():
            raise MaskError(
                f"`{name}` has weights that are NaN or infinite, so it has no approximation of rank {rank}. Choose a "
                "kind that ranks weights without one, such as `low_magnitude`, or repair the checkpoint."
            )
        leading = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
        for part in rows:
            out[part] = (tall[part].double() @ leading @ leading.T).abs()
    return result.view(weight.shape)
