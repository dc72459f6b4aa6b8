"""The memory of one rank: what it holds from step to step, and what each part of a step adds to that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from subnet_ft.plan.head import Head, fused_head, no_head, whole_head
from subnet_ft.plan.persistent import ledger, reference_bytes
from subnet_ft.plan.setting import Generation, Setting
from subnet_ft.plan.shapes import ModelShapes
from subnet_ft.plan.temporaries import prefill, training_pass
from subnet_ft.plan.trained import PlannedTensor, Trained

if TYPE_CHECKING:
    from subnet_ft.recipe import Recipe

_SAMPLING_COPIES = 12  # bytes per logit: in float32, over the temperature, and their softmax


@dataclass(frozen=True)
class Part:
    """What a rank holds for one purpose.

    Args:
        name: The purpose.
        nbytes: Bytes.
        is_exact: Counted from shapes; else an estimate.
    """

    name: str
    nbytes: int
    is_exact: bool


@dataclass(frozen=True)
class Phase:
    """What a part of a step adds: the phases follow each other, and the largest decides.

    Args:
        name: What is done.
        parts: What it takes, all estimates.
    """

    name: str
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class RankMemory:
    """The memory of the rank that holds most.

    Args:
        persistent: On the GPU, from step to step.
        phases: What parts of a step add there.
        host: In the memory of the CPU, where weights and state are offloaded.
    """

    persistent: tuple[Part, ...]
    phases: tuple[Phase, ...]
    host: tuple[Part, ...] = ()

    @property
    def largest(self) -> Phase:
        """The phase that decides."""
        return max(self.phases, key=lambda phase: phase.nbytes)

    @property
    def persistent_bytes(self) -> int:
        """Bytes on the GPU from step to step."""
        return sum(part.nbytes for part in self.persistent)

    @property
    def total(self) -> int:
        """Bytes on the GPU at the peak."""
        return self.persistent_bytes + self.largest.nbytes


def rank_memory(
    recipe: Recipe,
    shapes: ModelShapes,
    trained: Trained,
    setting: Setting,
    *,
    sharding: str,
    world: int,
    device: str,
    gpu_bytes: int | None,
    teacher: ModelShapes | None = None,
    beside: Trained | None = None,
) -> RankMemory:
    """Work out the memory of a rank.

    Args:
        recipe: The recipe.
        shapes: The base.
        trained: The policy, under a method.
        setting: What its trainer does.
        sharding: As in `SHARDINGS`.
        world: Ranks.
        device: `cuda` or `cpu`.
        gpu_bytes: Of one GPU, of which vLLM takes a share when it samples beside the trainer.
        teacher: The teacher that is held while training.
        beside: What is trained beside the policy.
    """
    parts = world if sharding.startswith("fsdp2") else 1
    own = trained.sharded(parts)
    counted = ledger(own, recipe.subnet.optimizer, device=device, master=_master(trained))
    counted |= _frozen(recipe, shapes, trained, own, setting, device=device)
    if teacher is not None:
        counted["teacher model"] = sum(math.prod(s) for s in teacher.parameters.values()) * teacher.dtype.itemsize
    if beside is not None and setting.beside is not None:
        value = ledger(beside.tensors, recipe.subnet.optimizer, device=device, master="fp32")
        counted[setting.beside.replace("_", " ")] = value.pop("weights")
        counted[f"{setting.beside.split('_')[0]} optimizer"] = sum(value.values())
    persistent = [Part(name, size, is_exact=True) for name, size in counted.items() if size]
    engine = _engine_bytes(setting, gpu_bytes)
    phases = _phases(shapes, trained, setting, device=device, beside=beside)
    host: tuple[Part, ...] = ()
    if parts > 1:
        phases = _gathered(phases, shapes, trained, setting)
    if sharding == "fsdp2_offload":
        host, persistent = tuple(persistent), []
    if engine:
        persistent.append(Part("vLLM beside the trainer", engine, is_exact=True))
    return RankMemory(tuple(persistent), tuple(phases), host)


def _master(trained: Trained) -> str | None:
    # As in training: the weights of an adapter are float32, of which a remainder would complete nothing.
    return None if trained.method in ("full", "subnet") else "fp32"


def _frozen(
    recipe: Recipe,
    shapes: ModelShapes,
    trained: Trained,
    own: Sequence[PlannedTensor],
    setting: Setting,
    *,
    device: str,
) -> dict[str, int]:
    if not setting.has_reference:
        return {}
    return {
        "reference model": reference_bytes(
            trained,
            own,
            source=recipe.reference.source,
            quantization=recipe.reference.quantization,
            linears=shapes.linears,
            device=device,
        )
    }


def _phases(
    shapes: ModelShapes,
    trained: Trained,
    setting: Setting,
    *,
    device: str,
    beside: Trained | None,
) -> list[Phase]:
    policy = training_pass(
        trained, setting.sequences, setting.length, activation_checkpointing=setting.activation_checkpointing
    )
    other = None
    if beside is not None:
        other = training_pass(
            beside, setting.sequences, setting.length, activation_checkpointing=setting.activation_checkpointing
        )
    peak = policy.peak
    if other is not None and setting.beside == "value_model":
        # One backward pass serves both: it goes through the value model first, while the policy waits.
        peak = max(peak, policy.saved + other.peak)
    head = head_of(shapes, trained, setting, device=device)
    kept = head.kept_gradient if shapes.is_tied else 0
    embedding = 3 * head.kept_gradient if shapes.is_tied else 0  # the head's gradient, the input's, and their sum
    phases = [
        Phase(
            "head",
            (
                _estimate("activations", policy.saved),
                _estimate("logits", head.logits),
                _estimate("dense gradients", head.gradient),
            ),
        ),
        Phase(
            "backward",
            (
                _estimate("activations", peak),
                _estimate("dense gradients", max(kept + policy.total - policy.peak, embedding - peak)),
            ),
        ),
    ]
    if other is not None and setting.beside == "reward_model":
        logits = whole_head(shapes, setting.sequences * (setting.scored + 1), is_trained=True)
        phases.append(
            Phase(
                "reward model",
                (
                    _estimate("activations", other.peak),
                    # Its log-probabilities are taken in float32.
                    _estimate("logits", 2 * logits.logits),
                    _estimate("dense gradients", logits.gradient),
                ),
            )
        )
    if setting.generation is not None and setting.generation.engine == "trainer":
        phases.append(_sampling(shapes, trained, setting.generation))
    return phases


def head_of(shapes: ModelShapes, trained: Trained, setting: Setting, *, device: str) -> Head:
    """Return what the head of a micro-batch takes."""
    positions = setting.sequences * setting.scored
    is_trained = any(tensor.count for tensor in trained.tensors if tensor.name == shapes.head)
    if setting.head == "none":
        return no_head()
    if setting.head == "whole":
        return whole_head(shapes, positions, is_trained=is_trained)
    models = 2 if setting.head == "two" else 1
    return fused_head(shapes, positions, is_trained=is_trained, device=device, models=models)


def _engine_bytes(setting: Setting, gpu_bytes: int | None) -> int:
    """Count what vLLM takes for itself on a GPU that it shares with the trainer: all the time, unless it sleeps."""
    if setting.generation is None or setting.generation.engine != "colocate" or gpu_bytes is None:
        return 0
    return round(setting.generation.engine_share * gpu_bytes)


def _sampling(shapes: ModelShapes, trained: Trained, generation: Generation) -> Phase:
    first = prefill(trained, generation.sequences, generation.prompt)
    cache = first.cache * (generation.prompt + generation.new) // generation.prompt
    layers = max(len(shapes.layers), 1)
    sampled = generation.sequences * shapes.vocabulary * (shapes.dtype.itemsize + _SAMPLING_COPIES)
    return Phase(
        "sampling",
        (
            # While a layer's keys and values grow by a token, the old ones are there, too.
            _estimate("keys and values", cache + cache // layers),
            _estimate("logits", max(sampled, first.peak - first.cache)),
        ),
    )


def _gathered(phases: Sequence[Phase], shapes: ModelShapes, trained: Trained, setting: Setting) -> list[Phase]:
    """Add what FSDP2 gathers: the unit outside the layers, a layer and the next one; and dense gradients."""
    sizes = dict.fromkeys((*shapes.layers, ""), 0)
    gradients = dict.fromkeys(sizes, 0)
    for tensor in trained.tensors:
        unit = next((layer for layer in shapes.layers if layer in tensor.name), "")
        sizes[unit] += tensor.nbytes
        gradients[unit] += tensor.nbytes if tensor.count else 0
    layer = max((size for unit, size in sizes.items() if unit), default=0)
    weights = Part("gathered weights", sizes[""] + 2 * layer, is_exact=False)
    # Before the last micro-batch FSDP2 adds up whole dense gradients; without that, a unit's and its reduction's input.
    largest = max(gradients.values())
    waiting = sum(gradients.values()) if setting.micro_batches > 1 else 0
    reduced = Part("gradients to reduce", waiting + largest, is_exact=False)
    found = []
    for phase in phases:
        trains = phase.name in ("head", "backward")
        found.append(Phase(phase.name, (*phase.parts, weights, *((reduced,) if trains else ()))))
    return found


def _estimate(name: str, nbytes: int) -> Part:
    return Part(name, max(nbytes, 0), is_exact=False)
