"""What a recipe can say: frozen dataclasses, one documented field per YAML key.

The annotations are the specification that `parsing.py` enforces: `Literal` lists the allowed words, `Range` the allowed
numbers, and a field without a default is a required key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from subnet_ft.recipe.evidence_schema import EvidenceSpec, RepeatsSpec, RetentionSpec
from subnet_ft.recipe.mask_schema import Control, SourceSpec
from subnet_ft.recipe.ranges import Count, CountOrZero, Range
from subnet_ft.recipe.task_schema import TaskSpec

Dtype = Literal["bfloat16", "float32", "float16"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The base model: where every run of the recipe starts."""

    name: str
    """Local folder, Hub id, `package:MODULE/FILE.gguf`, a `.gguf` path, or `tiny:FAMILY` (random weights)."""

    revision: str | None = None
    """Hub revision (branch, tag or commit); `None` is the default branch."""

    dtype: Dtype = "bfloat16"
    """Dtype of the weights in every run. In float32 nearly every weight changes, so that an exact mask is dense."""

    attn_implementation: str | None = None
    """Passed to transformers (`sdpa`, `eager`, `flash_attention_2`, ...); `None` lets transformers choose."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """The optimizer of every run; the full run uses it with a full mask."""

    name: Literal["adamw", "adamw_8bit", "sgd"] = "adamw"
    """`adamw`: MaskedAdamW; `adamw_8bit`: bitsandbytes' AdamW with moments in 8 bits, those of tensors with fewer than
    4096 trainable weights in fp32; `sgd`: MaskedSGD without momentum. Learning rate, betas, epsilon, decay and clipping
    come from `training`."""

    master: Literal["fp32", "remainder", "none"] = "fp32"
    """Exact fp32 master weights as 4 bytes each, or as a 2-byte remainder beside a bfloat16 weight; `none`: what
    rounding to bfloat16 loses at a step is lost, for studies of what that does (it saves no memory)."""

    clip_norm: Literal["masked", "full"] = "masked"
    """`max_grad_norm` clips on the norm of the gradient on the mask, or on that of the whole one, as the paper did."""

    nonfinite: Literal["raise", "skip"] = "raise"
    """Stop at a NaN or infinite gradient, or leave the step out."""


@dataclass(frozen=True, kw_only=True)
class SubnetSpec:
    """The subnetwork run."""

    source: SourceSpec = field(default_factory=SourceSpec)
    """Where the mask comes from."""

    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    """How the masked weights are updated."""

    audit_steps: int | None = None
    """Compare the weights outside the mask bit by bit every so many steps, and at the end of every run."""

    log_norms: bool = False
    """Log the norm on the mask and that of the whole gradient beside the one that clipping goes by."""

    save_only_delta: bool = False
    """In runs that leave weights out, let trainer checkpoints hold a delta of the base instead of dense weights."""

    save_total_bytes: int | None = None
    """Keep as many trainer checkpoints of a run as fit into so many bytes, beside `training.save_total_limit`; the
    newest stays in any case."""


@dataclass(frozen=True, kw_only=True)
class ReferenceSpec:
    """The frozen reference model, for algorithms that hold one."""

    source: Literal["model", "policy"] = "model"
    """`model`: a second model. `policy`: in runs that leave weights out, the policy itself with the base's values of
    its mask swapped in, which alone are kept; the same losses to the last bit."""

    quantization: Literal["int8", "nf4"] | None = None
    """Hold its linear layers in 8 bits (LLM.int8) or 4 bits (NF4) by bitsandbytes; `None`: as the base is stored. Its
    log-probabilities, and so the loss, are then those of the rounded model."""


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """Settings of one method; everything else is that of the recipe, so that methods can be compared."""

    training: dict[str, Any] = field(default_factory=dict)
    """Fields of `training` with another value for this method: learning rate, schedule, decay, betas, clipping."""

    config: dict[str, Any] = field(default_factory=dict)
    """The method's own config fields, verbatim: those of PEFT's `LoraConfig` for `lora`; `methods.py` has the table."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """How the verdict on accuracy is reached."""

    enabled: bool = True
    """Generate greedy answers to the held-out prompts; `false` compares weights only."""

    margin: Annotated[float, Range(above=0.0, below=1.0)] = 0.02
    """Equivalence margin as a fraction: how much accuracy below the full run still counts as recovered."""

    confidence: Annotated[float, Range(above=0.5, below=1.0)] = 0.95
    """Confidence level of every interval."""

    max_new_tokens: Count = 256
    """Longest answer, in tokens. When a recipe leaves it out: `training.max_completion_length`, else
    `task.pairs.max_new_tokens`, else 256."""

    batch_size: Count = 64
    """Prompts answered at a time."""

    task: TaskSpec | None = None
    """Judge on this task instead of the training task; required when training on a dataset of preferences or labels."""

    agreement_prompts: CountOrZero = 200
    """Held-out prompts on which the runs' output distributions are compared with the full run's; 0 for none."""

    retention: RetentionSpec | None = None
    """What to measure of the base's other abilities; `None`: nothing."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole experiment on one page: base, data, algorithm, mask, controls and the rule of the verdict."""

    model: ModelSpec
    """The base model."""

    task: TaskSpec
    """Data and rewards."""

    algorithm: str
    """Name of the training algorithm, such as `grpo` or `dpo`; `algorithms.py` has the table."""

    training: dict[str, Any] = field(default_factory=dict)
    """The TRL config's own fields, verbatim."""

    teacher: ModelSpec | None = None
    """The model that `distillation` learns from, with the tokenizer of `model`; or the one that writes the rationales
    of `distilling_step_by_step`, with any tokenizer. Only for these algorithms."""

    reference: ReferenceSpec = field(default_factory=ReferenceSpec)
    """How the frozen reference model is held, if the algorithm has one."""

    subnet: SubnetSpec = field(default_factory=SubnetSpec)
    """The subnetwork run."""

    controls: list[Control] = field(default_factory=lambda: ["uniform", "magnitude_matched"])
    """Masks with as many trainable weights per tensor, chosen by other rules, each trained like the subnetwork."""

    baselines: list[str] = field(default_factory=list)
    """Other methods, such as `lora`, trained and judged beside the masks."""

    repeats: RepeatsSpec = field(default_factory=RepeatsSpec)
    """Runs with other seeds of training."""

    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    """How the verdict is reached."""

    evidence: EvidenceSpec = field(default_factory=EvidenceSpec)
    """What is measured beside it."""

    output: str
    """Folder of the run, relative to where the command starts."""

    seed: CountOrZero = 0
    """Seed of data, sampling, training and control masks."""

    method: str = "full"
    """What `subnet-ft train` trains: `full`, `subnet` or another method; `subnet-ft run` does the first two."""

    methods: dict[str, MethodSpec] = field(default_factory=dict)
    """Settings of single methods, by name: of the one that `method` names, and of those that are compared."""

    keep_checkpoints: bool = False
    """Keep the intermediate trainer checkpoints of finished stages."""
