"""Stages of a run: a folder each, finished when `stage.json` is there, not repeated while its inputs stay the same."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subnet_ft.errors import StageError
from subnet_ft.processes import check_equal, first_alone, is_first

if TYPE_CHECKING:
    from subnet_ft.masks import SubnetMask

logger = logging.getLogger(__name__)

FINISHED = "stage.json"
STARTED = "started.json"


@dataclass(frozen=True)
class TrainedStage:
    """A finished training stage: its folder, what it measured, and its mask; `None` where there is none to keep to."""

    folder: Path
    mask: SubnetMask | None
    results: dict[str, Any]


def run_stage(
    folder: Path,
    inputs: dict[str, Any],
    work: Callable[[Path], dict[str, Any]],
    *,
    overwrite: bool,
    cheap: bool = False,
    products: Sequence[Path] = (),
    together: bool = False,
) -> dict[str, Any]:
    """Do a stage's work unless it is already done, and return what it produced.

    Of several processes the first does it while the others wait, unless they do it together; all return the same.

    Args:
        folder: The stage's folder. A stage that was interrupted finds what it left there.
        inputs: Everything the result depends on, as JSON values.
        work: Does the work inside the folder and returns results as JSON values.
        overwrite: Replace a result that was made from other inputs.
        cheap: The result costs little to make again, so that other inputs replace it without asking.
        products: Files that the work leaves; where one is missing, the work is done again.
        together: All processes do `work`, which trains; the results are those of the first.

    Returns:
        `results` of the stage, with `seconds` of the work added.

    Raises:
        StageError: The folder holds a result of other inputs, and `overwrite` is off; the message names them.
        LaunchError: Processes that work together have other inputs than the first.
    """
    inputs = json.loads(json.dumps(inputs))
    name = f"stage {folder.name}"

    def begin() -> dict[str, Any] | None:
        return _begin(folder, inputs, overwrite=overwrite, cheap=cheap, products=products)

    def finish(results: dict[str, Any], start: float) -> dict[str, Any]:
        results = {**results, "seconds": time.perf_counter() - start}
        write_json(folder / FINISHED, {"inputs": inputs, "results": results, "finished": _now()})
        (folder / STARTED).unlink()
        return results

    def do_alone() -> dict[str, Any]:
        done = begin()
        if done is not None:
            return done
        start = time.perf_counter()
        return finish(work(folder), start)

    if not together:
        return first_alone(name, do_alone)
    check_equal(f"inputs of {name}", inputs)
    done = first_alone(f"{name}, start", begin)
    if done is not None:
        return done
    start = time.perf_counter()
    results = work(folder)
    return first_alone(f"{name}, end", lambda: finish(results, start))


def _begin(
    folder: Path, inputs: dict[str, Any], *, overwrite: bool, cheap: bool, products: Sequence[Path]
) -> dict[str, Any] | None:
    """Return what a finished stage produced, or `None` after noting that it is started."""
    found = read_json(folder / FINISHED) or read_json(folder / STARTED)
    if found is None and not cheap and _holds_something(folder):
        raise StageError(
            f"`{folder}` is not empty and holds no stage of a run. Choose another `output`, or empty the folder."
        )
    if found is not None and found.get("inputs") != inputs:
        if not (overwrite or cheap):
            raise _made_with_others(folder, found.get("inputs") or {}, inputs)
        _remove(folder)
        found = None
    if found is not None and "results" in found and all(path.exists() for path in products):
        logger.info("%s: done before", folder.name)
        results: dict[str, Any] = found["results"]
        return results
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STARTED, {"inputs": inputs, "started": _now()})
    return None


def check_known_inputs(folder: Path, known: dict[str, Any]) -> None:
    """Refuse a stage that `run_stage` will refuse, while some of its inputs are still to be made at some cost.

    Args:
        folder: The stage's folder; one that holds no stage yet is not refused.
        known: The inputs that are known.

    Raises:
        StageError: The stage was made with other ones.
    """

    def check() -> None:
        found = read_json(folder / FINISHED) or read_json(folder / STARTED)
        if found is None:
            return
        expected, recorded = json.loads(json.dumps(known)), found.get("inputs") or {}
        recorded = {key: value for key, value in recorded.items() if key in expected}
        if recorded != expected:
            raise _made_with_others(folder, recorded, expected)

    first_alone(f"check of {folder.name}", check)


def finished_results(folder: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the results of a stage that was finished with the same inputs, else `None`."""

    def find() -> dict[str, Any] | None:
        found = read_json(folder / FINISHED)
        same = found is not None and found.get("inputs") == json.loads(json.dumps(inputs))
        return found["results"] if found is not None and same else None

    return first_alone(f"results of {folder.name}", find)


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Keep every other command out of a run's folder; of several processes the first holds it for all.

    Raises:
        StageError: Another command holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise StageError(
                f"Another process works in `{folder}`. Wait for it, or choose another `output`."
            ) from error

    first_alone("lock of the run", acquire)
    try:
        yield
    finally:
        if is_first():
            lock.release()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or `None` when there is no file."""
    if not path.is_file():
        return None
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise StageError(f"`{path}` is not JSON ({error}). Remove its folder to make the stage again.") from error
    return value


def add_result(folder: Path, name: str, value: Any) -> None:
    """Add to the results of a finished stage what was made of them later."""
    found = read_json(folder / FINISHED)
    assert found is not None  # the stage is finished
    write_json(folder / FINISHED, {**found, "results": {**found["results"], name: value}})


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _holds_something(folder: Path) -> bool:
    # A file that was being written when a run was killed is hidden, and is no reason to refuse.
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def _remove(folder: Path) -> None:
    """Remove a stage's folder; killed on the way, nothing half removed is left under its name."""
    if folder.is_symlink():
        folder.unlink()
        return
    aside = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def _made_with_others(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> StageError:
    changes = ", ".join(_changes(old, new)[:5])
    return StageError(
        f"`{folder}` was made with other settings: {changes}. Choose another `output`, or pass `--overwrite` "
        "to replace it."
    )


def _changes(old: Any, new: Any, where: str = "") -> list[str]:
    """List the leaves in which two JSON values differ, as `key: was OLD, is NEW`."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes = []
        for key in [*old, *(key for key in new if key not in old)]:
            if old.get(key) != new.get(key):
                changes += _changes(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        return changes
    return [f"{where}: was {_short(old)}, is {_short(new)}"]


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[:limit] + "..."


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
