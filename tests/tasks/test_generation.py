"""Completions equal a plain loop, whatever the batching, and leave no trace in the model or the random state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from subnet_ft.checkpoints.tiny import FAMILIES, tiny_model, tiny_tokenizer
from subnet_ft.errors import TaskError
from subnet_ft.tasks.generation import generate

PROMPTS = ["5 + 9 =", "a", "71 - 26 = 45\n8 - 3 =", "b", "12 + 34 =", "Why? "]
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", dtype=torch.float32)


def run(model: Any, prompts: Any = PROMPTS, **options: Any) -> list[list[str]]:
    return generate(
        model, TOKENIZER, prompts, **{"max_new_tokens": 8, "temperature": 0.0, "batch_size": 4, "seed": 0, **options}
    )


@torch.no_grad()
def plain_greedy(model: Any, prompt: str, steps: int) -> str:
    """Take the likeliest token of a full forward pass again and again, without cache, padding or batch."""
    tokens = TOKENIZER(prompt)["input_ids"]
    length = len(tokens)
    for _ in range(steps):
        token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        if token == TOKENIZER.eos_token_id:
            break
        tokens.append(token)
    return str(TOKENIZER.decode(tokens[length:], skip_special_tokens=True))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_generate_equals_a_plain_greedy_loop(family: str) -> None:
    model = tiny_model(family, dtype=torch.float32)
    assert run(model) == [[plain_greedy(model, prompt, 8)] for prompt in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 64])
def test_generate_greedily_does_not_depend_on_the_batch_size(model: Any, batch_size: int) -> None:
    assert run(model, batch_size=batch_size) == run(model, batch_size=4)


def test_generate_stops_at_the_end_token(model: Any) -> None:
    """With the last token of a completion made an end token, the completion loses it and all that follows."""
    (plain,) = run(model, ["12 + 34 ="])[0]
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, TOKENIZER(plain[0])["input_ids"][0]]
    try:
        assert run(model, ["12 + 34 ="]) == [[""]]
    finally:
        model.generation_config.eos_token_id = TOKENIZER.eos_token_id


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_generate_shares_the_prefill_of_samples(family: str) -> None:
    """Next to temperature 0 every sample is the greedy completion, so a wrong shared cache would show."""
    model = tiny_model(family, dtype=torch.float32)
    greedy = run(model, max_new_tokens=4)
    assert run(model, max_new_tokens=4, temperature=1e-5, num_samples=3, batch_size=6) == [row * 3 for row in greedy]


def test_generate_samples_are_decided_by_the_seed(model: Any) -> None:
    first = run(model, temperature=1.0, num_samples=4, seed=1)
    assert [len(row) for row in first] == [4] * len(PROMPTS)
    assert len(set(first[0])) > 1
    assert run(model, temperature=1.0, num_samples=4, seed=1) == first
    assert run(model, temperature=1.0, num_samples=4, seed=2) != first


def test_generate_leaves_random_state_and_mode_alone(model: Any) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model.train()
    try:
        run(model, temperature=1.0)
        assert model.training
    finally:
        model.eval()
    assert torch.equal(torch.get_rng_state(), before)
    run(model)
    assert not model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_generate_restores_the_mode_after_an_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    model.train()
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            run(model)
        assert model.training
    finally:
        model.eval()


def test_generate_ignores_the_sampling_defaults_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    greedy, samples = run(model), run(model, temperature=1.0, num_samples=2)
    defaults = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "top_k": 1, "top_p": 0.1, "temperature": 0.1}
    model.generation_config.update(**defaults, do_sample=True)
    assert (run(model), run(model, temperature=1.0, num_samples=2)) == (greedy, samples)


def test_generate_renders_chat_messages(model: Any) -> None:
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]
    assert run(model, [messages]) == run(model, ["system: Add.\nuser: 1 + 1\nassistant: "])


def test_generate_shows_progress_on_stderr_only_when_asked(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(model, PROMPTS[:2])
    assert capsys.readouterr() == ("", "")
    run(model, PROMPTS[:2], progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "2/2" in shown.err


def test_generate_gives_nothing_for_no_prompts(model: Any) -> None:
    assert run(model, []) == []


def test_generate_explains_what_is_wrong(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TaskError, match="has no tokens"):
        run(model, ["a", ""])
    with pytest.raises(TaskError, match="3 samples at temperature 0"):
        run(model, num_samples=3)
    monkeypatch.setattr(TOKENIZER, "chat_template", None)
    with pytest.raises(TaskError, match=r"no chat template\. Set task\.chat to false"):
        run(model, [[{"role": "user", "content": "1"}]])
