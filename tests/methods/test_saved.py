"""An adapter belongs to its base, and a folder that does not hold what it says is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from safetensors.torch import load_file, save_file

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.models import load_model
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.digests import checkpoint_sha256
from subnet_ft.errors import CheckpointError, CheckpointMismatchError
from subnet_ft.methods.adapters import adapter_parameters, attach
from subnet_ft.methods.saved import BASE, CONFIG, WEIGHTS, base_digest, is_adapter, load_trained, save_adapter

IDS = torch.arange(2, 34).view(2, 16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base and a LoRA of it that changes something."""
    folder = tmp_path_factory.mktemp("saved")
    base = save_tiny("llama", folder / "base")
    model, tokenizer = load_model(base, dtype="bfloat16")
    adapted = attach(model, tokenizer, "lora", {"r": 2}, seed=0)
    for parameter in adapter_parameters(adapted).values():
        parameter.data += 0.1
    save_adapter(adapted, tokenizer, folder / "lora", method="lora", base=base, base_name="tiny:llama")
    with torch.no_grad():
        save_file({"logits": adapted.eval()(IDS).logits}, folder / "expected.safetensors")
    return folder


@pytest.fixture
def lora(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of the adapter to damage."""
    return Path(shutil.copytree(saved / "lora", tmp_path / "lora"))


def test_load_trained_gives_the_same_logits_on_a_copy_of_the_base(saved: Path, tmp_path: Path) -> None:
    """However the base is sharded, and wherever it lies."""
    model, tokenizer = load_model(saved / "base", dtype="bfloat16")
    model.save_pretrained(tmp_path / "moved", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "moved")
    assert len(list((tmp_path / "moved").glob("*.safetensors"))) > 1
    loaded, _ = load_trained(saved / "lora", tmp_path / "moved", dtype="bfloat16")
    with torch.no_grad():
        assert same_bits(loaded(IDS).logits, load_file(saved / "expected.safetensors")["logits"])
    assert not [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("name", ["org/model", "tiny:llama", "package:wheel/model.Q4_1.gguf"])
def test_save_adapter_names_a_base_of_the_hub_as_peft_wants_it(name: str, saved: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(saved / "base", dtype="bfloat16")
    adapted = attach(model, tokenizer, "lora", {"r": 2}, seed=0)
    save_adapter(adapted, tokenizer, tmp_path, method="lora", base=saved / "base", base_name=name)
    written = json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"]
    assert written == (name if name == "org/model" else str(saved / "base"))
    load_trained(tmp_path, saved / "base", dtype="bfloat16")


def test_load_trained_refuses_another_base(saved: Path, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "other", seed=1)
    message = rf"\(lora\) was trained on `tiny:llama`, whose weights are not those of `{other}`.*`model\.name`"
    with pytest.raises(CheckpointMismatchError, match=message):
        load_trained(saved / "lora", other, dtype="bfloat16")


def test_load_trained_loads_whole_checkpoints(saved: Path) -> None:
    loaded, _ = load_trained(saved / "base", "no base is needed", dtype="bfloat16")
    assert dict(loaded.named_parameters()).keys() == open_checkpoint(saved / "base").specs.keys()
    assert is_adapter(saved / "lora")
    assert not is_adapter(saved / "base")


def test_load_trained_quantizes_the_base_under_an_adapter_when_asked(saved: Path) -> None:
    loaded, _ = load_trained(saved / "lora", saved / "base", dtype="bfloat16", quantization="nf4")
    with torch.no_grad():
        assert not torch.equal(loaded(IDS).logits, load_file(saved / "expected.safetensors")["logits"])
    assert {p.dtype for n, p in loaded.named_parameters() if "base_layer" in n} == {torch.uint8}


def test_load_trained_holds_the_base_as_it_was_trained_on(saved: Path, lora: Path) -> None:
    belongs_to = json.loads((lora / BASE).read_text())
    (lora / BASE).write_text(json.dumps({**belongs_to, "quantization": "nf4"}))
    loaded, _ = load_trained(lora, saved / "base", dtype="bfloat16")
    assert {p.dtype for n, p in loaded.named_parameters() if "base_layer" in n} == {torch.uint8}


def _without_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights.pop(min(weights))
    save_file(weights, folder / WEIGHTS)


def _of_another_rank(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "r": 3}))


def _cut_off(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), r"has no `adapter_model\.safetensors`\. Remove the folder"),
        (_cut_off, r"adapter_model\.safetensors` is not whole"),
        (_without_a_weight, r"does not hold the adapter of its `adapter_config\.json`: 1 weights are .*not there"),
        (_of_another_rank, r"28 weights are .*\(2, \d+\) instead of \(3, "),
        (lambda folder: (folder / BASE).unlink(), r"adapter without `adapter_base\.json`, so its base is not known"),
        (lambda folder: (folder / BASE).write_text("{"), r"adapter_base\.json` is not JSON"),
        (lambda folder: (folder / BASE).write_text('{"format": 9}'), r"another format than 1"),
        (lambda folder: (folder / BASE).write_text('{"format": 1}'), r"lacks what it should say"),
    ],
)
def test_load_trained_refuses_a_folder_that_does_not_hold_what_it_says(
    damage: Any, message: str, saved: Path, lora: Path
) -> None:
    damage(lora)
    with pytest.raises(CheckpointError, match=message):
        load_trained(lora, saved / "base", dtype="bfloat16")


def test_checkpoint_sha256_covers_an_adapter(lora: Path) -> None:
    before = checkpoint_sha256(lora)
    weights = load_file(lora / WEIGHTS)
    weights[min(weights)] += 1
    save_file(weights, lora / WEIGHTS)
    changed = checkpoint_sha256(lora)
    (lora / BASE).write_text("{}")
    assert len({before, changed, checkpoint_sha256(lora)}) == 3


def test_base_digest_changes_with_any_weight(saved: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(saved / "base", dtype="bfloat16")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert base_digest(open_checkpoint(tmp_path)) != base_digest(open_checkpoint(saved / "base"))
