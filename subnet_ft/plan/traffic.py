"""What a rank sends in one optimizer step, by formula: collectives as rings, which send the least there is to send."""

from __future__ import annotations

from dataclasses import dataclass

from subnet_ft.plan.trained import Trained

_VALUE = 4  # bytes of a compact gradient's value


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends per optimizer step, and what it copies between CPU and GPU.

    Args:
        gradients: Reduced over the ranks.
        weights: Gathered for forward and backward passes.
        generation: Gathered to sample completions, token by token, where the trainer's own model samples.
        host: Copied over the bus to the CPU and back.
        dense_gradients: What the gradients would be without compaction: a dense all-reduce in the weights' dtype.
    """

    gradients: int = 0
    weights: int = 0
    generation: int = 0
    host: int = 0
    dense_gradients: int = 0

    @property
    def total(self) -> int:
        """What goes over the network."""
        return self.gradients + self.weights + self.generation


def traffic_of(
    trained: Trained, sharding: str, world: int, *, micro_batches: int, gathers: int = 0, generated: float = 0
) -> Traffic:
    """Count the traffic of one optimizer step.

    Args:
        trained: The policy.
        sharding: As in `SHARDINGS`.
        world: Ranks.
        micro_batches: Per optimizer step.
        gathers: Forward passes without a backward pass per micro-batch, of a reference model of equal size.
        generated: Forward passes that sample completions per optimizer step: one per token.
    """
    if world == 1:
        return Traffic()
    share = (world - 1) / world
    in_gradient = [tensor for tensor in trained.tensors if tensor.count]
    dense = sum(tensor.nbytes for tensor in in_gradient)
    if sharding == "ddp":
        compact = _VALUE * trained.num_trainable
        return Traffic(gradients=int(2 * share * compact), dense_gradients=int(2 * share * dense))
    weights = sum(tensor.nbytes for tensor in trained.tensors)
    passes = (2 + gathers) * micro_batches
    host = 0
    if sharding == "fsdp2_offload":
        host = (passes * weights + dense) // world
    return Traffic(
        # Once per step, however many micro-batches: those before are added up without being exchanged.
        gradients=int(share * dense),
        weights=int(share * weights * passes),
        generation=int(share * weights * generated),
        host=host,
        dense_gradients=int(2 * share * dense),
    )
