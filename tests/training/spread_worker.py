"""One of 1, 2 or 4 processes of `test_spread_trainers.py`: DPO and GRPO on one global batch, under DDP and FSDP2.

GRPO replays its completions: what is sampled differs from process to process, and would be other data for each number
of processes. The runs of more processes come first; those of fewer resume what they saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import QUIET, random_mask
from safetensors.torch import save_file
from training.every_trainer import TRAINERS, letters
from transformers import TrainerCallback

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.errors import MaskMismatchError, OptimizerStateError, TrainerError
from subnet_ft.masks import ModelRecord, Provenance, SubnetMask, by_canonical_name, format_fingerprint
from subnet_ft.optim.frozen import weights_digest
from subnet_ft.training import restrict
from subnet_ft.training.algorithms import Algorithm, build_config
from subnet_kernels import fingerprint

GLOBAL_BATCH = 4
SHARDING: dict[str, Any] = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
PARTS = {**SHARDING, "state_dict_type": "SHARDED_STATE_DICT"}
RUNS: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any]]] = {
    "DPO, ddp": ("DPO", None, {}),
    "DPO, fsdp": ("DPO", SHARDING, {}),
    "DPO, fsdp, in parts": ("DPO", PARTS, {"optim": "adamw_torch", "learning_rate": 1e-3}),
    "DPO, fsdp, one loads": ("DPO", {**SHARDING, "cpu_ram_efficient_loading": True}, {}),
    "GRPO, ddp": ("GRPO", None, {}),
    "GRPO, fsdp": ("GRPO", SHARDING, {}),
}
"""Name to the trainer, FSDP2's settings, and fields of its config."""


def replayed(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Return completions that depend on their prompt and their number in its group alone."""
    tokenizer = tiny_tokenizer()
    seen: dict[str, int] = {}
    completions = []
    for prompt in prompts:
        # Groups of two lie in one process or next to each other in two; which half is which, their place says.
        place = dist.get_rank() * len(prompts) + len(completions) if dist.is_initialized() else len(completions)
        seen[prompt] = place % 2
        digits = hashlib.sha256(f"{prompt}{seen[prompt]}".encode()).hexdigest()[:4]
        completions.append(tokenizer(digits, add_special_tokens=False)["input_ids"])
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": completions,
        "logprobs": [[0.0] * len(ids) for ids in completions],
    }


def trainer(folder: Path, run: str, *, evaluates: bool = False, only_delta: bool = False, **options: Any) -> Any:
    """Build a restricted trainer in float32, whose processes share a batch of four."""
    name, sharding, fields = RUNS[run]
    size = int(os.environ["WORLD_SIZE"])
    kind = TRAINERS[name]
    known: dict[str, Any] = {
        "output_dir": str(folder / run),
        "per_device_train_batch_size": GLOBAL_BATCH // size,
        "max_steps": 4,
        "learning_rate": 1e-1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "bf16": False,
        "activation_checkpointing": False,
        **QUIET,
        **kind.options,
        **fields,
        **options,
    }
    arguments = kind.arguments()
    model = tiny_model("llama", dtype=torch.float32)
    if name == "GRPO":
        known.update({"num_generations": 2, "beta": 0.0})
        arguments.update({"rollout_func": replayed, "reward_funcs": letters})
    if sharding is None:
        known.update({"ddp_backend": "gloo"})
    else:
        known = {"fsdp": True, "fsdp_config": dict(sharding), **known}
    algorithm = Algorithm(name, kind.trainer, kind.config)
    args = build_config(algorithm, known)
    if evaluates:
        arguments["eval_dataset"] = kind.data()
    built = algorithm.trainer_class(model=model, args=args, train_dataset=kind.data(), **arguments)
    restrict(built, random_mask(built.model, 0.3), audit_steps=2, save_only_delta=only_delta)
    if "one loads" in run and dist.get_rank() > 0:
        with torch.no_grad():  # as `from_pretrained` leaves them in all processes but the first
            for parameter in model.parameters():
                parameter.zero_()
    return built


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return whole weights, whoever holds them."""
    named = by_canonical_name(model.named_parameters()).items()
    full = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in named}
    return {name: value.detach().clone() for name, value in full.items()}


class Digests(TrainerCallback):
    """Notes a digest of all weights at the end of every step."""

    def __init__(self) -> None:
        self.found: dict[int, str] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take it; processes that hold parts take it together."""
        self.found[state.global_step] = weights_digest(kwargs["model"])


def train(folder: Path, run: str) -> dict[str, Any]:
    """Train, save after two steps, and write the weights of the end."""
    size = int(os.environ["WORLD_SIZE"])
    built = trainer(folder / str(size), run, save_strategy="steps", save_steps=2)
    start = {name: p.detach() for name, p in tiny_model("llama", dtype=torch.float32).named_parameters()}
    notes = Digests()
    built.add_callback(notes)
    built.train()
    weights, mask = whole(built.model), built.subnet_mask
    if dist.get_rank() == 0:
        save_file(weights, folder / f"{run}-{size}.safetensors")
    norms = [entry["grad_norm"] for entry in built.state.log_history if "grad_norm" in entry]
    return {
        "digests": notes.found,
        "norms": norms,
        "off_mask": [n for n, w in weights.items() if not torch.equal(w[~mask[n]], start[n][~mask[n]])],
        "moved": int(sum(((w != start[n]) & mask[n]).sum() for n, w in weights.items())),
        "trainable": mask.num_trainable,
        "compact": built.masked_optimizer.compact_grads,
        "held": sum(buffer.numel() for buffer in built.masked_optimizer.gradient_buffers()),
        "files": sorted(str(p.relative_to(folder)) for p in (folder / str(size) / run).glob("checkpoint-2/**/*")),
    }


def resume(folder: Path, run: str, saved_by: int) -> dict[str, Any]:
    """Go on from what another number of processes saved after two steps."""
    built = trainer(folder / f"from-{saved_by}", run)
    notes = Digests()
    built.add_callback(notes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built.train(resume_from_checkpoint=str(folder / str(saved_by) / run / "checkpoint-2"))
    weights = whole(built.model)
    if dist.get_rank() == 0:
        save_file(weights, folder / f"{run}-{saved_by}-then-{os.environ['WORLD_SIZE']}.safetensors")
    return {"digests": notes.found}


def best(folder: Path, engine: str) -> dict[str, Any]:
    """Load the best model at the end, which is that of the first step: the largest loss counts as best."""
    run, digests = f"DPO, {engine}", Digests()
    where = folder / f"best-{os.environ['WORLD_SIZE']}"
    built = trainer(
        where, run, evaluates=True, max_steps=3, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True,
    )  # fmt: skip
    built.add_callback(digests)
    built.train()
    return {
        "best": built.state.best_model_checkpoint,
        "is_first": weights_digest(built.model) == digests.found[1] != digests.found[3],
    }


def different_masks(folder: Path) -> str:
    """Return what every process says where each has another mask."""
    kind = TRAINERS["Trainer"]
    algorithm = Algorithm("Trainer", kind.trainer, kind.config)
    args = build_config(algorithm, {"output_dir": str(folder / "different"), "ddp_backend": "gloo", **QUIET})
    plain = algorithm.trainer_class(model=tiny_model("llama", dtype=torch.float32), args=args)
    try:
        restrict(plain, random_mask(plain.model, 0.3, seed=dist.get_rank()))
    except MaskMismatchError as error:
        return str(error)
    return ""


def refusals(folder: Path) -> dict[str, str]:
    """Return what every process says of a foreign mask, of another base that comes late, of mixed precision, and
    of checkpoints that are to hold a delta."""
    found = {}
    run = "DPO, fsdp, in parts"
    other = trainer(folder / "refused", run, max_steps=3)
    other.subnet_mask = random_mask(tiny_model("llama"), 0.3, seed=77)
    try:
        other.train(resume_from_checkpoint=str(folder / os.environ["WORLD_SIZE"] / run / "checkpoint-2"))
    except OptimizerStateError as error:
        found["foreign mask"] = str(error)
    late = trainer(folder / "refused", "DPO, fsdp, one loads", max_steps=1)
    other_base = tiny_model("llama", dtype=torch.float32, seed=5)
    prints = {n: format_fingerprint(fingerprint(p.detach())) for n, p in other_base.named_parameters()}
    record = ModelRecord("another/base", fingerprints=prints, dtypes=dict.fromkeys(prints, "float32"))
    late.subnet_mask = SubnetMask(late.subnet_mask.tensors, Provenance(base=record))
    try:
        late.train()
    except MaskMismatchError as error:
        found["base that one process loads"] = str(error)
    try:
        trainer(folder / "refused", "DPO, fsdp", bf16=True)
    except TrainerError as error:
        found["mixed precision"] = str(error)
    try:
        trainer(folder / "refused", "DPO, fsdp", only_delta=True)
    except TrainerError as error:
        found["only deltas"] = str(error)
    return found


def main() -> None:
    """Train, and resume what more processes saved."""
    folder, engine, most, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(os.environ["WORLD_SIZE"])
    if engine == "fsdp":
        import fsdp_on_cpu  # noqa: F401  # before anything of accelerate runs
    dist.init_process_group("gloo")
    runs = [run for run in RUNS if engine in run]
    result: dict[str, Any] = {"runs": {run: train(folder, run) for run in runs}}
    if size > 1:
        result["best"] = best(folder, engine)
    if size < most:
        result["resumed"] = {run: resume(folder, run, saved_by=most) for run in runs}
    elif engine == "fsdp":
        result["refusals"] = refusals(folder)
    else:
        result["different masks"] = different_masks(folder)
    (folder / f"result-{engine}-{size}-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # gloo now and then waits for ever when the group is taken down


if __name__ == "__main__":
    main()
