"""Trainers train an adapter as it was built, with the base as their reference, whatever the algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import same_bits
from old_versions import needs_trl_1_16
from training.masked_runs import check_weights, weights_of

from subnet_ft.checkpoints.models import load_model
from subnet_ft.checkpoints.tiny import save_tiny, tiny_model, tiny_tokenizer
from subnet_ft.errors import MethodError
from subnet_ft.inputs import RunInputs
from subnet_ft.methods.adapters import adapter_parameters, attach
from subnet_ft.pipeline import load_checked_recipe
from subnet_ft.recipe.algorithms import ALGORITHMS
from subnet_ft.recipe.methods import METHODS
from subnet_ft.training import run as training_run
from subnet_ft.training.adapters import index_nbytes, left_as_built, prompt_texts
from subnet_ft.training_data import training_dataset

# PPO and PRIME have files of their own.
LANGUAGE_MODELS = ("dpo", "kto", "orpo", "simpo", "grpo", "rloo", "distillation", "sft", "raft")
SMALL = ["training.max_steps=3", "task.num_train=60", "task.num_eval=0", "evaluation.enabled=false", "seed=1"]
# Without it they have no reference model.
KL = {"grpo": ["training.beta=0.04"], "rloo": ["training.beta=0.04"]}


def adapted(**config: Any) -> Any:
    return attach(tiny_model("llama"), tiny_tokenizer(), "lora", {"r": 2, **config}, seed=0)


def trained(name: str, folder: Path, *overrides: str, method: str = "lora") -> tuple[Any, Any, dict[str, int]]:
    """Train a method with an algorithm; return the trainer, its mask and the bytes of the run."""
    own = ["task.pairs.num_prompts=60"] if ALGORITHMS[name].learns_from not in ("prompts", "demonstrations") else []
    if ALGORITHMS[name].judge == "teacher":
        own += ["teacher.name=tiny:qwen3", "training.per_device_train_batch_size=16"]
    settings = [*SMALL, *own, *KL.get(name, []), "training.learning_rate=2e-3", *overrides]
    inputs = RunInputs(load_checked_recipe(f"tiny/{name}", [*settings, f"output={folder}"]))
    kept: list[Any] = []
    restrict = training_run.restrict

    def keep(trainer: Any, mask: Any, **options: Any) -> Any:
        kept.extend([trainer, mask])
        return restrict(trainer, mask, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "restrict", keep)
        run = training_run.train(
            inputs.recipe,
            base=inputs.base.folder,
            folder=folder / method,
            mask=None,
            dataset=training_dataset(inputs, folder, overwrite=False, progress=False),
            task=inputs.data.task if inputs.needs_rewards else None,
            teacher=None if inputs.teacher is None else inputs.teacher.folder,
            method=method,
        )
    return kept[0], kept[1], run.memory


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_trl_1_16("the loss of DPO is rounded to bfloat16")) if name == "dpo" else name
        for name in LANGUAGE_MODELS
    ],
)
def test_lora_trains_with(name: str, tmp_path: Path) -> None:
    start = weights_of(attach(tiny_model("llama"), tiny_tokenizer(), "lora", seed=1))
    trainer, mask, memory = trained(name, tmp_path)
    check_weights(trainer.model, mask, start)
    assert trainer.state.global_step == 3
    assert getattr(trainer, "ref_model", None) is None
    assert list(trainer.model.peft_config) == ["default"]
    assert ("teacher_model" in memory) is (name == "distillation")
    assert "reference_model" not in memory
    # As the policy starts as the base, its first step is at the reference.
    first = trainer.state.log_history[0]
    if name == "dpo":
        assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    if name in KL:
        assert first["kl"] == pytest.approx(0.0, abs=1e-6)
        assert trainer.state.log_history[2]["kl"] > 0.0


def test_train_takes_a_method_s_own_hyper_parameters(tmp_path: Path) -> None:
    overrides = ["training.lr_scheduler_type=constant", "methods.lora.training={learning_rate: 3.0e-4}"]
    trainer, _, _ = trained("sft", tmp_path, *overrides)
    assert trainer.args.learning_rate == 3e-4
    other, _, _ = trained("sft", tmp_path, *overrides, method="ia3")
    assert other.args.learning_rate == 2e-3


def test_train_never_computes_a_learned_prefix_again(tmp_path: Path) -> None:
    trainer, _, _ = trained("sft", tmp_path, "training.activation_checkpointing=true", method="prefix_tuning")
    assert trainer.args.gradient_checkpointing is False
    other, _, _ = trained("sft", tmp_path, "training.activation_checkpointing=true")
    assert other.args.gradient_checkpointing is True


def test_left_as_built_takes_away_what_trl_adds_and_gives_back_what_it_rounds() -> None:
    model = adapted()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with left_as_built(model, METHODS["lora"], "DPOTrainer"):
        model.add_adapter("ref", model.peft_config["default"])
        for parameter in adapter_parameters(model).values():
            parameter.data = parameter.data.to(torch.bfloat16)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(same_bits(after[name].detach(), before[name]) for name in before)


def test_train_names_the_method_that_a_trainer_refuses(tmp_path: Path) -> None:
    head = ["model.name=tiny:qwen2", "methods.lora.config.target_modules=[lm_head, q_proj]"]
    with pytest.raises(MethodError, match=r"`lora` does not go with `SFTTrainer`: .*`lm_head`"):
        trained("sft", tmp_path, *head)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "1 + 1 = ", "completion": "2"}, "1 + 1 = "),
        ({"prompt": [{"role": "user", "content": "hi"}], "completion": []}, "user: hi\n"),
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": []}, "user: a\n"),
        ({"text": "all of it"}, "all of it"),
    ],
)
def test_prompt_texts_are_what_the_model_reads(row: dict[str, Any], expected: str) -> None:
    assert prompt_texts(Dataset.from_list([row] * 3), tiny_tokenizer()) == [expected] * 3


def test_index_nbytes_counts_what_shira_keeps_beside_its_weights() -> None:
    model = attach(tiny_model("llama"), tiny_tokenizer(), "shira", {"r": 4}, seed=0)
    count = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    assert index_nbytes(model) == 2 * 4 * count
    assert index_nbytes(adapted()) == 0


@needs_trl_1_16("DPO cannot train a prompt, and rounds its loss to bfloat16")
@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning"])
def test_dpo_computes_what_the_models_say(method: str, tmp_path: Path) -> None:
    """A learned prompt makes more positions than there are tokens, and TRL must read the right ones."""
    rows = [{"prompt": f"{a * 7} + 1 = ", "chosen": f"{a * 7 + 1}", "rejected": "?" * (1 + a % 3)} for a in range(8)]
    base, tokenizer = save_tiny("llama", tmp_path / "base", dtype=torch.float32), tiny_tokenizer()
    settings = ["training.max_steps=1", "training.per_device_train_batch_size=8", "model.dtype=float32"]
    recipe = load_checked_recipe("tiny/dpo", [*settings, f"output={tmp_path}"])
    run = training_run.train(
        recipe,
        base=base,
        folder=tmp_path / method,
        mask=None,
        dataset=Dataset.from_list(rows),
        task=None,
        method=method,
    )

    def log_probs(model: Any, key: str) -> torch.Tensor:
        sums = []
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            completion = [*tokenizer(row[key])["input_ids"], tokenizer.eos_token_id]
            ids = torch.tensor([prompt + completion])
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
            expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            sums.append(expected.gather(1, torch.tensor(completion).unsqueeze(1)).sum())
        return torch.stack(sums)

    model, _ = load_model(base, dtype="float32")
    reference = {key: log_probs(model, key) for key in ("chosen", "rejected")}
    start = attach(model, tokenizer, method, seed=recipe.seed).eval()
    policy = {key: log_probs(start, key) for key in ("chosen", "rejected")}
    ratios = {key: policy[key] - reference[key] for key in policy}
    loss = -torch.nn.functional.logsigmoid(0.1 * (ratios["chosen"] - ratios["rejected"])).mean()
    first = run.log_history[0]
    assert first["loss"] == pytest.approx(float(loss), abs=1e-4)
    for key, values in policy.items():
        assert first[f"logps/{key}"] == pytest.approx(float(values.mean()), abs=1e-3)
