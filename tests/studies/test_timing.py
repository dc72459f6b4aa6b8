"""How long a study takes: from finished runs, else a guess that says so; and how much is left."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from study_runs import plan_of

from subnet_ft.studies.plan import Cell, Plan
from subnet_ft.studies.timing import Clock, guessed_step_seconds, measured_step_seconds, total_steps


def finish(cell: Cell, *, train: float, judge: float, resumed: str | None = None) -> None:
    folder = Path(cell.recipe.output)
    for place, results in (
        (folder / cell.stage, {"seconds": train, "num_steps": cell.num_steps, "resumed_from": resumed}),
        (folder / "evaluation" / cell.stage, {"seconds": judge}),
    ):
        place.mkdir(parents=True)
        (place / "stage.json").write_text(json.dumps({"inputs": {}, "results": results}))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_of("causes", tmp_path, only=["kl_on", "steps_double"])


def test_measured_step_seconds_include_evaluation_and_leave_out_resumed_runs(plan: Plan) -> None:
    own, kl, _ = plan.cells
    assert measured_step_seconds(plan) is None
    finish(own, train=16.0, judge=8.0)
    assert measured_step_seconds(plan) == 3.0
    finish(kl, train=1.0, judge=8.0, resumed="checkpoint-4")
    assert measured_step_seconds(plan) == 3.0


def test_clock_announces_cells_and_time(plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="subnet_ft")
    assert total_steps(plan.cells) == 8 + 8 + 16
    Clock(plan, 1_000_000).announce()
    assert "study causes: 3 cells, 0 of them done before; 32 steps to train, about" in caplog.text
    assert "a guess from the model's size that may be wrong by a few times" in caplog.text
    caplog.clear()
    finish(plan.cells[0], train=16.0, judge=8.0)
    Clock(plan, 1_000_000).announce()
    assert "3 cells, 1 of them done before; 24 steps to train, about 72 s" in caplog.text
    assert "guess" not in caplog.text


def test_clock_says_after_every_cell_what_is_left(
    plan: Plan, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="subnet_ft")
    now = iter([0.0, 40.0])
    clock_of = "subnet_ft.studies.timing.time.perf_counter"
    finish(plan.cells[0], train=16.0, judge=8.0)
    monkeypatch.setattr(clock_of, lambda: next(now))
    clock = Clock(plan, 1_000_000)
    clock.begin(plan.cells[1])
    clock.end(plan.cells[0])  # was done before, so that it says nothing of the pace
    clock.end(plan.cells[1])
    # 8 steps took 40 s, 16 are left.
    assert "cell 2 of 3: KL on" in caplog.text
    assert "1 cell to go, about 80 s" in caplog.text


def test_guessed_step_seconds_grow_with_model_and_batch(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subnet_ft.studies.timing._operations_per_second", lambda _: 1e12)
    one, other = (guessed_step_seconds(plan.recipe, number) for number in (10**8, 2 * 10**8))
    assert other == pytest.approx(2 * one)
    # 64 rows of 64 + 2 tokens, 12 operations per token and weight.
    assert one == pytest.approx(12 * 10**8 * 64 * 66 / 1e12)


def test_cells_on_another_model_take_no_time_of_the_estimate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    caplog.set_level(logging.INFO, logger="subnet_ft")
    exact = "subnet.source.tolerance=0.0"
    plan = plan_of("causes", tmp_path, exact, recipe="smollm2_135m/grpo_arithmetic", only=["tiny_float32"])
    Clock(plan, 1_000_000).announce()
    assert "3 cells, 0 of them done before; 8 steps to train" in caplog.text
