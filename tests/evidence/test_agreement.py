"""Distances of outputs on models whose logits are known, and against three lines of torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.evidence.agreement import agreement, agreement_differences
from subnet_ft.evidence.output_distance import Text, mean_with_interval, output_distances
from subnet_ft.evidence.statistics import wilson_interval
from subnet_ft.recipe import TaskSpec
from subnet_ft.tasks import load_task

PROMPTS = ["1 + 1 =", "23 + 4 =", "a longer prompt with words"]
COMPLETIONS = [" 2", " 27 and more", ""]


def changed(scale: float = 1.5) -> Any:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    return model


class Table(torch.nn.Module):
    """A model whose logits after token t are row t of a table, whatever came before."""

    device = torch.device("cpu")

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool, logits_to_keep: int
    ) -> Any:
        return SimpleNamespace(logits=self.rows[input_ids][:, -logits_to_keep:])


def test_output_distances_are_those_of_two_known_distributions() -> None:
    """After token 0 both are equal, after token 1 they are (1/2, 1/2) and (1/4, 3/4)."""
    fair, unfair = [0.0, 0.0], [0.0, float(np.log(3.0))]
    first, second = Table([fair, fair]), Table([fair, unfair])
    texts = [Text([0, 1, 1], 1), Text([1], 0), Text([0, 0, 0, 0], 2)]
    found = output_distances(first, second, texts)
    one = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert [entry.kl for entry in found] == pytest.approx([2 * one, one, 0.0])
    assert [entry.num_tokens for entry in found] == [2, 1, 2]
    assert [entry.same for entry in found] == [0, 0, 2]


def test_output_distances_know_words_that_are_ruled_out() -> None:
    never = float("-inf")
    both, one = Table([[0.0, 0.0, never]]), Table([[0.0, 0.0, 0.0]])
    texts = [Text([0], 0)]
    assert output_distances(both, both, texts)[0].kl == 0.0
    assert output_distances(both, one, texts)[0].kl == pytest.approx(np.log(1.5))
    assert output_distances(one, both, texts)[0].kl == np.inf


@pytest.mark.parametrize("learned_prompt", [False, True])
def test_output_distances_are_the_same_in_pieces(learned_prompt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts longer than what is compared at a time, each from another position on."""
    from peft import PromptTuningConfig, get_peft_model

    base, other = tiny_model("llama").float(), changed().float()
    if learned_prompt:
        torch.manual_seed(0)
        other = get_peft_model(other, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    tokens = tiny_tokenizer()("7 + 8 = 15, and 15 + 8 = 23")["input_ids"]
    texts = [Text(tokens, start) for start in (0, 3, len(tokens) - 1)]
    monkeypatch.setattr("subnet_ft.evidence.output_distance._POSITIONS", 4)
    found = output_distances(base, other, texts)
    with torch.no_grad():
        p, q = (m(input_ids=torch.tensor([tokens])).logits[0, -len(tokens) :].log_softmax(-1) for m in (base, other))
    kl = (p.exp() * (p - q)).sum(-1)
    assert [entry.kl for entry in found] == pytest.approx([float(kl[text.start :].sum()) for text in texts], rel=1e-4)
    assert [entry.num_tokens for entry in found] == [len(tokens) - text.start for text in texts]


def test_output_distances_agree_with_three_lines_of_torch() -> None:
    base, other = tiny_model("llama"), changed()
    tokens = tiny_tokenizer()("12 + 3 = 15")["input_ids"]
    (found,) = output_distances(base, other, [Text(tokens, 2)])
    with torch.no_grad():
        p, q = (m(torch.tensor([tokens])).logits[0, 2:].float().log_softmax(-1) for m in (base, other))
    expected = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    assert found.kl == pytest.approx(float(expected), rel=1e-4)
    assert found.num_tokens == len(tokens) - 2


def test_output_distances_do_not_depend_on_what_is_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    base, other, tokenizer = tiny_model("llama").float(), changed().float(), tiny_tokenizer()
    texts = [Text(tokenizer(text)["input_ids"], 0) for text in (*PROMPTS, "x", "one more text of another length")]
    together = output_distances(base, other, texts)
    monkeypatch.setattr("subnet_ft.evidence.output_distance._POSITIONS", 1)
    alone = output_distances(base, other, texts)
    assert [entry.kl for entry in together] == pytest.approx([entry.kl for entry in alone], rel=1e-4)
    assert [entry.num_tokens for entry in together] == [entry.num_tokens for entry in alone]


def test_agreement_of_a_model_with_itself_is_whole() -> None:
    model = tiny_model("llama")
    found = agreement(model, model, tiny_tokenizer(), PROMPTS, COMPLETIONS, COMPLETIONS)
    assert (found.kl, found.kl_low, found.kl_high) == (0.0, 0.0, 0.0)
    assert (found.same_token, found.same_completion, found.num_prompts) == (1.0, 1.0, 3)


def test_agreement_counts_what_follows_every_completion() -> None:
    tokenizer = tiny_tokenizer()
    found = agreement(tiny_model("llama"), changed(), tokenizer, PROMPTS, COMPLETIONS, [" 2", " 28", ""])
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else 0 for text in COMPLETIONS]
    assert found.num_tokens == sum(lengths) + len(PROMPTS)
    assert found.kl > 0
    assert found.kl_low <= found.kl <= found.kl_high
    assert found.same_completion == pytest.approx(2 / 3)
    assert found.same_low < 2 / 3 < found.same_high


def test_agreement_counts_the_same_answers_right_or_wrong() -> None:
    spec = TaskSpec(name="reasoning_gym/chain_sum", num_eval=1, answer_pattern=r"^\s*(-?[0-9.]+)")
    model, task = tiny_model("llama"), load_task(spec, seed=0)
    found = agreement(
        model,
        model,
        tiny_tokenizer(),
        [*PROMPTS, *PROMPTS],
        [" 2", " 27", "", " 5", "x", "7"],
        [" 2 or so", " 28", "none", "5.0", "9", ""],
        task=task,
    )
    assert found.same_answer == pytest.approx(3 / 6)  # 2, neither gives one, 5
    assert found.same_completion == 0.0
    assert (found.same_answer_low, found.same_answer_high) == wilson_interval(3, 6, 0.95)
    assert agreement(model, model, tiny_tokenizer(), PROMPTS, COMPLETIONS, COMPLETIONS).same_answer is None


def test_agreement_leaves_mode_and_weights_alone() -> None:
    model, other = tiny_model("llama").train(), changed().train()
    before = {name: weight.clone() for name, weight in other.state_dict().items()}
    agreement(model, other, tiny_tokenizer(), PROMPTS, COMPLETIONS, COMPLETIONS)
    assert model.training
    assert other.training
    assert all(torch.equal(weight, before[name]) for name, weight in other.state_dict().items())


def test_agreement_wants_one_completion_of_each_per_prompt() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="3 prompts, 2 and 3 completions"):
        agreement(model, model, tiny_tokenizer(), PROMPTS, COMPLETIONS[:2], COMPLETIONS)
    with pytest.raises(ValueError, match="0 prompts"):
        agreement(model, model, tiny_tokenizer(), [], [], [])


def test_mean_with_interval_agrees_with_scipys_bootstrap() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, size=200).astype(float)
    sums = counts * rng.exponential(0.1, size=200)
    mean, low, high = mean_with_interval(sums, counts, confidence=0.95, seed=0, resamples=10_000)

    def ratio(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(sums.sum(axis) / counts.sum(axis))

    theirs = bootstrap((sums, counts), ratio, paired=True, method="percentile").confidence_interval
    assert mean == pytest.approx(sums.sum() / counts.sum())
    assert (low, high) == pytest.approx((theirs.low, theirs.high), rel=0.03)


def test_mean_with_interval_of_one_text_has_no_interval() -> None:
    """All resamples of one text are that text; a width of zero would claim certainty."""
    one = np.array([0.6]), np.array([3.0])
    assert mean_with_interval(*one, confidence=0.95, seed=0) == (pytest.approx(0.2), None, None)
    full, tokenizer = tiny_model("llama"), tiny_tokenizer()
    found = agreement(full, changed(1.5), tokenizer, PROMPTS[:1], COMPLETIONS[:1], COMPLETIONS[:1])
    assert found.kl > 0
    assert found.kl_low is found.kl_high is None
    (difference,) = agreement_differences({"a": found, "b": found}, [("a", "b")])
    assert (difference.difference, difference.low, difference.high) == (0.0, None, None)


def test_agreement_differences_pair_the_prompts() -> None:
    """One model is a little nearer than another on every prompt: certain, though their intervals overlap."""
    full, tokenizer = tiny_model("llama"), tiny_tokenizer()
    found = {
        name: agreement(full, changed(scale), tokenizer, PROMPTS, COMPLETIONS, COMPLETIONS)
        for name, scale in (("near", 1.48), ("far", 1.5))
    }
    (difference,) = agreement_differences(found, [("near", "far")])
    assert (difference.first, difference.second) == ("near", "far")
    assert difference.difference == pytest.approx(found["near"].kl - found["far"].kl)
    assert None not in (found["near"].kl_high, found["far"].kl_low, difference.low, difference.high)
    assert found["near"].kl_high > found["far"].kl_low
    assert difference.low <= difference.difference <= difference.high < 0
    (same,) = agreement_differences(found, [("far", "far")])
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)
    assert sum(found["far"].kl_by_prompt) / sum(found["far"].tokens_by_prompt) == pytest.approx(found["far"].kl)
