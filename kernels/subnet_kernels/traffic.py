"""Counted bytes per weight: what an optimizer step has to move between memory and chip, by formula.

Memory moves in sectors of 32 bytes on a GPU and in lines of 64 bytes on a CPU, so a scattered access costs a whole one.
Masks are taken as uniform random, which touches the most sectors; masks with structure cost less.
"""

from __future__ import annotations

from subnet_kernels.layout import TILE_SIZE

GPU_SECTOR_BYTES = 32
CPU_LINE_BYTES = 64

MASTER_BYTES = {"float32": 4, "remainder": 2, "none": 0}
"""Bytes of a master; `none` is a float32 weight that is its own, or a bfloat16 one that is rounded stochastically."""


def touched(density: float, element_bytes: int, sector_bytes: int) -> float:
    """Return the share of sectors that hold at least one of the chosen elements.

    Args:
        density: Share of the elements that are chosen, in [0, 1], independently of each other.
        element_bytes: Of one element.
        sector_bytes: What memory moves at once.

    Example:
        Half of all float32 in sectors of 8 bytes: 1 - 0.5 ** 2 = 0.75.
    """
    return 1.0 - (1.0 - density) ** (sector_bytes // element_bytes)


def step_traffic_by_part(
    density: float,
    *,
    compaction: bool = False,
    weight_bytes: int = 2,
    grad_bytes: int | None = 2,
    master: str = "float32",
    changed: float | None = 0.01,
    sector_bytes: int = CPU_LINE_BYTES,
) -> dict[str, float]:
    """Return bytes per weight of one AdamW step, read and written, by what they belong to.

    Args:
        density: Trainable share of the weights, in [0, 1].
        compaction: Count the pass that moves the dense gradient into a compact buffer, and the reading of the buffer.
        weight_bytes: Of one weight: 2 or 4.
        grad_bytes: Of one element of a dense gradient; `None` where the gradient already is compact float32.
        master: One of `MASTER_BYTES`.
        changed: With float32 masters, the share of the trainable weights whose rounding changes; only those are
            written. `None` where the weights are not known to be their masters rounded: then all are written.
        sector_bytes: What memory moves at once.

    Example:
        Density 1, float32 masters, dense bfloat16 gradient, all written: 2 (gradient) + 16 (moments) + 8 (masters)
        + 2 (weights) = 28 bytes.

    Raises:
        ValueError: `master` is unknown, or `density` or `changed` outside [0, 1].
    """
    for name, share in {"density": density, "changed": 1.0 if changed is None else changed}.items():
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"`{name}` must be in [0, 1], got {share}")
    if master not in MASTER_BYTES:
        raise ValueError(f"`master` must be one of {', '.join(MASTER_BYTES)}, got {master!r}")
    if compaction and grad_bytes is None:
        raise ValueError("`compaction` reads a dense gradient: `grad_bytes` must be given")
    # A full mask needs no bits. Others are read once per pass: a bit per weight and an int32 per tile.
    mask = 0.0 if density == 1.0 else 1 / 8 + 4 / TILE_SIZE
    gradient = 4 * density if grad_bytes is None else grad_bytes * touched(density, grad_bytes, sector_bytes)
    if compaction:
        gradient += 2 * 4 * density
    return {
        "mask": 2 * mask if compaction else mask,
        "gradient": gradient,
        "moments": 16 * density,
        "masters": 2 * MASTER_BYTES[master] * density,
        "weights": _weights(density, weight_bytes, master, changed, sector_bytes),
    }


def step_traffic(
    density: float,
    *,
    compaction: bool = False,
    weight_bytes: int = 2,
    grad_bytes: int | None = 2,
    master: str = "float32",
    changed: float | None = 0.01,
    sector_bytes: int = CPU_LINE_BYTES,
) -> float:
    """Return the sum of `step_traffic_by_part`.

    Example:
        Density 1, float32 masters, dense bfloat16 gradient, all weights written: 28 bytes per weight.
    """
    parts = step_traffic_by_part(
        density,
        compaction=compaction,
        weight_bytes=weight_bytes,
        grad_bytes=grad_bytes,
        master=master,
        changed=changed,
        sector_bytes=sector_bytes,
    )
    return sum(parts.values())


def _weights(density: float, weight_bytes: int, master: str, changed: float | None, sector_bytes: int) -> float:
    if master != "float32":
        return 2 * weight_bytes * touched(density, weight_bytes, sector_bytes)
    written = weight_bytes * touched(density if changed is None else density * changed, weight_bytes, sector_bytes)
    # A sector that is written in part and was not read before has to be fetched first; one written whole has not.
    is_whole = density == 1.0 and changed in (None, 1.0)
    return written if is_whole else 2 * written
