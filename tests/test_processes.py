"""Processes of one launch, played by threads that share a store in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from subnet_ft import processes
from subnet_ft.errors import LaunchError, RecipeError, StageError
from subnet_ft.processes import Processes

Outcome = Any


def played(part: Callable[[Processes], Outcome], *, count: int = 3, per_machine: int = 3) -> list[Outcome]:
    """Let threads play the processes of a launch; returns what each returned, or raised, by rank."""
    store, outcomes = HashStore(), [None] * count

    def play(rank: int) -> None:
        try:
            outcomes[rank] = part(Processes(store, rank=rank, count=count, local_rank=rank % per_machine))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=play, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 20
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0.0))
    assert not any(thread.is_alive() for thread in threads), "a process waits for ever"
    return outcomes


def test_first_alone_works_once_and_gives_all_the_result() -> None:
    done: list[int] = []

    def part(launch: Processes) -> Any:
        def work() -> dict[str, Any]:
            done.append(launch.rank)
            time.sleep(0.3)
            return {"sha256": "ab", "seconds": 0.5, "memory": None}

        return launch.first_alone("stage full", work)

    assert played(part) == [{"sha256": "ab", "seconds": 0.5, "memory": None}] * 3
    assert done == [0]


@pytest.mark.parametrize(
    "error", [StageError("`runs/x` is not empty."), RecipeError("x.yaml", ["seed: must be >= 0, got -1"])]
)
def test_first_alone_ends_all_with_the_first_ones_error(error: Exception) -> None:
    def part(launch: Processes) -> Any:
        def work() -> None:
            raise error

        return launch.first_alone("stage full", work)

    for found in played(part):
        assert type(found) is type(error)
        assert str(found) == str(error)


def test_first_alone_keeps_what_kind_of_unexpected_error_it_was() -> None:
    def part(launch: Processes) -> Any:
        return launch.first_alone("read", lambda: Path("/no/such/file").read_text() if launch.rank else 1 // 0)

    first, second, _ = played(part)
    assert type(first) is ZeroDivisionError
    assert type(second) is RuntimeError
    assert "ZeroDivisionError in another process" in str(second)

    def missing(launch: Processes) -> Any:
        return launch.first_alone("read", lambda: Path("/no/such/file").read_text())

    first, second, _ = played(missing)
    assert type(first) is FileNotFoundError
    assert type(second) is OSError
    assert "/no/such/file" in str(second)


def test_first_alone_within_itself_waits_for_nobody() -> None:
    def part(launch: Processes) -> Any:
        inner = launch.first_alone("report", lambda: launch.first_alone("evidence", lambda: [launch.rank]))
        return inner, launch.first_alone("next", lambda: launch.rank)

    assert played(part) == [([0], 0)] * 3


def test_first_alone_reports_a_result_that_cannot_travel_to_all() -> None:
    first, second, _ = played(lambda launch: launch.first_alone("path", lambda: Path("x")))
    assert type(first) is TypeError
    assert "not JSON serializable" in str(second)


def test_everywhere_returns_each_ones_own_result() -> None:
    assert played(lambda launch: launch.everywhere("rank", lambda: Path(str(launch.rank)))) == [
        Path("0"),
        Path("1"),
        Path("2"),
    ]


@pytest.mark.parametrize("in_turn", [False, True])
def test_everywhere_fails_in_all_where_one_fails(in_turn: bool) -> None:
    def part(launch: Processes) -> Any:
        def work() -> None:
            if launch.rank == 2:
                raise StageError("no room.")

        return launch.everywhere("check", work, in_turn=in_turn)

    first, second, third = played(part)
    assert {type(error) for error in (first, second, third)} == {StageError}
    assert str(third) == "no room."
    assert str(first) == str(second)
    assert str(first).startswith("no room. (process 2 on `")


def test_everywhere_in_turn_lets_one_process_per_machine_begin() -> None:
    began: list[tuple[float, int]] = []
    ended: list[tuple[float, int]] = []

    def part(launch: Processes) -> Any:
        def work() -> None:
            began.append((time.monotonic(), launch.rank))
            time.sleep(0.2)
            ended.append((time.monotonic(), launch.rank))

        launch.everywhere("download", work, in_turn=True)

    played(part, count=4, per_machine=2)
    first_ends = max(moment for moment, rank in ended if rank in (0, 2))
    assert all(moment >= first_ends for moment, rank in began if rank in (1, 3))
    assert sorted(rank for _, rank in began) == [0, 1, 2, 3]


def test_gathered_gives_all_values_to_all() -> None:
    assert (
        played(lambda launch: launch.gathered("memory", {"peak": launch.rank}))
        == [[{"peak": 0}, {"peak": 1}, {"peak": 2}]] * 3
    )


def test_check_equal_names_the_process_the_key_and_both_values_everywhere() -> None:
    def part(launch: Processes) -> Any:
        launch.check_equal("recipe", {"seed": 0, "training": {"beta": 0.1 if launch.rank < 2 else 0.2}})

    for error in played(part):
        assert type(error) is LaunchError
        assert "Processes 0 on `" in str(error)
        assert " and 2 on `" in str(error)
        assert "same recipe: training.beta: 0.1 and 0.2." in str(error)
    assert played(lambda launch: launch.check_equal("recipe", {"seed": 0})) == [None] * 3


def test_check_shared_finds_a_machine_with_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_SEEN", 0.3)
    assert played(lambda launch: launch.check_shared(tmp_path / "run")) == [None] * 3
    assert list((tmp_path / "run").iterdir()) == []

    # What a machine without the shared folder finds under its name.
    def part(launch: Processes) -> Any:
        if launch.rank == 1:
            monkeypatch.setattr(Path, "exists", lambda path: False)
        launch.check_shared(tmp_path / "run")

    for error in played(part):
        assert type(error) is LaunchError
        assert "a folder that all machines share" in str(error)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_process_that_fails_by_itself_ends_those_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_PARTING", 0.5)  # nobody answers: the others do not end here

    def part(launch: Processes) -> Any:
        if launch.rank == 1:
            launch.fail(StageError("out of memory."))
            return "failed"
        return launch.gathered("memory", 0)

    first, second, third = played(part)
    assert second == "failed"
    for error in (first, third):
        assert type(error) is StageError
        assert str(error) == "out of memory. (process 1)"


def test_processes_that_came_to_different_calls_do_not_take_each_others_results() -> None:
    def part(launch: Processes) -> Any:
        return launch.first_alone("full" if launch.rank == 0 else "mask", lambda: 1)

    first, second, _ = played(part)
    assert first == 1
    assert "came to `mask`, another one to `full`" in str(second)


def test_leave_lets_the_first_process_go_last() -> None:
    left: list[int] = []

    def part(launch: Processes) -> Any:
        time.sleep(0.2 * launch.rank)
        launch.leave()
        left.append(launch.rank)

    played(part)
    assert sorted(left) == [0, 1, 2]


@pytest.mark.parametrize(("count", "expected"), [(None, 1), ("1", 1), ("", 1), ("x", 1), ("16", 16)])
def test_num_processes_is_what_the_launcher_says(
    count: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    if count is not None:
        monkeypatch.setenv("WORLD_SIZE", count)
    assert processes.num_processes() == expected
    assert processes.rank() == (3 if expected > 1 else 0)
    assert processes.is_first() is (expected == 1)


def test_one_process_talks_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    marker = object()
    assert processes.first_alone("work", lambda: marker) is marker
    assert processes.everywhere("work", lambda: marker) is marker
    assert processes.gathered("value", marker) == [marker]
    processes.check_equal("recipe", {"seed": marker})
    processes.check_shared(tmp_path / "no")
    processes.fail(StageError("x"))
    processes.leave()
    assert not (tmp_path / "no").exists()


def test_a_launch_without_addresses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LaunchError, match=r"WORLD_SIZE=2 .* RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT"):
        processes.first_alone("work", lambda: 1)
