"""`subnet-ft evaluate --lm-eval`: figures, files, and what goes with what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.cli import main
from subnet_ft.evidence.lm_eval import read_harness_results
from subnet_ft.evidence.statistics import paired_difference


@pytest.fixture
def tasks_from(tmp_path: Path) -> Path:
    """One task in the harness's YAML: eight sums with a right and a wrong result."""
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"text": f"{n} + 3 =", "choices": [str(n + 3), str(n + 4)], "right": 0} for n in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(
        f"task: own_sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_target: right\n'
        "doc_to_choice: choices\nmetric_list: [{metric: acc}]\n"
    )
    return folder


def test_evaluate_compares_two_models_on_tasks_of_lm_eval(
    tasks_from: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (str(save_tiny("llama", tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 1)))
    judged = ["--lm-eval", "own_sums", "--tasks-from", str(tasks_from)]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    assert main(["evaluate", first, *judged, "-o", str(files[0])]) == 0
    out = capsys.readouterr().out
    assert out.startswith("own_sums acc,none: ")
    assert "of 8 prompts" in out

    assert main(["evaluate", second, *judged, "-o", str(files[1]), "--against", str(files[0]), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    ours, theirs = (read_harness_results(path).tasks["own_sums"].metrics["acc,none"].correct for path in files[::-1])
    assert ours is not None
    assert theirs is not None
    expected = paired_difference(ours, theirs, confidence=0.95)
    (difference,) = figures["differences"]
    assert (difference["difference"], difference["ci_low"]) == (expected.difference, expected.low)
    assert figures["tasks"]["own_sums"]["acc,none"]["value"] == sum(ours) / 8

    assert main(["evaluate", second, *judged, "--against", str(files[0])]) == 0
    assert f"minus {files[0]}: {expected.difference * 100:+.1f} points" in capsys.readouterr().out


def test_evaluate_takes_dtype_and_confidence_of_a_recipe(
    tasks_from: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    judged = ["--lm-eval", "own_sums", "--tasks-from", str(tasks_from), "--limit", "4", "-o", str(path)]
    assert main(["evaluate", "tiny:llama", "tiny/grpo", "evaluation.confidence=0.8", *judged]) == 0
    assert "of 4 prompts" in capsys.readouterr().out
    assert read_harness_results(path).confidence == 0.8


def test_evaluate_wants_the_recipe_of_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["evaluate", str(tmp_path), "--lm-eval", "own_sums"]) == 2
    assert "is an adapter. Name the recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a recipe to judge by, or --lm-eval"),
        (["tiny/grpo", "--limit", "3", "--chat"], "--limit, --chat goes with --lm-eval"),
        (["--lm-eval", "x", "--against", "missing.json"], "`missing.json` does not hold results"),
    ],
)
def test_evaluate_says_what_goes_with_what(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "tiny:llama", *arguments]) == 2
    assert message in capsys.readouterr().err
