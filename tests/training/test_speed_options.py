"""Options that change how a run computes, and not what: `torch_compile` and `attn_implementation`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import RELATIVE, relative
from old_versions import needs_transformers_5_24
from safetensors.torch import load_file
from training.masked_runs import check_weights, restricted, same_weights, weights_of

from subnet_ft.checkpoints.models import load_model
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.errors import CheckpointError
from subnet_ft.masks import SubnetMask

TRAINERS = ("SFT", "DPO", "GRPO")
COMPILES = pytest.mark.filterwarnings("default")
"""torch's compiler looks at tensors and functions in ways that torch warns of, and fails where warnings raise."""
INDUCTOR = 1e-3
"""`relative` of what two float32 runs of two steps of AdamW changed, one of them with fused kernels, whose sums and
exponentials differ in their last digits: Adam divides by the root of tiny gradients. Measured: at most 1.4e-4; steps
that are ten times longer differ by 9."""


@pytest.fixture
def _own_compiler() -> Iterator[None]:
    """Compile anew, and leave nothing compiled behind."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def run(name: str, folder: Path, **options: Any) -> tuple[Any, SubnetMask, dict[str, torch.Tensor]]:
    """Train two steps in float32; return the trainer, the mask and what every weight changed."""
    options = {"save_strategy": "steps", "save_steps": 2, **options}
    trainer, mask = restricted(name, folder, dtype=torch.float32, **options)
    start = weights_of(trainer.model)
    trainer.train()
    check_weights(trainer.model, mask, start)  # off the mask bit by bit
    return trainer, mask, {name: weight - start[name] for name, weight in weights_of(trainer.model).items()}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return relative(*(torch.cat([value.flatten() for value in values.values()]) for values in (found, expected)))


def compiled(name: str, folder: Path, backend: str, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Train likewise, compiled; check that it was, and what its checkpoint calls the weights."""
    before = torch._dynamo.utils.counters["frames"]["ok"]
    trainer, _, changed = run(name, folder, torch_compile=True, torch_compile_backend=backend, **options)
    assert torch._dynamo.utils.counters["frames"]["ok"] > before
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    saved = load_file(folder / "checkpoint-2" / "model.safetensors")
    same_weights(saved, weights_of(trainer.model))
    assert not any("_orig_mod" in key for key in saved)
    assert trainer.masked_optimizer.compact_grads
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    return trainer, changed


@COMPILES
@pytest.mark.usefixtures("_own_compiler")
@pytest.mark.parametrize("name", TRAINERS)
def test_torch_compile_changes_no_step_of(name: str, tmp_path: Path) -> None:
    _, _, expected = run(name, tmp_path / "plain")
    _, changed = compiled(name, tmp_path / "compiled", "aot_eager")
    assert distance(changed, expected) < RELATIVE


@COMPILES
@pytest.mark.usefixtures("_own_compiler")
def test_torch_compile_goes_with_activation_checkpointing(tmp_path: Path) -> None:
    _, _, expected = run("SFT", tmp_path / "plain")
    _, changed = compiled("SFT", tmp_path / "compiled", "aot_eager", activation_checkpointing=True)
    assert distance(changed, expected) < RELATIVE


@COMPILES
@pytest.mark.usefixtures("_own_compiler")
def test_torch_compile_resumes_to_the_same_bits(tmp_path: Path) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "eager", "save_steps": 1}
    whole, _, _ = run("SFT", tmp_path, **options)
    resumed, _ = restricted("SFT", tmp_path, dtype=torch.float32, save_strategy="steps", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    same_weights(weights_of(resumed.model), weights_of(whole.model))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@COMPILES
@pytest.mark.usefixtures("_own_compiler")
@pytest.mark.parametrize("name", TRAINERS)
def test_torch_compile_with_inductor_stays_near_the_steps_of(name: str, tmp_path: Path) -> None:
    _, _, expected = run(name, tmp_path / "plain")
    _, changed = compiled(name, tmp_path / "compiled", "inductor")
    assert distance(changed, expected) < INDUCTOR


def test_distances_of_runs_can_fail(tmp_path: Path) -> None:
    _, _, expected = run("SFT", tmp_path / "plain")
    _, _, longer = run("SFT", tmp_path / "longer", learning_rate=1e-1)
    assert distance(longer, expected) > 10 * INDUCTOR > 10 * RELATIVE


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "deepseek_v3"])
def test_attention_implementations_agree(family: str, tmp_path: Path) -> None:
    """With padding on the left, as prompts have it; where nobody looks, the numbers mean nothing."""
    save_tiny(family, tmp_path, dtype=torch.float32)
    tokens = torch.arange(2, 34).reshape(2, 16)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    logits, gradients = [], []
    for name in ("eager", "sdpa"):
        model, _ = load_model(tmp_path, dtype="float32", attn_implementation=name)
        assert model.config._attn_implementation == name
        output = model(tokens, attention_mask=mask).logits[mask.bool()]
        output.float().log_softmax(-1)[:, 0].sum().backward()
        logits.append(output.detach())
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert relative(logits[1], logits[0]) < RELATIVE
    assert distance(gradients[1], gradients[0]) < RELATIVE


@needs_transformers_5_24("Gemma 2 takes this attention")
def test_load_model_refuses_an_attention_that_the_architecture_lacks(tmp_path: Path) -> None:
    save_tiny("gemma2", tmp_path)
    with pytest.raises(CheckpointError, match="Gemma2ForCausalLM does not support an attention implementation"):
        load_model(tmp_path, dtype="float32", attn_implementation="sdpa")
