"""The time and peak memory of finding what changed between two checkpoints: ours, and two loaded models subtracted.

Every method runs in a process of its own, after its imports and after the same work on a tiny pair: what is imported
lazily, compiled or loaded from numba's cache on the first call does not count, for either side. The page cache is warm.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.errors import CheckpointError
from subnet_ft.masks import extract

OURS = "subnet-ft extract"
SUBTRACT_STORED = "transformers twice, subtract in the stored dtype"
SUBTRACT_WIDENED = "transformers twice, subtract in float32"
LOAD_WIDENED = "transformers twice in float32, subtract"
METHODS = (OURS, SUBTRACT_STORED, SUBTRACT_WIDENED, LOAD_WIDENED)

DENSITY = 0.17

_BITS = {2: torch.int16, 4: torch.int32}
_CHILD = "import sys; from subnet_ft.bench.extraction import measure_here; measure_here(*sys.argv[1:])"


def measure_extraction(
    model: str, *, repeats: int, refused: Mapping[str, str] | None = None, density: float = DENSITY
) -> list[dict[str, Any]]:
    """Compare `model` with a copy of itself in which some weights have moved; return the rows of `measure`.

    Args:
        model: Any name that `open_checkpoint` takes.
        repeats: Timed runs per method.
        refused: Op to the reason why no speed may be shown for it; our row then has none.
        density: Share of the weights that have moved, each to a neighbouring value.
    """
    base = open_checkpoint(model).folder
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(base, perturbed_copy(base, Path(folder) / "tuned", density), repeats)
    reason = (refused or {}).get("compare")
    return rows if reason is None else _without_speed(rows, reason)


def measure(base: Path, tuned: Path, repeats: int) -> list[dict[str, Any]]:
    """Measure every method on two checkpoint folders of one model.

    Args:
        base: Before training.
        tuned: After training.
        repeats: Timed runs per method.

    Returns:
        A row per method: `density` of what it found, `median_ms`, `fastest_ms` and `peak_bytes`: resident memory at
        its peak beyond what was resident before the first run, mapped files included (`None` without /proc). Our row
        has no times where we found another density than one of the others, and says so under `refused`.
    """
    tiny = open_checkpoint("tiny:llama").folder
    with tempfile.TemporaryDirectory() as folder:
        warm_up = [str(tiny), str(perturbed_copy(tiny, Path(folder) / "tuned", DENSITY))]
        rows = [_in_a_fresh_process(method, [str(base), str(tuned), *warm_up, str(repeats)]) for method in METHODS]
    ours, *others = rows
    for row in others:
        # Both are a count over the same number of weights, so one weight more or less shows.
        if row["density"] != ours["density"]:
            return _without_speed(
                rows, f"`extract` found a density of {ours['density']!r}, `{row['method']}` one of {row['density']!r}"
            )
    return rows


def _without_speed(rows: list[dict[str, Any]], reason: str) -> list[dict[str, Any]]:
    """Take our times, those of the first row, out of the rows."""
    return [{**rows[0], "median_ms": None, "fastest_ms": None, "refused": reason}, *rows[1:]]


def perturbed_copy(base: Path, folder: Path, density: float) -> Path:
    """Copy a checkpoint folder and move a random share of its weights to a neighbouring value; returns `folder`.

    Args:
        base: A folder with safetensors files.
        folder: Where to; it must not exist.
        density: Share of every tensor's weights that move.
    """
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(0)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for tensor in tensors.values():
            moved = torch.rand(tensor.shape, generator=generator) < density
            tensor.view(_BITS[tensor.element_size()]).bitwise_xor_(moved.to(_BITS[tensor.element_size()]))
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def measure_here(method: str, base: str, tuned: str, tiny_base: str, tiny_tuned: str, repeats: str) -> None:
    """Measure one method in this process and write its row to standard output; `measure` starts the process."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    run = _RUNS[method]
    run(tiny_base, tiny_tuned)
    for folder in (base, tuned):
        for file in Path(folder).glob("*.safetensors"):
            with file.open("rb") as stream:
                while stream.read(1 << 20):
                    pass  # so that it is in the page cache, whichever method comes first
    before = _start_of_peak()
    times, peak = [], None
    for _ in range(int(repeats)):
        began = time.perf_counter()
        density = run(base, tuned)
        times.append(1000 * (time.perf_counter() - began))
        if peak is None and before is not None:
            peak = _status("VmHWM") - before  # of the first run: what later ones keep in reserve is not theirs
    row = {
        "op": "extract",
        "method": method,
        "density": density(),
        "median_ms": statistics.median(times),
        "fastest_ms": min(times),
        "peak_bytes": peak,
    }
    sys.stdout.write(json.dumps(row) + "\n")


def _in_a_fresh_process(method: str, arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, method, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(f"`{method}` failed on `{arguments[0]}` and `{arguments[1]}`: {reason}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _extracted(base: str, tuned: str) -> Callable[[], float]:
    mask = extract(base, tuned)
    return lambda: mask.density


def _subtracted(base: str, tuned: str, *, loaded: Any, widened: bool) -> Callable[[], float]:
    from transformers import AutoModelForCausalLM

    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype=loaded) for folder in (base, tuned))
    new = dict(after.named_parameters())
    masks = {}
    with torch.no_grad():
        for name, old in before.named_parameters():
            delta = new[name].float() - old.float() if widened else new[name] - old
            masks[name] = delta != 0
    return lambda: sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


_RUNS: dict[str, Callable[[str, str], Callable[[], float]]] = {
    OURS: _extracted,
    SUBTRACT_STORED: lambda base, tuned: _subtracted(base, tuned, loaded="auto", widened=False),
    SUBTRACT_WIDENED: lambda base, tuned: _subtracted(base, tuned, loaded="auto", widened=True),
    LOAD_WIDENED: lambda base, tuned: _subtracted(base, tuned, loaded=torch.float32, widened=False),
}


def _start_of_peak() -> int | None:
    """Set the peak of resident memory back to what is resident now, and return that; None where it cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmRSS")
    except OSError:
        return None


def _status(field: str) -> int:
    """Return bytes of this process by the name that Linux gives them."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(f"{field}:"))
