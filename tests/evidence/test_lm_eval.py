"""lm-eval's tasks on tiny models, with data of our own: outcomes prompt by prompt, saved and compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.errors import MissingDependencyError, TaskError
from subnet_ft.evidence.lm_eval import (
    HarnessMetric,
    HarnessResults,
    HarnessTask,
    evaluate_with_harness,
    harness_differences,
    read_harness_results,
    write_harness_results,
)
from subnet_ft.evidence.statistics import tango_interval, wilson_interval

NUM_PROMPTS = 7
CHOICES = [f"{n} + {n} =" for n in range(NUM_PROMPTS)]


def results(model: str, correct: list[bool], *, prompts: str = "p") -> HarnessResults:
    value = sum(correct) / len(correct)
    metrics = {
        "acc,none": HarnessMetric(value, *wilson_interval(sum(correct), len(correct), 0.95), correct),
        "perplexity,none": HarnessMetric(12.5, None, None, None),
    }
    task = HarnessTask([f"{prompts}{index}" for index in range(len(correct))], metrics)
    return HarnessResults(model, "0.4.13", 0.95, {"task": task})


def test_harness_differences_are_paired() -> None:
    ours, theirs = [True] * 6 + [False] * 4, [True] * 2 + [False] * 7 + [True]
    (found,) = harness_differences(results("ours", ours), results("theirs", theirs))
    assert (found.task, found.metric) == ("task", "acc,none")
    assert (found.accuracy.only_first, found.accuracy.only_second) == (4, 1)
    assert (found.accuracy.low, found.accuracy.high) == tango_interval(4, 1, 10, confidence=0.95)
    assert found.tests.mcnemar_p == pytest.approx(binomtest(1, 5).pvalue - 5 / 2**5)


def test_harness_differences_refuse_other_prompts() -> None:
    with pytest.raises(TaskError, match="other prompts of `task`"):
        harness_differences(results("a", [True]), results("b", [True], prompts="q"))
    first = results("a", [True])
    with pytest.raises(TaskError, match="share no task"):
        harness_differences(first, replace(first, tasks={"another": first.tasks["task"]}))


def test_harness_results_come_back_from_their_file(tmp_path: Path) -> None:
    path, found = tmp_path / "results.json", results("model", [True, False])
    write_harness_results(found, path)
    assert read_harness_results(path) == found


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "odd": 3}'])
def test_read_harness_results_refuses_what_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(TaskError, match="does not hold results"):
        read_harness_results(path)
    with pytest.raises(TaskError, match="does not hold results"):
        read_harness_results(tmp_path / "missing.json")


def test_evaluate_with_harness_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'subnet-ft\[lm-eval\]'"):
        evaluate_with_harness(tiny_model("llama"), tiny_tokenizer(), ["arc_easy"], name="tiny")


@pytest.fixture(scope="module")
def tasks_from(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks in the harness's own YAML over seven prompts in a local file: a choice of two, and an answer."""
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": text, "choices": [str(2 * n), str(2 * n + 1)], "label": 0} for n, text in enumerate(CHOICES)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}\ntest_split: test\n"
    (folder / "choice.yaml").write_text(
        f"task: own_choice\n{data}output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: label\ndoc_to_choice: choices\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "written.yaml").write_text(
        f"task: own_written\n{data}output_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[0]}}"\n'
        'generation_kwargs: {max_gen_toks: 3, until: ["\\n"], do_sample: false}\n'
        "metric_list: [{metric: exact_match}]\n"
        "filter_list:\n"
        "- {name: digits, filter: [{function: regex, regex_pattern: '(\\d+)'}, {function: take_first}]}\n"
        "- {name: whole, filter: [{function: take_first}]}\n"
    )
    return folder


def log_probability(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Log-probability of the answer after the prompt, in three lines of torch."""
    before, whole = (tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {answer}"))
    with torch.no_grad():
        log_p = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return float(sum(log_p[index - 1, whole[index]] for index in range(len(before), len(whole))))


def test_evaluate_with_harness_keeps_the_outcome_of_every_prompt(tasks_from: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama").float().train(), tiny_tokenizer()
    state = torch.get_rng_state()
    found = evaluate_with_harness(model, tokenizer, ["own_*"], name="tiny", tasks_from=tasks_from)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)

    assert set(found.tasks) == {"own_choice", "own_written"}
    assert set(found.tasks["own_choice"].metrics) == {"acc,none", "acc_norm,none"}
    assert set(found.tasks["own_written"].metrics) == {"exact_match,digits", "exact_match,whole"}
    accuracy = found.tasks["own_choice"].metrics["acc,none"]
    model.eval()
    expected = [
        log_probability(model, tokenizer, text, str(2 * n)) > log_probability(model, tokenizer, text, str(2 * n + 1))
        for n, text in enumerate(CHOICES)
    ]
    assert accuracy.correct == expected
    assert 0 < sum(expected) < NUM_PROMPTS  # else the comparison above could not fail
    assert (accuracy.low, accuracy.high) == wilson_interval(sum(expected), NUM_PROMPTS, 0.95)
    assert len(set(found.tasks["own_choice"].prompts)) == NUM_PROMPTS

    write_harness_results(found, tmp_path / "found.json")
    assert read_harness_results(tmp_path / "found.json") == found
    other = evaluate_with_harness(
        tiny_model("llama", seed=1).float(), tokenizer, ["own_choice"], name="other", tasks_from=tasks_from
    )
    difference = next(entry for entry in harness_differences(other, found) if entry.metric == "acc,none")
    theirs = other.tasks["own_choice"].metrics["acc,none"].correct
    assert theirs is not None
    assert difference.accuracy.difference == pytest.approx((sum(theirs) - sum(expected)) / NUM_PROMPTS)


def test_evaluate_with_harness_stops_at_the_limit(tasks_from: Path) -> None:
    found = evaluate_with_harness(
        tiny_model("llama"), tiny_tokenizer(), ["own_choice"], name="tiny", tasks_from=tasks_from, limit=2
    )
    assert len(found.tasks["own_choice"].prompts) == 2


def test_evaluate_with_harness_takes_adapters(tasks_from: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(tiny_model("llama").float(), LoraConfig(init_lora_weights=False, r=16))
    plain = tiny_model("llama").float()
    found, base = (
        evaluate_with_harness(model, tiny_tokenizer(), ["own_choice"], name="x", tasks_from=tasks_from)
        for model in (adapted, plain)
    )
    assert set(found.tasks) == set(base.tasks)
    accuracy = found.tasks["own_choice"].metrics["acc,none"].correct
    expected = [
        log_probability(adapted, tiny_tokenizer(), text, str(2 * n))
        > log_probability(adapted, tiny_tokenizer(), text, str(2 * n + 1))
        for n, text in enumerate(CHOICES)
    ]
    assert accuracy == expected


def test_evaluate_with_harness_names_an_unknown_task(tasks_from: Path) -> None:
    with pytest.raises(TaskError, match=r"no task `no_such_task`"):
        evaluate_with_harness(
            tiny_model("llama"), tiny_tokenizer(), ["own_choice", "no_such_task"], name="tiny", tasks_from=tasks_from
        )


def test_evaluate_with_harness_names_a_task_without_its_data(tasks_from: Path, tmp_path: Path) -> None:
    text = (tasks_from / "choice.yaml").read_text().replace("data.jsonl", "missing.jsonl")
    (tmp_path / "broken.yaml").write_text(text.replace("own_choice", "own_broken"))
    with pytest.raises(TaskError, match="could not judge `own_broken`"):
        evaluate_with_harness(tiny_model("llama"), tiny_tokenizer(), ["own_broken"], name="tiny", tasks_from=tmp_path)
