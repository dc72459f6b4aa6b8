"""What a recipe's trainer does in a step, as far as its memory depends on it: read off the recipe and TRL's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from subnet_ft.plan.prompts import longest_prompt
from subnet_ft.plan.request import Request
from subnet_ft.recipe.algorithms import ALGORITHMS
from subnet_ft.recipe.methods import training_of
from subnet_ft.training.algorithms import run_config

if TYPE_CHECKING:
    from subnet_ft.recipe import Recipe

ASSUMED_PROMPT = 512
ASSUMED_LENGTH = 1024

_WHOLE_LOGITS = ("orpo", "simpo")
"""Trainers that hold all logits; TRL's other ones work in tiles."""

_BESIDE: dict[str, tuple[str, str]] = {"ppo": ("value_model", "value_trains"), "prime": ("reward_model", "prm_trains")}
"""What is trained beside the policy, and the config field that says which weights of it."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How completions are sampled.

    Args:
        sequences: Completions that a rank samples at a time.
        prompt: Tokens of the longest prompt.
        new: Tokens of the longest completion.
        engine: `trainer`: the trainer's own model samples; `server`: vLLM elsewhere; `colocate`: vLLM beside it.
        engine_share: Share of the GPU's memory that vLLM takes for itself.
        passes: Rounds of sampling per optimizer step.
    """

    sequences: int
    prompt: int
    new: int
    engine: Literal["trainer", "server", "colocate"]
    engine_share: float
    passes: float


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a trainer does in a step.

    Args:
        sequences: B, sequences of a micro-batch as the decoder reads them.
        length: L, tokens of each, padding included.
        scored: Tokens of each whose log-probability is computed.
        micro_batches: Per optimizer step and rank.
        batch_size: `per_device_train_batch_size`.
        activation_checkpointing: Layers are computed again in the backward pass.
        head: `fused` in tiles, tiles of `two` models, `whole` logits, or `none`.
        generation: How completions are sampled, for algorithms that do.
        has_reference: Whether a frozen reference model is there.
        beside: What is trained beside the policy.
        beside_trains: `full` or `subnet`.
        has_teacher: Whether a teacher is held while training.
        assumptions: What is not known and was assumed, a sentence each.
    """

    sequences: int
    length: int
    scored: int
    micro_batches: int
    batch_size: int
    activation_checkpointing: bool
    head: Literal["fused", "whole", "two", "none"]
    generation: Generation | None
    has_reference: bool
    beside: str | None
    beside_trains: str
    has_teacher: bool
    assumptions: tuple[str, ...]


def setting_of(recipe: Recipe, request: Request, method: str) -> Setting:
    """Return what a recipe's trainer does in a step.

    Args:
        recipe: The recipe.
        request: Says how long prompts are, if the recipe does not, and what trains.
        method: Whose settings of `training` apply.
    """
    algorithm = ALGORITHMS[recipe.algorithm]
    args: Any = run_config(algorithm, training_of(recipe, method), output_dir="plan", seed=recipe.seed)
    assumptions: list[str] = []
    batch = int(args.per_device_train_batch_size)
    is_online = algorithm.learns_from == "prompts"
    generation = _generation(recipe, args, request, assumptions) if is_online else None
    length = _length(recipe, args, request, assumptions) if generation is None else generation.prompt + generation.new
    # On a GPU TRL's fused head scores labelled tokens only; how many of a stored completion those are is not known.
    scored = generation.new if generation is not None and request.device == "cuda" else max(length - 1, 1)
    weight = algorithm.reference_weight
    beside, field = _BESIDE.get(recipe.algorithm, (None, ""))
    return Setting(
        sequences=batch * (2 if algorithm.learns_from == "preferences" else 1),
        length=length,
        scored=scored,
        micro_batches=int(args.gradient_accumulation_steps),
        batch_size=batch,
        activation_checkpointing=_checkpoints(args),
        head=_head(recipe.algorithm),
        generation=generation,
        has_reference=bool(algorithm.references)
        and (weight is None or getattr(args, weight) != 0)
        and not getattr(args, "precompute_ref_log_probs", False),
        beside=beside,
        beside_trains=getattr(args, field) if field else "full",
        has_teacher=algorithm.judge == "teacher",
        assumptions=tuple(assumptions),
    )


def _head(algorithm: str) -> Literal["fused", "whole", "two", "none"]:
    if algorithm in _WHOLE_LOGITS:
        return "whole"
    if ALGORITHMS[algorithm].model_kind == "reward_model":
        return "none"
    return "two" if ALGORITHMS[algorithm].judge == "teacher" else "fused"


def _checkpoints(args: Any) -> bool:
    new = getattr(args, "activation_checkpointing", None)
    return bool(args.gradient_checkpointing if new is None else new)


def _generation(recipe: Recipe, args: Any, request: Request, assumptions: list[str]) -> Generation:
    batch = int(args.per_device_train_batch_size)
    per_round = int(getattr(args, "steps_per_generation", None) or args.gradient_accumulation_steps)
    if "generation_batch_size" in recipe.training:
        # It counts the completions of all ranks.
        per_round = max(1, int(args.generation_batch_size) // (batch * request.gpus))
    engine: Literal["trainer", "server", "colocate"] = "trainer"
    if getattr(args, "use_vllm", False):
        engine = "colocate" if args.vllm_mode == "colocate" else "server"
    iterations = int(getattr(args, "num_iterations", 1) or 1)
    return Generation(
        sequences=batch * per_round,
        prompt=_prompt(recipe, request, assumptions),
        new=int(args.max_completion_length or ASSUMED_LENGTH),
        engine=engine,
        engine_share=float(getattr(args, "vllm_gpu_memory_utilization", 0.0)) if engine == "colocate" else 0.0,
        passes=int(args.gradient_accumulation_steps) / (per_round * iterations),
    )


def _prompt(recipe: Recipe, request: Request, assumptions: list[str]) -> int:
    if request.prompt_tokens is not None:
        return request.prompt_tokens
    counted = longest_prompt(recipe)
    if counted is not None:
        return counted
    assumptions.append(
        f"Prompts of {ASSUMED_PROMPT} tokens: the recipe's are not read for a plan. Say --prompt-tokens N."
    )
    return ASSUMED_PROMPT


def _length(recipe: Recipe, args: Any, request: Request, assumptions: list[str]) -> int:
    longest = getattr(args, "max_length", None)
    if request.tokens is not None:
        return request.tokens
    pairs, learns_from = recipe.task.pairs, ALGORITHMS[recipe.algorithm].learns_from
    if learns_from == "demonstrations" and (counted := longest_prompt(recipe, with_answer=True)) is not None:
        return counted if longest is None else min(counted, int(longest))
    if pairs is not None and learns_from in ("preferences", "labelled", "samples"):
        length = _prompt(recipe, request, assumptions) + pairs.max_new_tokens
        return length if longest is None else min(length, int(longest))
    if longest is None:
        assumptions.append(f"Sequences of {ASSUMED_LENGTH} tokens: `training.max_length` is not set. Say --tokens N.")
        return ASSUMED_LENGTH
    assumptions.append(
        f"Every sequence as long as `training.max_length` allows, {longest} tokens: how long the data are is not read "
        "for a plan. Say --tokens N."
    )
    return int(longest)
