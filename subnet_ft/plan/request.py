"""What a plan is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from subnet_ft.errors import PlanError
from subnet_ft.recipe.methods import METHODS

PLANNED = ("full", "subnet", "lora", "dora", "eva", "ia3")
"""Methods whose weights, state and activations follow from configs as they are planned here."""

SHARDINGS = ("none", "ddp", "fsdp2", "fsdp2_offload")
"""`none`: one process. `ddp`: every rank holds everything. `fsdp2`: every rank holds a part of every weight and of its
state. `fsdp2_offload`: the same, in the memory of the CPU between uses."""

DEVICES = ("cuda", "cpu")

ASSUMED_DENSITY = 0.2


@dataclass(frozen=True, kw_only=True)
class Request:
    """How a recipe is to be run, as far as the recipe does not say it.

    Args:
        gpus: Ranks, one per GPU, >= 1.
        memory: Bytes of one GPU, or `None`: nothing is said about what fits.
        shardings: Among `SHARDINGS`; empty: `none` for one GPU, `ddp` and `fsdp2` for several.
        methods: Among `PLANNED`; empty: full, subnet and lora.
        density: Of the subnetwork's mask, in (0, 1]; `None`: as the recipe or the mask file says.
        mask: A mask file, which says how many weights of every tensor are trained.
        prompt_tokens: Tokens of the longest prompt; `None`: counted where the recipe's prompts are at hand.
        tokens: Tokens of the longest sequence that is trained on; `None`: from prompts and the recipe's limits.
        device: What trains: `cuda`, or `cpu`, whose attention and head take more temporaries.

    Raises:
        PlanError: A value is out of range or unknown.
    """

    gpus: int = 1
    memory: int | None = None
    shardings: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    density: float | None = None
    mask: Path | None = None
    prompt_tokens: int | None = None
    tokens: int | None = None
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise PlanError(f"--gpus must be at least 1, got {self.gpus}. Every rank is a process with one GPU.")
        for method in self.methods:
            _check_method(method)
        for sharding in self.shardings:
            if sharding not in SHARDINGS:
                raise PlanError(f"`{sharding}` is no way to shard; choose among {', '.join(SHARDINGS)}.")
            if sharding == "none" and self.gpus > 1:
                raise PlanError(
                    f"--sharding none is one process, and --gpus is {self.gpus}. Choose ddp or fsdp2, or --gpus 1."
                )
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise PlanError(f"--density lies in (0, 1], got {self.density}. 1 is the full run.")
        if self.density is not None and self.mask is not None:
            raise PlanError("--density and --mask both say how many weights are trained. Leave out one of them.")
        for option, number in (("--prompt-tokens", self.prompt_tokens), ("--tokens", self.tokens)):
            if number is not None and number < 1:
                raise PlanError(f"{option} must be at least 1, got {number}.")
        if self.device not in DEVICES:
            raise PlanError(f"`{self.device}` is no device to plan for; choose among {', '.join(DEVICES)}.")

    @property
    def all_methods(self) -> tuple[str, ...]:
        """The methods to plan."""
        return self.methods or ("full", "subnet", "lora")

    @property
    def all_shardings(self) -> tuple[str, ...]:
        """The ways to shard to plan."""
        return self.shardings or (("none",) if self.gpus == 1 else ("ddp", "fsdp2"))


def _check_method(method: str) -> None:
    if method in PLANNED:
        return
    if method in METHODS:
        raise PlanError(f"`{method}` is not planned: what it holds is not worked out. Planned: {', '.join(PLANNED)}.")
    raise PlanError(f"`{method}` is no method. Planned: {', '.join(PLANNED)}.")
