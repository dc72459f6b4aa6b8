"""Evidence from outputs: what makes a piece of it out of date, and what is known to be missing before any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import recipe

from subnet_ft.errors import TaskError
from subnet_ft.evidence.agreement import Agreement
from subnet_ft.evidence.retention import Retention
from subnet_ft.evidence_stages import OutputEvidence, outputs
from subnet_ft.evidence_stages.stage import EvidenceFolder
from subnet_ft.inputs import RunInputs
from subnet_ft.pipeline import Pipeline
from subnet_ft.stages import TrainedStage
from subnet_ft.trained_runs import TrainedRuns

RECORDS: dict[str, list[dict[str, Any]] | None] = {
    name: [{"prompt": "1 + 1", "completion": completion}]
    for name, completion in (("full", "so 2"), ("base", "it is 2"))
}


class Counted:
    """Stands for a measurement that needs trained models: always finds the same, and counts."""

    def __init__(self, found: Any) -> None:
        self.found, self.calls = found, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.found


@pytest.fixture(autouse=True)
def _no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    monkeypatch.setattr(outputs, "load_trained", lambda *args, **options: (None, None))


def of_outputs(folder: Path, *overrides: str) -> OutputEvidence:
    full, subnet = (TrainedStage(folder / name, None, {"sha256": name}) for name in ("full", "subnet"))
    inputs = RunInputs(recipe("grpo", folder, *overrides))
    return OutputEvidence(inputs, TrainedRuns(full, subnet), EvidenceFolder(folder, overwrite=False), progress=False)


def test_agreement_of_answers_found_otherwise_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = Counted(Agreement(0.1, 0.0, 0.2, 0.9, 3, 0.0, 0.0, 0.8, 1, 0.95))
    monkeypatch.setattr(outputs, "agreement", compare)
    for _ in range(2):
        assert set(of_outputs(tmp_path).agreement(RECORDS)) == {"base"}
    assert compare.calls == 1
    of_outputs(tmp_path, "task.answer_pattern='([0-9]+)'").agreement(RECORDS)
    assert compare.calls == 2


def test_retention_on_other_rows_of_the_same_file_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Counted(Retention({}, None, None, None, 0, 0.95))
    monkeypatch.setattr(outputs, "retention", judge)
    rows = tmp_path / "rows.jsonl"
    task = f"{{name: dataset, dataset: {{path: {rows}, eval_split: train}}, num_eval: 1}}"
    asked = f"evaluation.retention={{tasks: [{task}]}}"
    for answer, calls in (("2", 3), ("2", 3), ("two", 6)):
        rows.write_text(json.dumps({"prompt": "1 + 1", "answer": answer}) + "\n")
        assert set(of_outputs(tmp_path / "run", asked).retention()) == {"full", "base", "subnet"}
        assert judge.calls == calls


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("text: nope.txt", r"The neutral text `nope\.txt` cannot be read"),
        ("tasks: [{name: dataset, dataset: {path: nope.jsonl}, num_eval: 1}]", r"nope\.jsonl"),
    ],
)
def test_pipeline_misses_what_retention_needs_before_it_trains(asked: str, problem: str, tmp_path: Path) -> None:
    pipeline = Pipeline(recipe("grpo", tmp_path / "run", f"evaluation.retention={{{asked}}}"))
    with pytest.raises(TaskError, match=problem):
        pipeline.start()
    assert not list((tmp_path / "run").iterdir())
