"""The processes of one launch, and what they tell each other outside of training.

`accelerate launch` starts one command once per GPU. All processes walk through the same stages: what trains is done by
all of them together, everything else by the first alone, while the others wait for its result. They talk through the
key-value store over which torch's process groups find each other, not through such a group: a store has no time limit,
so that they may wait for hours; it is there before any group is, and needs no other network. With one process every
function here does its work and nothing else.

All processes must make the same calls in the same order.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from subnet_ft import errors
from subnet_ft.errors import LaunchError, SubnetError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_LONGEST_PAUSE = 0.25
"""Seconds between two looks at the store, at most; they begin at a millisecond."""
_SEEN = 30.0
"""Seconds after which a file that the first process made is there for all: network file systems are late."""
_LEAVING = 60.0
"""Seconds that the first process, which may host the store, waits at the end for the others to have read it."""

_PARTING = 3.0
"""Seconds that a process which failed leaves the others to hear of it."""


class Processes:
    """The processes of a launch, as one of them sees them.

    Args:
        store: What they all read and write; only this class uses its keys.
        rank: Of this process, from 0.
        count: How many there are.
        local_rank: Of this process among those on its machine.
    """

    def __init__(self, store: Store, *, rank: int, count: int, local_rank: int) -> None:
        self.rank = rank
        self.count = count
        self.local_rank = local_rank
        self._store = store
        self._calls = 0
        self._is_alone = False

    def first_alone(self, what: str, work: Callable[[], T]) -> T:
        """Do `work` in the first process while the others wait; all return its result, or raise its error.

        Args:
            what: Names the work; the same in all processes.
            work: Returns what JSON can hold. May call this function again: the first process is alone then.
        """
        if self._is_alone:
            return work()
        key = self._next(what)
        if self.rank > 0:
            said = self._hear(key, what)
            if "error" in said:
                raise _error_of(said["error"])
            result: T = said["result"]
            return result
        self._is_alone = True
        try:
            result = work()
            self._say(key, {"what": what, "result": result})
        except Exception as error:
            self._say(key, {"what": what, "error": _said_of(error)})
            raise
        finally:
            self._is_alone = False
        return result

    def everywhere(self, what: str, work: Callable[[], T], *, in_turn: bool = False) -> T:
        """Do `work` in every process and return each one's own result; where it fails in one, it fails in all.

        Args:
            what: Names the work; the same in all processes.
            work: Makes none of these calls.
            in_turn: Let the first process of every machine do it before the others on that machine, which then find
                in the caches what it downloaded or built.
        """
        if not in_turn:
            return self._at_once(what, work)
        is_first_here = self.local_rank == 0
        early = self._at_once(f"{what}, first", lambda: work() if is_first_here else None)
        late = self._at_once(what, lambda: None if is_first_here else work())
        return early if is_first_here else late  # type: ignore[return-value]  # `None` is the one of the other turn

    def gathered(self, what: str, value: T) -> list[T]:
        """Return what every process gives, JSON values, in the order of their ranks."""
        key = self._next(what)
        self._say(f"{key}/{self.rank}", {"what": what, "result": value})
        return [self._hear(f"{key}/{rank}", what)["result"] for rank in range(self.count)]

    def check_equal(self, what: str, value: dict[str, Any]) -> None:
        """Check that all processes have the same JSON object.

        Raises:
            LaunchError: In all of them, naming the first process that differs and the keys.
        """
        own = dict(_leaves(json.loads(json.dumps(value))))
        hosts, found = self.gathered(f"{what}, machine", platform.node()), self.gathered(what, own)
        host, expected = hosts[0], found[0]
        for rank, (other, values) in enumerate(zip(hosts, found, strict=True)):
            keys = [key for key in {**expected, **values} if expected.get(key) != values.get(key)]
            if keys:
                theirs = ", ".join(
                    f"{key}: {_short(expected.get(key))} and {_short(values.get(key))}" for key in keys[:5]
                )
                raise LaunchError(
                    f"Processes 0 on `{host}` and {rank} on `{other}` do not have the same {what}: {theirs}. Start all "
                    "processes with the same command, files and versions."
                )

    def check_shared(self, folder: Path) -> None:
        """Check that all processes see one folder, which may not exist yet.

        Raises:
            LaunchError: In all of them, naming a process that has another one.
        """

        def mark() -> str:
            folder.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(prefix=".seen-by-all-", dir=folder)
            os.close(handle)
            return path

        def look() -> None:
            until = time.monotonic() + _SEEN
            while not marked.exists():
                if time.monotonic() > until:
                    raise LaunchError(
                        f"`{folder}` on `{platform.node()}` is not the folder that the first process writes to. Choose "
                        "an `output` in a folder that all machines share."
                    )
                os.listdir(folder.parent)  # makes a network file system look again
                time.sleep(0.1)

        marked = Path(self.first_alone("mark in the folder", mark))
        try:
            self.everywhere("look at the folder", look)
        finally:
            if self.rank == 0:
                marked.unlink(missing_ok=True)

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process ends with an error, and leave those that can hear it a moment to end, too.

        A launcher stops the others as soon as one has ended, and what they have to say would be lost.
        """
        with contextlib.suppress(Exception):  # the store may have gone with its host
            self._say("failed", {"rank": self.rank, "error": _said_of(error)})
            self._leave(range(self.count), _PARTING)

    def leave(self) -> None:
        """End together: the first process, which may host the store, last."""
        self.gathered("end", self.rank)
        self._leave(range(self.count) if self.rank == 0 else [], _LEAVING)

    def _leave(self, others: Iterable[int], seconds: float) -> None:
        self._say(f"left/{self.rank}", {})
        waiting = [f"left/{rank}" for rank in others]
        until = time.monotonic() + seconds
        while waiting and time.monotonic() < until and not self._store.check(waiting):
            time.sleep(0.01)

    def _at_once(self, what: str, work: Callable[[], T]) -> T:
        key, mine = self._next(what), f"process {self.rank} on `{platform.node()}`"
        try:
            result = work()
        except Exception as error:
            self._say(f"{key}/{self.rank}", {"what": what, "error": _said_of(error), "who": mine})
            raise
        self._say(f"{key}/{self.rank}", {"what": what})
        for rank in range(self.count):
            said = self._hear(f"{key}/{rank}", what)
            if "error" in said:
                raise _error_of(said["error"], said["who"])
        return result

    def _next(self, what: str) -> str:
        assert not self._is_alone, f"`{what}` needs all processes, and the first is alone"
        self._calls += 1
        return str(self._calls)

    def _say(self, key: str, value: dict[str, Any]) -> None:
        self._store.set(key, json.dumps(value))

    def _hear(self, key: str, what: str) -> dict[str, Any]:
        """Wait for what another process says; Ctrl-C ends it, and so does a process that says that it failed."""
        pause = 0.001
        while not self._store.check([key]):
            if self._store.check(["failed"]):
                failed = self._heard("failed")
                if failed["rank"] != self.rank:
                    raise _error_of(failed["error"], f"process {failed['rank']}")
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
        said = self._heard(key)
        if said["what"] != what:
            raise RuntimeError(f"Process {self.rank} came to `{what}`, another one to `{said['what']}`.")
        return said

    def _heard(self, key: str) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(self._store.get(key))
        return said


def num_processes() -> int:
    """Return how many processes this launch has; 1 without a launcher."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() and int(count) > 1 else 1


def rank() -> int:
    """Return the number of this process in its launch, from 0."""
    return int(os.environ["RANK"]) if num_processes() > 1 and "RANK" in os.environ else 0


def is_first() -> bool:
    """Whether this process writes what there is one of: files, lines on stdout."""
    return rank() == 0


def first_alone(what: str, work: Callable[[], T]) -> T:
    """Do `work` in the first process alone (see `Processes.first_alone`)."""
    return work() if num_processes() == 1 else _launched().first_alone(what, work)


def everywhere(what: str, work: Callable[[], T], *, in_turn: bool = False) -> T:
    """Do `work` in every process (see `Processes.everywhere`)."""
    return work() if num_processes() == 1 else _launched().everywhere(what, work, in_turn=in_turn)


def gathered(what: str, value: T) -> list[T]:
    """Return what every process gives (see `Processes.gathered`)."""
    return [value] if num_processes() == 1 else _launched().gathered(what, value)


def check_equal(what: str, value: dict[str, Any]) -> None:
    """Check that all processes have the same JSON object (see `Processes.check_equal`)."""
    if num_processes() > 1:
        _launched().check_equal(what, value)


def check_shared(folder: Path) -> None:
    """Check that all processes see one folder (see `Processes.check_shared`)."""
    if num_processes() > 1:
        _launched().check_shared(folder)


def fail(error: BaseException) -> bool:
    """Tell the other processes, if this one has talked to them, that it ends with an error; say whether it has."""
    if not _is_joined():
        return False
    _launched().fail(error)
    return True


def leave() -> None:
    """End together with the other processes, if this one has talked to them."""
    if not _is_joined():
        return
    _launched().leave()
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _is_joined() -> bool:
    return _launched.cache_info().currsize > 0


@functools.cache
def _launched() -> Processes:
    lacking = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking:
        raise LaunchError(
            f"WORLD_SIZE={num_processes()} says that this command was started in {num_processes()} processes, but "
            f"{' and '.join(lacking)} are not set. Start it with `accelerate launch --config_file FILE -m subnet_ft "
            "...` (docs/many_gpus.md), or unset WORLD_SIZE."
        )
    import torch.distributed
    from torch.distributed.distributed_c10d import PrefixStore

    # Without torchrun's own store the first process hosts one, which torch's process groups then share.
    hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank() == 0
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = torch.distributed.TCPStore(  # type: ignore[attr-defined]  # public, but not in its list of exports
        address, port, is_master=hosts, wait_for_workers=False, multi_tenant=True
    )
    # A launcher that starts the processes again keeps the store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"subnet_ft/{attempt}", shared)
    return Processes(store, rank=rank(), count=num_processes(), local_rank=int(os.environ["LOCAL_RANK"]))


def _said_of(error: BaseException) -> dict[str, str]:
    return {"kind": type(error).__name__, "message": str(error) or type(error).__name__}


def _error_of(said: dict[str, str], who: str | None = None) -> Exception:
    """Build the error that another process had: an expected one of the same class, with the same message."""
    message = said["message"] if who is None else f"{said['message']} ({who})"
    kind = getattr(errors, said["kind"], None)
    if isinstance(kind, type) and issubclass(kind, SubnetError):
        error = kind.__new__(kind)  # some are built from other things than their message
        error.args = (message,)
        return error
    builtin = getattr(builtins, said["kind"], None)
    if isinstance(builtin, type) and issubclass(builtin, OSError):
        return OSError(message)
    return RuntimeError(f"{said['kind']} in another process: {message}")


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of everything in nested JSON objects."""
    if not isinstance(value, dict):
        yield where, value
        return
    for key, entry in value.items():
        yield from _leaves(entry, f"{where}.{key}" if where else key)


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[:limit] + "..."
