"""Stages: done once for the same inputs, never mixed up with another run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from subnet_ft.errors import StageError
from subnet_ft.stages import check_known_inputs, finished_results, lock_run, run_stage, write_json


class Work:
    def __init__(self, fail: bool = False) -> None:
        self.calls, self.fail = 0, fail

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.calls += 1
        (folder / f"part-{self.calls}").touch()
        if self.fail:
            raise KeyboardInterrupt
        return {"value": self.calls}


def test_run_stage_does_its_work_once(tmp_path: Path) -> None:
    work, folder = Work(), tmp_path / "full"
    first = run_stage(folder, {"seed": 1}, work, overwrite=False)
    second = run_stage(folder, {"seed": 1}, work, overwrite=False)
    assert (work.calls, first) == (1, second)
    assert first["seconds"] >= 0.0


def test_run_stage_continues_in_its_folder_after_an_interruption(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    with pytest.raises(KeyboardInterrupt):
        run_stage(folder, {"seed": 1}, Work(fail=True), overwrite=False)
    assert not (folder / "stage.json").exists()
    work = Work()
    work.calls = 5
    assert run_stage(folder, {"seed": 1}, work, overwrite=False)["value"] == 6
    assert {path.name for path in folder.iterdir()} == {"part-1", "part-6", "stage.json"}


@pytest.mark.parametrize("interrupted", [True, False])
def test_run_stage_refuses_other_inputs_and_names_them(tmp_path: Path, interrupted: bool) -> None:
    folder, old = tmp_path / "full", {"training": {"learning_rate": 1e-5, "max_steps": 3}, "seed": 1}
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            run_stage(folder, old, Work(fail=True), overwrite=False)
    else:
        run_stage(folder, old, Work(), overwrite=False)
    new = {"training": {"learning_rate": 2e-5, "max_steps": 3}, "seed": 1}
    with pytest.raises(StageError, match=r"training\.learning_rate: was 1e-05, is 2e-05\. Choose another `output`"):
        run_stage(folder, new, Work(), overwrite=False)
    assert (folder / "part-1").exists()


def test_run_stage_overwrites_when_told_to(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    run_stage(folder, {"seed": 1}, Work(), overwrite=False)
    work = Work()
    work.calls = 7
    assert run_stage(folder, {"seed": 2}, work, overwrite=True)["value"] == 8
    assert {path.name for path in folder.iterdir()} == {"part-8", "stage.json"}


def test_run_stage_replaces_a_cheap_stage_without_asking(tmp_path: Path) -> None:
    run_stage(tmp_path / "mask", {"tolerance": 0}, Work(), overwrite=False, cheap=True)
    work = Work()
    run_stage(tmp_path / "mask", {"tolerance": 1}, work, overwrite=False, cheap=True)
    assert work.calls == 1


def test_run_stage_works_again_when_a_product_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    product = folder / "part-1"
    run_stage(folder, {}, Work(), overwrite=False, products=[product])
    product.unlink()
    work = Work()
    run_stage(folder, {}, work, overwrite=False, products=[product])
    assert work.calls == 1
    assert product.exists()


def test_run_stage_continues_when_it_was_killed_while_starting(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / ".started.json.tmp").write_text("{")
    assert run_stage(folder, {}, Work(), overwrite=False)["value"] == 1


def test_run_stage_continues_when_it_was_killed_while_replacing(tmp_path: Path) -> None:
    (tmp_path / ".full.replaced").mkdir()
    (tmp_path / ".full.replaced" / "old").touch()
    run_stage(tmp_path / "full", {"seed": 1}, Work(), overwrite=False)
    run_stage(tmp_path / "full", {"seed": 2}, Work(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("interrupted", [True, False])
def test_check_known_inputs_refuses_a_stage_before_its_other_inputs_are_made(tmp_path: Path, interrupted: bool) -> None:
    folder = tmp_path / "mask"
    check_known_inputs(folder, {"source": {"steps": 3}})
    try:
        run_stage(folder, {"source": {"steps": 2}, "probe": "a"}, Work(fail=interrupted), overwrite=False)
    except KeyboardInterrupt:
        assert interrupted
    check_known_inputs(folder, {"source": {"steps": 2}})
    with pytest.raises(StageError, match=r"other settings: source\.steps: was 2, is 3\. Choose another `output`"):
        check_known_inputs(folder, {"source": {"steps": 3}})


def test_finished_results_wants_the_same_inputs(tmp_path: Path) -> None:
    results = run_stage(tmp_path / "full", {"seed": (1, 2)}, Work(), overwrite=False)
    assert finished_results(tmp_path / "full", {"seed": (1, 2)}) == results
    assert finished_results(tmp_path / "full", {"seed": 3}) is None
    assert finished_results(tmp_path / "other", {}) is None


def test_run_stage_leaves_a_folder_alone_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(StageError, match="is not empty and holds no stage"):
        run_stage(tmp_path, {}, Work(), overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_run_stage_names_a_damaged_stage_file(tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text("{")
    with pytest.raises(StageError, match="is not JSON"):
        run_stage(tmp_path, {}, Work(), overwrite=False)


def test_write_json_replaces_the_file_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert (tmp_path / "a.json").read_text() == '{\n "x": 1\n}\n'


def test_lock_run_keeps_a_second_one_out(tmp_path: Path) -> None:
    with lock_run(tmp_path), pytest.raises(StageError, match="Another process works in"), lock_run(tmp_path):
        pass
    with lock_run(tmp_path):
        pass
