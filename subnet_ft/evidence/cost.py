"""What every run cost, the making of its mask included: a subnetwork of a full run is no saving the first time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Origin: TypeAlias = Literal["full", "probe", "elsewhere", "nothing"]
PeakOf: TypeAlias = Literal["process", "device"]

_FROM_PROBE = frozenset({"early", "forecast", "gradient", "fisher"})
_FROM_BASE = frozenset({"low_magnitude", "predicted", "principal", "non_principal", "uniform"})


@dataclass(frozen=True)
class Cost:
    """The way to one trained run: from the base for the first time, and again when its mask is there.

    A figure is `None` where a part of it was not measured. Evaluation and evidence are not counted.
    """

    run: str
    """Name of the run."""
    needs: str | None
    """The earlier run that its mask was made from: the full run's name or `probe`; `None` for none, or for one that
    this report knows nothing of."""
    train_seconds: float | None
    """Its own training: what another run under the same mask takes. `None`, too, for a run that was interrupted and
    resumed, of which only the last part was timed."""
    mask_seconds: float | None
    """Making the mask when the earlier run is there; `None` for a run without a mask, too."""
    first_seconds: float | None
    """The earlier run's training, the mask and its own training."""
    peak_bytes: int | None
    """Largest memory in training: what torch allocated on the device where there is one, else the resident size of the
    process."""
    peak_of: PeakOf | None
    """Which of the two `peak_bytes` is."""
    first_peak_bytes: int | None
    """The larger of that and the earlier run's; `None`, too, where one is of the device and the other of the
    process."""
    persistent_bytes: int | None
    """What lives from one step to the next, counted from the tensors."""
    first_persistent_bytes: int | None
    """The larger of that and the earlier run's."""
    bytes_per_weight: float | None
    """`persistent_bytes` over the model's weights."""


def mask_origin(source: Mapping[str, Any], *, recipe_kind: str | None, has_tuned: bool) -> Origin:
    """Say which run a mask needs: the full run, a probe run of a few steps, one that is not in this report, or none.

    Args:
        source: The mask's own record of where it comes from.
        recipe_kind: `subnet.source.kind` of the recipe, where there is one.
        has_tuned: Whether the mask names a tuned checkpoint.
    """
    kind = source.get("kind")
    if recipe_kind == "file":
        return "elsewhere"
    if kind in _FROM_PROBE:
        return "probe"
    if kind in _FROM_BASE and "of" not in source:
        return "nothing"
    # Combinations and controls of other masks keep no record of the runs behind those.
    return "full" if kind == "extract" or has_tuned else "elsewhere"


def run_costs(
    runs: Mapping[str, str | None],
    seconds: Mapping[str, Mapping[str, float]],
    memory: Mapping[str, Mapping[str, int]],
    *,
    mask_seconds: Mapping[str, float | None],
    num_parameters: int | None,
    resumed: Collection[str] = (),
) -> list[Cost]:
    """Add up what every run needed.

    Args:
        runs: Name of every trained run to the earlier run that its mask needs, or `None`.
        seconds: Run to stage to time; those of evaluation do not count.
        memory: Run to component to bytes; `peak_device` and `peak_rss` are the largest memory of device and process.
        mask_seconds: Run under a mask to the time that it took to make it.
        num_parameters: Weights of the model.
        resumed: Runs that were interrupted, so that their time is that of the last part.

    Returns:
        One entry per run of which time or memory is known, in the given order.
    """
    train = {name: _training(stages) for name, stages in seconds.items() if name not in resumed}
    peaks = {name: _peak(sizes) for name, sizes in memory.items()}
    persistent = {name: _persistent(sizes) for name, sizes in memory.items()}
    costs = []
    for name, needed in runs.items():
        if train.get(name) is None and not memory.get(name) and name not in resumed:
            continue
        way = [name] if needed is None else [needed, name]
        times = [train.get(step) for step in way]
        if name in mask_seconds:
            times.append(mask_seconds[name])
        lasting = persistent.get(name)
        peak_bytes, peak_of = peaks.get(name, (None, None))
        way_peaks = [peaks.get(step, (None, None)) for step in way]
        are_alike = len({of for _, of in way_peaks}) == 1
        costs.append(
            Cost(
                run=name,
                needs=needed,
                train_seconds=train.get(name),
                mask_seconds=mask_seconds.get(name),
                first_seconds=_all(times, sum),
                peak_bytes=peak_bytes,
                peak_of=peak_of,
                first_peak_bytes=_all([size for size, _ in way_peaks], max) if are_alike else None,
                persistent_bytes=lasting,
                first_persistent_bytes=_all([persistent.get(step) for step in way], max),
                bytes_per_weight=lasting / num_parameters if lasting is not None and num_parameters else None,
            )
        )
    return costs


def _training(stages: Mapping[str, float]) -> float | None:
    times = [time for stage, time in stages.items() if not stage.startswith("eval")]
    return sum(times) if times else None


def _peak(sizes: Mapping[str, int]) -> tuple[int | None, PeakOf | None]:
    """Return the peak of the device, else that of the process: the two never compare."""
    if "peak_device" in sizes:
        return sizes["peak_device"], "device"
    return (sizes["peak_rss"], "process") if "peak_rss" in sizes else (None, None)


def _persistent(sizes: Mapping[str, int]) -> int | None:
    parts = [size for component, size in sizes.items() if not component.startswith("peak")]
    return sum(parts) if parts else None


def _all(values: list[Any], join: Any) -> Any:
    """Join values; what lacks a part is not known."""
    return None if any(value is None for value in values) else join(values)
