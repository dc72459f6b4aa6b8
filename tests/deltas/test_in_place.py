"""Changing a folder in place: killed at every step, it holds whole files and can be finished or undone."""

from __future__ import annotations

import errno
import fcntl
import glob
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from delta_checkpoints import contents, save_pair, unchanged, weights

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.deltas import apply_delta, export_delta, revert_delta
from subnet_ft.deltas import journal as journal_module
from subnet_ft.deltas.journal import JOURNAL, STAGED, read_journal
from subnet_ft.errors import DeltaError, DeltaFileError, DeltaMismatchError

SUFFIX = ".delta.safetensors"
STEPS = ("replace", "fsync", "unlink", "pwrite", "open", "truncate")
"""What changes a folder, as functions of `os`; each call is a step at which a process may be killed."""


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Folders of a base and a tuned checkpoint of three files, and their delta."""
    base, tuned = save_pair(tmp_path, shard="20KB")
    assert len(list(base.glob("*.safetensors"))) == 3
    return base, tuned, export_delta(base, tuned, tmp_path / f"d{SUFFIX}").path


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs but what a test cannot prevent."""


def count_steps(monkeypatch: pytest.MonkeyPatch, job: Callable[[], object]) -> int:
    """Run a job and count its steps."""
    return run_until(monkeypatch, job, sys.maxsize)


def run_until(monkeypatch: pytest.MonkeyPatch, job: Callable[[], object], last: int) -> int:
    """Run a job whose every step from number `last` on fails, also those of its own cleaning up; return its steps."""
    done = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **settings: Any) -> Any:
            nonlocal done
            if done >= last:
                raise Killed
            done += 1
            return function(*arguments, **settings)

        return step

    with monkeypatch.context() as context:
        for name in STEPS:
            context.setattr(os, name, counted(getattr(os, name)))
        job()
    return done


def test_apply_in_place_stopped_at_every_step_is_finished_or_undone(
    pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, delta = pair
    old, new = contents(base), weights(tuned)
    steps = count_steps(monkeypatch, lambda: apply_delta(base, delta, in_place=True))
    assert steps > 30
    revert_delta(base)
    undone = 0
    for last in range(steps):
        with pytest.raises(Killed):
            run_until(monkeypatch, lambda: apply_delta(base, delta, in_place=True), last)
        for name, data in weights(base).items():
            assert data in (old[name], new[name]), (last, name)
        if last % 2:
            if weights(base) != new or (base / JOURNAL).exists():  # or else all was done but the last waiting
                apply_delta(base, delta, in_place=True)
            assert weights(base) == new, last
            revert_delta(base)
        elif (base / JOURNAL).exists() or weights(base) == new:
            revert_delta(base)
            undone += 1
        left = contents(base)
        left.pop(JOURNAL + STAGED, None)  # stopped before its first rename: the next call removes it
        assert left == old, last
    assert undone > 10


def test_revert_stopped_at_every_step_is_finished(
    pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, delta = pair
    old, new = contents(base), weights(tuned)
    apply_delta(base, delta, in_place=True)
    steps = count_steps(monkeypatch, lambda: revert_delta(base))
    for last in range(steps):
        apply_delta(base, delta, in_place=True)
        with pytest.raises(Killed):
            run_until(monkeypatch, lambda: revert_delta(base), last)
        for name, data in weights(base).items():
            assert data in (old[name], new[name]), (last, name)
        if (base / JOURNAL).exists() or weights(base) == new:
            revert_delta(base)
        left = contents(base)
        left.pop(JOURNAL + STAGED, None)
        assert left == old, last


def fail_once(monkeypatch: pytest.MonkeyPatch, job: Callable[[], object], number: int, error: BaseException) -> None:
    """Run a job of which one step fails; those after it, of its own cleaning up, do not."""
    done = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **settings: Any) -> Any:
            nonlocal done
            done += 1
            if done == number + 1:
                raise error
            return function(*arguments, **settings)

        return step

    with monkeypatch.context() as context:
        for name in STEPS:
            context.setattr(os, name, counted(getattr(os, name)))
        job()


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_apply_in_place_after_one_failing_step_is_undone_or_goes_on(
    kind: type[BaseException], pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, delta = pair
    old, new = contents(base), weights(tuned)
    steps = count_steps(monkeypatch, lambda: apply_delta(base, delta, in_place=True))
    revert_delta(base)
    waited = 0
    for number in range(steps):
        with pytest.raises((DeltaError, KeyboardInterrupt)):
            fail_once(
                monkeypatch, lambda: apply_delta(base, delta, in_place=True), number, kind(5, "Input/output error")
            )
        journal = read_journal(base)
        if journal is None and weights(base) != new:
            assert contents(base) == old, number
            continue
        waited += journal is not None and journal.phase == "replacing"
        if number % 2 and journal is not None:
            apply_delta(base, delta, in_place=True)
            assert weights(base) == new, number
        revert_delta(base)
        assert contents(base) == old, number
    assert waited


KILLED = """
import os, signal, sys
from subnet_ft.deltas import apply_delta, export_delta, revert_delta
import transformers.models.llama.modeling_llama

STEPS, base, delta = sys.argv[1].split(","), sys.argv[2], sys.argv[3]

def armed(function, last):
    def step(*arguments, **settings):
        global done
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return function(*arguments, **settings)
    return step

last = 0
while True:
    child = os.fork()
    if not child:
        done = 0
        for name in STEPS:
            setattr(os, name, armed(getattr(os, name), last))
        apply_delta(base, delta, in_place=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(last, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "done", flush=True)
    if not os.WIFSIGNALED(status):
        sys.exit(os.WEXITSTATUS(status))
    if sys.stdin.readline() != "next\\n":
        sys.exit(1)
    last += int(sys.argv[4])
"""


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_apply_in_place_killed_at_a_step_is_undone(pair: tuple[Path, Path, Path], stride: int) -> None:
    base, tuned, delta = pair
    old, new = contents(base), weights(tuned)
    killed = 0
    command = [sys.executable, "-c", KILLED, ",".join(STEPS), str(base), str(delta), str(stride)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if line.split()[1] == "done":
                break
            assert line.split()[1] == str(int(signal.SIGKILL))
            killed += 1
            for name, data in weights(base).items():
                assert data in (old[name], new[name]), (line, name)
            if (base / JOURNAL).exists():
                assert read_journal(base) is not None
                revert_delta(base)
            elif weights(base) == new:
                revert_delta(base)
            left = set(contents(base)) - set(old)
            assert left <= {JOURNAL + STAGED}, line  # killed before its first rename: the next journal replaces it
            assert {name: data for name, data in contents(base).items() if name in old} == old, line
            process.stdin.write("next\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert killed > 30 // stride
    assert weights(base) == new


def test_revert_undoes_one_delta_after_the_other(tmp_path: Path) -> None:
    first, second = save_pair(tmp_path / "1", seed=1)
    third = save_pair(tmp_path / "2", seed=2)[1]
    one = export_delta(first, second, tmp_path / f"1{SUFFIX}")
    two = export_delta(second, third, tmp_path / f"2{SUFFIX}")
    before = contents(first)
    apply_delta(first, one, in_place=True)
    apply_delta(first, two, in_place=True)
    assert {path.name for path in first.glob(f"*{SUFFIX}")} == {f".undo-001{SUFFIX}", f".undo-002{SUFFIX}"}
    revert_delta(first)
    assert weights(first) == weights(second)
    revert_delta(first)
    assert contents(first) == before
    with pytest.raises(DeltaError, match="no delta was applied to it in place"):
        revert_delta(first)


def test_revert_undoes_a_chain_of_three_as_one(tmp_path: Path) -> None:
    folders = list(save_pair(tmp_path / "1", seed=1))
    folders += [save_pair(tmp_path / str(seed), seed=seed)[1] for seed in (2, 3)]
    chain = [
        export_delta(before, after, tmp_path / f"{number}{SUFFIX}")
        for number, (before, after) in enumerate(itertools.pairwise(folders))
    ]
    base, before = folders[0], contents(folders[0])
    apply_delta(base, chain, in_place=True)
    assert weights(base) == weights(folders[3])
    revert_delta(base)
    assert contents(base) == before
    for delta in chain:
        apply_delta(base, delta, in_place=True)
    for folder in folders[2::-1]:
        revert_delta(base)
        if folder != base:
            assert weights(base) == weights(folder)
    assert contents(base) == before
    apply_delta(base, chain[0], in_place=True)
    with unchanged(base), pytest.raises(DeltaMismatchError, match="it has been applied already"):
        apply_delta(base, chain[0], in_place=True)


def test_apply_in_place_leaves_no_other_file_that_an_engine_would_load(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path)
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    apply_delta(base, delta, in_place=True)
    assert glob.glob(str(base / "*.safetensors")) == [str(base / "model.safetensors")]  # as vLLM does
    assert (base / f".undo-001{SUFFIX}").exists()


def test_apply_in_place_keeps_modes_and_leaves_hard_links_alone(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, delta = pair
    file = sorted(base.glob("*.safetensors"))[0]
    file.chmod(0o600)
    os.link(file, tmp_path / "other")
    before = file.read_bytes()
    apply_delta(base, delta, in_place=True)
    assert weights(base) == weights(tuned)
    assert file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "other").read_bytes() == before
    revert_delta(base)
    assert file.read_bytes() == before
    assert file.stat().st_mode & 0o777 == 0o600


def replacing(base: Path, delta: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stop an `apply` after its first weight file took its place; returns the new ones of the others."""
    steps = count_steps(monkeypatch, lambda: apply_delta(base, delta, in_place=True))
    revert_delta(base)
    for last in range(steps, 0, -1):
        with pytest.raises(Killed):
            run_until(monkeypatch, lambda last=last: apply_delta(base, delta, in_place=True), last - 1)
        waiting = sorted(base.glob(f"model*{STAGED}"))
        if len(waiting) == 2:
            return waiting
        revert_delta(base)
    raise AssertionError("never two of three")


def test_an_interrupted_apply_whose_new_files_are_gone_is_not_called_finished(
    pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, delta = pair
    waiting = replacing(base, delta, monkeypatch)
    waiting[0].unlink()
    for job in (lambda: apply_delta(base, delta, in_place=True), lambda: revert_delta(base)):
        with pytest.raises(DeltaError, match=r"in the middle of `apply`, and .* tensors are not what that leads to"):
            job()
        journal = read_journal(base)
        assert journal is not None
        assert journal.phase == "replacing"


def test_an_interrupted_apply_without_its_undo_is_finished_but_not_undone(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, delta = pair
    replacing(base, delta, monkeypatch)
    undo = base / f".undo-001{SUFFIX}"
    kept = undo.read_bytes()
    undo.unlink()
    with unchanged(base), pytest.raises(DeltaError, match="is gone, so nothing can be undone"):
        revert_delta(base)
    undo.write_bytes(delta.read_bytes())
    with unchanged(base), pytest.raises(DeltaError, match="does not belong to the `apply` that was interrupted"):
        revert_delta(base)
    undo.write_bytes(kept[:-1])
    with unchanged(base), pytest.raises(DeltaFileError, match="truncated"):
        revert_delta(base)
    undo.unlink()
    apply_delta(base, delta, in_place=True)
    assert weights(base) == weights(tuned)


def test_an_interruption_behind_the_point_of_no_return_throws_nothing_away(
    pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, delta = pair
    before = contents(base)

    def interrupt(folder: Path) -> None:
        journal = read_journal(base)
        if journal is not None and journal.phase == "replacing":
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(journal_module, "sync_folder", interrupt)
        with pytest.raises(KeyboardInterrupt):
            apply_delta(base, delta, in_place=True)
    assert len(list(base.glob(f"model*{STAGED}"))) == 3
    revert_delta(base)
    assert contents(base) == before


@pytest.mark.parametrize("step", ["pwrite", "truncate", "fsync", "open", "replace"])
def test_apply_in_place_on_a_full_or_read_only_disk_says_so_and_changes_nothing(
    step: str, pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, delta = pair
    original = getattr(os, step)
    for number in range(3):
        calls = 0

        def full(*arguments: Any, number: int = number, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > number and calls < number + 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **settings)

        with unchanged(base), monkeypatch.context() as context:
            context.setattr(os, step, full)
            with pytest.raises(DeltaError, match="No space left on device"):
                apply_delta(base, delta, in_place=True)
        leftover = base / (JOURNAL + STAGED)
        assert not leftover.exists()


def test_apply_in_place_starts_over_files_that_lost_their_journal(pair: tuple[Path, Path, Path]) -> None:
    base, tuned, delta = pair
    for file in base.glob("*.safetensors"):
        file.with_name(file.name + STAGED).write_text("left behind")
    apply_delta(base, delta, in_place=True)
    assert weights(base) == weights(tuned)
    assert not list(base.glob(f"*{STAGED}"))


def test_another_delta_may_follow_an_apply_that_changed_nothing_yet(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, delta = pair
    with pytest.raises(Killed):
        run_until(monkeypatch, lambda: apply_delta(base, delta, in_place=True), 20)
    journal = read_journal(base)
    assert journal is not None
    assert journal.phase == "preparing"
    other = save_pair(tmp_path / "2", seed=2, shard="20KB")[1]
    apply_delta(base, export_delta(base, other, tmp_path / f"2{SUFFIX}"), in_place=True)
    assert weights(base) == weights(other)


def test_apply_in_place_refuses_a_folder_that_cannot_be_locked(
    pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, delta = pair

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    with unchanged(base), monkeypatch.context() as context:
        context.setattr(fcntl, "flock", refuse)
        with pytest.raises(DeltaError, match=r"cannot be locked \(Bad file descriptor\)"):
            apply_delta(base, delta, in_place=True)


def test_revert_refuses_weights_that_changed_since(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, delta = pair
    apply_delta(base, delta, in_place=True)
    for name, data in weights(save_tiny("llama", tmp_path / "other", seed=3)).items():
        (base / name).write_bytes(data)  # one file, which goes before the index
    with pytest.raises(DeltaMismatchError, match="not those that the delta was made for"):
        revert_delta(base)


def test_apply_in_place_refuses_while_another_job_is_unfinished(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, delta = pair
    steps = count_steps(monkeypatch, lambda: apply_delta(base, delta, in_place=True))
    revert_delta(base)
    with pytest.raises(Killed):
        run_until(monkeypatch, lambda: apply_delta(base, delta, in_place=True), steps - 4)
    journal = read_journal(base)
    assert journal is not None
    assert journal.phase == "replacing"
    back = export_delta(tuned, save_tiny("llama", tmp_path / "x"), tmp_path / f"back{SUFFIX}")
    with pytest.raises(DeltaError, match="in the middle of another `apply`"):
        apply_delta(base, back, in_place=True)
    apply_delta(base, delta, in_place=True)
    assert weights(base) == weights(tuned)


def test_revert_refuses_a_journal_that_lies(pair: tuple[Path, Path, Path]) -> None:
    base, _, _ = pair
    (base / JOURNAL).write_text("no JSON")
    with unchanged(base), pytest.raises(DeltaError, match=r"journal\.json` cannot be read"):
        revert_delta(base)


def test_apply_in_place_refuses_links_and_what_is_no_folder(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, delta = pair
    with pytest.raises(DeltaError, match="is no folder"):
        apply_delta("tiny:llama", delta, in_place=True)
    file = next(base.glob("*.safetensors"))
    file.rename(tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    with pytest.raises(DeltaError, match="is a link"):
        apply_delta(base, delta, in_place=True)
    assert not (base / JOURNAL).exists()


def test_apply_in_place_refuses_what_lies_in_a_cache(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, delta = pair
    monkeypatch.setenv("SUBNET_FT_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "theirs"))
    opened = open_checkpoint("tiny:llama")
    copied = Path(shutil.copytree(base, tmp_path / "theirs" / "models--a--b" / "snapshots" / "0"))
    (tmp_path / "link").symlink_to(copied)
    with unchanged(tmp_path):
        for place, owner in ((opened, "subnet-ft"), (opened.folder, "subnet-ft"), (copied, "the Hub's client")):
            with pytest.raises(DeltaError, match=f"is in the cache of {owner}"):
                apply_delta(place, delta, in_place=True)
        with pytest.raises(DeltaError, match="is in the cache of the Hub's client"):
            apply_delta(tmp_path / "link", delta, in_place=True)
    own = Path(shutil.copytree(base, tmp_path / "theirs" / "run"))
    apply_delta(own, delta, in_place=True)  # a folder of the user's beside those of the Hub
    assert weights(own) == weights(tuned)


def test_apply_in_place_keeps_others_out_while_it_runs(
    pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, delta = pair
    refused = 0

    def replace(source: Path, target: Path) -> None:
        nonlocal refused
        for job in (lambda: apply_delta(base, delta, in_place=True), lambda: revert_delta(base)):
            with unchanged(base), pytest.raises(DeltaError, match="Another process is changing"):
                job()
            refused += 1
        original(source, target)

    original = os.replace
    with monkeypatch.context() as context:
        context.setattr(os, "replace", replace)
        apply_delta(base, delta, in_place=True)
    assert refused > 6
    assert weights(base) == weights(tuned)


def test_apply_in_place_refuses_a_folder_that_another_process_holds(pair: tuple[Path, Path, Path]) -> None:
    base, tuned, delta = pair
    descriptor = os.open(base, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with unchanged(base), pytest.raises(DeltaError, match="Another process is changing"):
        apply_delta(base, delta, in_place=True)
    os.close(descriptor)
    apply_delta(base, delta, in_place=True)
    assert weights(base) == weights(tuned)
