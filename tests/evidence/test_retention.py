"""What a model keeps of its base: known models, known text, paired differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.errors import TaskError
from subnet_ft.evidence.retention import (
    Retention,
    TaskRetention,
    read_paragraphs,
    retention,
    retention_differences,
    text_differences,
)
from subnet_ft.recipe import TaskSpec
from subnet_ft.tasks import load_task

LIMITS: dict[str, Any] = {"max_new_tokens": 3, "max_tokens": 100, "batch_size": 4}


def changed() -> Any:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0)
    return model


def test_retention_of_an_unchanged_model_is_whole() -> None:
    base = tiny_model("llama")
    found = retention(base, base, tiny_tokenizer(), {}, ["some text", "more text"], **LIMITS)
    assert (found.kl_to_base, found.kl_low, found.kl_high) == (0.0, 0.0, 0.0)


def test_retention_of_the_base_has_no_distance() -> None:
    found = retention(tiny_model("llama"), None, tiny_tokenizer(), {}, ["some text"], **LIMITS)
    assert found.kl_to_base is None
    assert found.num_tokens > 0


def test_retention_judges_every_task_on_its_held_out_prompts() -> None:
    task = load_task(TaskSpec(name="reasoning_gym/chain_sum", num_eval=6), seed=0)
    found = retention(tiny_model("llama"), changed(), tiny_tokenizer(), {"sums": task}, ["some text"], **LIMITS)
    assert set(found.tasks) == {"sums"}
    assert len(found.tasks["sums"].correct) == 6
    assert found.kl_to_base is not None
    assert found.kl_to_base > 0
    assert found.kl_low is found.kl_high is None, "one paragraph"


def test_retention_reads_so_many_tokens() -> None:
    tokenizer, paragraphs = tiny_tokenizer(), read_paragraphs(None)
    found = retention(tiny_model("llama"), None, tokenizer, {}, paragraphs, **LIMITS)
    assert found.num_tokens == 100


def test_retention_differences_pair_the_prompts() -> None:
    def kept(*correct: bool) -> Retention:
        share = sum(correct) / len(correct)
        return Retention({"task": TaskRetention(share, 0.0, 1.0, list(correct))}, None, None, None, 0, 0.95)

    found = {"full": kept(True, False, False, False), "subnet": kept(True, True, False, False)}
    (difference,) = retention_differences(found, [("subnet", "full")], confidence=0.95)
    assert (difference.task, difference.difference) == ("task", 0.25)
    assert difference.low < 0.25 < difference.high


def test_read_paragraphs_has_text_of_its_own() -> None:
    paragraphs = read_paragraphs(None)
    assert len(paragraphs) >= 20
    assert len(set(paragraphs)) == len(paragraphs)
    assert sum(len(paragraph.split()) for paragraph in paragraphs) > 1900


def test_read_paragraphs_takes_the_users(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    assert read_paragraphs(path) == ["one two", "three"]
    path.write_text(" \n")
    with pytest.raises(TaskError, match="is empty"):
        read_paragraphs(path)
    with pytest.raises(TaskError, match="cannot be read"):
        read_paragraphs(tmp_path / "missing.txt")


def test_text_differences_pair_the_paragraphs() -> None:
    base, tokenizer, paragraphs = tiny_model("llama"), tiny_tokenizer(), ["some text", "more text", "the last one"]
    found = {
        name: retention(base, model, tokenizer, {}, paragraphs, **LIMITS)
        for name, model in (("still", tiny_model("llama")), ("moved", changed()))
    }
    (difference,) = text_differences(found, [("moved", "still")])
    assert difference.difference == found["moved"].kl_to_base
    assert difference.low is not None
    assert difference.high is not None
    assert 0 < difference.low <= difference.difference <= difference.high
    assert found["moved"].tokens_by_paragraph == [len(tokenizer(text)["input_ids"]) for text in paragraphs]
