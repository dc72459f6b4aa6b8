"""EVA starts from the directions that a layer's inputs have, and gives ranks to the layers that they explain most."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.errors import MethodError
from subnet_ft.methods import eva
from subnet_ft.methods.adapters import attach

TEXTS = [f"{a} + {b} = " for a in range(40) for b in range(5)]


def ranks_of(model: Any) -> dict[str, int]:
    return {name: len(weight) for name, weight in model.named_parameters() if "lora_A" in name}


def attached(texts: list[str], **config: Any) -> Any:
    model = tiny_model("llama", dtype=torch.float32)
    return attach(model, tiny_tokenizer(), "eva", {"r": 4, **config}, seed=0, texts=texts)


def test_eva_redistributes_ranks_within_the_budget() -> None:
    ranks = ranks_of(attached(TEXTS))
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    assert sum(ranks.values()) <= 4 * 14
    assert set(ranks_of(attached(TEXTS, eva_config={"rho": 1.0})).values()) == {4}


def test_eva_starts_from_the_singular_vectors_of_what_a_layer_sees() -> None:
    model = attached(TEXTS, eva_config={"rho": 1.0})
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().reshape(-1, 32)))
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        for text in TEXTS:
            model(**tokenizer(text, return_tensors="pt"))
    inputs = torch.cat(seen)
    _, _, expected = torch.linalg.svd(inputs - inputs.mean(dim=0), full_matrices=False)
    found = layer.lora_A["default"].weight.detach()
    torch.testing.assert_close(found @ found.T, torch.eye(4), rtol=0, atol=1e-4)
    assert (found[0] @ expected[0]).abs() > 0.99
    # The space that they span is that of the leading vectors.
    assert torch.linalg.matrix_norm(found @ expected[:4].T) ** 2 > 0.95 * 4


def test_eva_refuses_too_few_tokens() -> None:
    with pytest.raises(MethodError, match=r"`eva` needs 8 tokens .* there are 4.*methods\.eva\.config\.r"):
        attached(["1 +", "2"])


def test_eva_stops_when_directions_do_not_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eva, "_MOST_BATCHES", 3)
    with pytest.raises(MethodError, match=r"have not settled after 3 batches"):
        attached(TEXTS, eva_config={"tau": 1.0})
