"""Weights that transformers keeps in float32 get their stored dtype back; a reward model is its language model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from subnet_ft.checkpoints import open_checkpoint, undo_upcasts
from subnet_ft.checkpoints.models import load_model, save_config, save_with_reward_head
from subnet_ft.checkpoints.tiny import save_tiny, tiny_model
from subnet_ft.errors import CheckpointError

ROUTER = "model.layers.1.mlp.gate.weight"


def widened(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, torch.Tensor]:
    """Build a model whose router is kept in float32, as transformers 5.24 does; returns the router as stored, too."""
    model: Any = tiny_model("deepseek_v3", dtype=dtype)
    router = model.get_parameter(ROUTER)
    stored = router.detach().clone()
    router.data = router.data.float()
    return model, stored


def test_undo_upcasts_gives_the_model_as_it_is_stored(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny("deepseek_v3", tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    undo_upcasts(model, dtype="bfloat16")
    loaded = dict(model.named_parameters())
    for name, tensor in checkpoint.tensors():
        assert same_bits(loaded[name].detach(), tensor), name
    assert all(same_bits(model.get_buffer(name), buffer) for name, buffer in buffers.items())
    assert all(parameter.requires_grad for parameter in loaded.values())


def test_undo_upcasts_restores_the_bits_of_a_widened_weight() -> None:
    for name in ("bfloat16", "float16"):
        model, stored = widened(getattr(torch, name))
        undo_upcasts(model, dtype=name)
        assert same_bits(model.get_parameter(ROUTER).detach(), stored)


def test_undo_upcasts_leaves_a_weight_alone_that_would_be_rounded() -> None:
    model, _ = widened()
    router = model.get_parameter(ROUTER)
    with torch.no_grad():
        router[0, 0] = 1.0 + 2.0**-20
    before = router.detach().clone()
    undo_upcasts(model, dtype="bfloat16")
    assert same_bits(model.get_parameter(ROUTER).detach(), before)


def test_undo_upcasts_changes_no_output() -> None:
    model, _ = widened()
    tokens = torch.arange(2, 12).reshape(2, 5)
    with torch.no_grad():
        before = model(tokens).logits
        undo_upcasts(model, dtype="bfloat16")
        assert same_bits(model(tokens).logits, before)


def test_undo_upcasts_widens_nothing() -> None:
    model = tiny_model("llama")
    undo_upcasts(model, dtype="float32")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "mixtral", "deepseek_v3"])
def test_save_with_reward_head_keeps_every_other_weight(family: str, tmp_path: Path) -> None:
    language_model = open_checkpoint(save_tiny(family, tmp_path / "model"))
    save_with_reward_head(language_model.folder, tmp_path / "base", dtype="bfloat16", seed=0)
    base = open_checkpoint(tmp_path / "base")
    (head,) = base.specs.keys() - language_model.specs.keys()
    assert base.specs[head].shape == (1, 32)
    assert base.ignored.items() <= language_model.ignored.items()
    assert language_model.specs.keys() - base.specs.keys() <= {"lm_head.weight", "embed_out.weight"}
    for name, tensor in base.tensors():
        assert name == head or same_bits(tensor, language_model.tensor(name)), name
    model, _ = load_model(tmp_path / "base", dtype="bfloat16", kind="reward_model")
    assert (model.config.num_labels, dict(model.named_parameters()).keys()) == (1, base.specs.keys())


def test_save_with_reward_head_draws_the_head_from_its_seed_alone(tmp_path: Path) -> None:
    heads = []
    for seed, noise in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        folder = tmp_path / f"{seed}-{noise}"
        save_with_reward_head(open_checkpoint("tiny:llama").folder, folder, dtype="float32", seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        heads.append(open_checkpoint(folder).tensor("score.weight").clone())
    assert same_bits(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].dtype == torch.float32
    assert 0.01 < float(heads[0].std()) < 0.03


def test_save_with_reward_head_names_a_padding_token(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for pad, name in (("<pad>", "pad"), (None, "end")):
        (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = pad
        tokenizer.save_pretrained(folder)
        save_with_reward_head(folder, tmp_path / name, dtype="bfloat16", seed=0)
        expected = tokenizer.eos_token_id if pad is None else tokenizer.pad_token_id
        assert open_checkpoint(tmp_path / name).config.pad_token_id == expected


def test_save_with_reward_head_says_nothing_of_the_new_head(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = open_checkpoint("tiny:mixtral").folder
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert "LOAD REPORT" in caplog.text
    caplog.clear()
    save_with_reward_head(folder, tmp_path, dtype="bfloat16", seed=0)
    assert not caplog.records


def test_save_config_writes_what_save_pretrained_writes(tmp_path: Path) -> None:
    model = tiny_model("llama")  # from a config, so that its own names neither architecture nor dtype
    save_config(model, tmp_path / "config")
    assert model.config.architectures is None
    model.save_pretrained(tmp_path / "whole")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "config" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert sorted(path.name for path in (tmp_path / "config").iterdir()) == ["config.json", "generation_config.json"]


def test_load_model_refuses_the_other_kind(tmp_path: Path) -> None:
    language_model = open_checkpoint("tiny:llama").folder
    save_with_reward_head(language_model, tmp_path / "base", dtype="bfloat16", seed=0)
    with pytest.raises(CheckpointError, match=r"`LlamaForCausalLM`. Name a run of `algorithm: reward`"):
        load_model(language_model, dtype="bfloat16", kind="reward_model")
    with pytest.raises(CheckpointError, match=r"LlamaForSequenceClassification\), which writes no text"):
        load_model(tmp_path / "base", dtype="bfloat16")
    with pytest.raises(CheckpointError, match="writes no text"):
        save_with_reward_head(tmp_path / "base", tmp_path / "again", dtype="bfloat16", seed=0)
    AutoModelForSequenceClassification.from_pretrained(language_model).save_pretrained(tmp_path / "two")
    with pytest.raises(CheckpointError, match="classifier of 2 labels"):
        load_model(tmp_path / "two", dtype="bfloat16", kind="reward_model")
