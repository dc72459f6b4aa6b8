"""The table of algorithms: what runs each, what it learns from, and where it departs from its TRL config."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from subnet_ft.recipe.ranges import Range

LearnsFrom = Literal["prompts", "preferences", "labelled", "demonstrations", "samples", "rationales"]
"""What an algorithm learns from:

- `prompts`: samples completions itself, and has them judged; nothing else to read.
- `preferences`: a chosen against a rejected completion, sampled from the base or of a dataset.
- `labelled`: single completions, right or wrong, sampled from the base or of a dataset.
- `demonstrations`: completions to copy, made from the task's reference answers or of a dataset.
- `samples`: right completions that the base sampled itself.
- `rationales`: answers and rationales that the teacher wrote.
"""


@dataclass(frozen=True)
class Algorithm:
    """One algorithm, by the names of what runs it; nothing is imported before it is needed.

    Args:
        name: The recipe's `algorithm`.
        trainer: `module:class` of the trainer.
        config: `module:class` of its config, whose fields are the recipe's `training` section.
        learns_from: Its data.
        judge: What judges completions while it trains, if anything: the task's `rewards`, or the recipe's `teacher`.
        references: Attributes of the trainer that hold frozen models of the base's weights, or `None`.
        reference_weight: Config field without which, at 0, it holds no reference model; `None`: it always does.
        defaults: Config fields with another default than TRL's; a recipe may change them.
        fixed: Config fields without which it would be another algorithm; a recipe may only repeat them.
        ranges: Annotations of config fields, narrower than those that all algorithms share.
        adds_bos: Its trainer puts the BOS token before every prompt, also where the tokenizer does not.
        model_kind: What it trains: the language model itself, or a reward model, which is that one with a new head.
        needs_one_process: Its trainer cannot share its work with other processes.
    """

    name: str
    trainer: str
    config: str
    learns_from: LearnsFrom = "prompts"
    judge: Literal["rewards", "teacher"] | None = None
    references: tuple[str, ...] = ()
    reference_weight: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ranges: Mapping[str, Any] = field(default_factory=dict)
    adds_bos: bool = False
    model_kind: Literal["language_model", "reward_model"] = "language_model"
    needs_one_process: bool = False

    @property
    def has_teacher(self) -> bool:
        """Whether a recipe must name a teacher: to judge completions, or to write what is learned."""
        return self.judge == "teacher" or self.learns_from == "rationales"

    @property
    def trainer_class(self) -> Any:
        """The trainer class."""
        return load_object(self.trainer)

    @property
    def config_class(self) -> Any:
        """The config dataclass."""
        return load_object(self.config)


_REFERENCE = ("ref_model",)
# TRL's older preference trainers need all columns, and say so in a warning unless they are told to keep them.
_ALL_COLUMNS = {"remove_unused_columns": False}
_ON_COMPLETIONS = {"completion_only_loss": True}

ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("dpo", "trl:DPOTrainer", "trl:DPOConfig", "preferences", references=_REFERENCE),
        Algorithm(
            "kto",
            "trl:KTOTrainer",
            "trl:KTOConfig",
            "labelled",
            references=_REFERENCE,
            # Its KL term pairs each prompt with the completion of its neighbour in the batch.
            fixed={"train_sampling_strategy": "sequential"},
            ranges={"per_device_train_batch_size": Annotated[int, Range(least=2)]},
        ),
        Algorithm(
            "orpo",
            "trl.experimental.orpo:ORPOTrainer",
            "trl.experimental.orpo:ORPOConfig",
            "preferences",
            defaults=_ALL_COLUMNS,
            adds_bos=True,
        ),
        Algorithm(
            "simpo",
            "trl.experimental.cpo:CPOTrainer",
            "trl.experimental.cpo:CPOConfig",
            "preferences",
            defaults=_ALL_COLUMNS,
            fixed={"loss_type": "simpo", "cpo_alpha": 0.0},
            ranges={"beta": Annotated[float, Range(above=0.0)]},  # the margin is `simpo_gamma` / `beta`
            adds_bos=True,
        ),
        Algorithm("grpo", "trl:GRPOTrainer", "trl:GRPOConfig", "prompts", "rewards", _REFERENCE, "beta"),
        Algorithm("rloo", "trl:RLOOTrainer", "trl:RLOOConfig", "prompts", "rewards", _REFERENCE, "beta"),
        Algorithm(
            "ppo",
            "subnet_ft.training.ppo:PPOTrainer",
            "subnet_ft.training.ppo:PPOConfig",
            "prompts",
            "rewards",
            _REFERENCE,
            "kl_coef",
            needs_one_process=True,
        ),
        Algorithm(
            "prime",
            "subnet_ft.training.prime:PRIMETrainer",
            "subnet_ft.training.prime:PRIMEConfig",
            "prompts",
            "rewards",
            _REFERENCE,
            needs_one_process=True,
        ),
        Algorithm(
            "distillation",
            "trl:DistillationTrainer",
            "trl:DistillationConfig",
            "prompts",
            "teacher",
            ranges={"beta": Annotated[float, Range(least=0.0, most=1.0)]},
        ),
        Algorithm("sft", "trl:SFTTrainer", "trl:SFTConfig", "demonstrations", defaults=_ON_COMPLETIONS),
        Algorithm("raft", "trl:SFTTrainer", "trl:SFTConfig", "samples", defaults=_ON_COMPLETIONS),
        Algorithm(
            "distilling_step_by_step",
            "subnet_ft.training.step_by_step:StepByStepTrainer",
            "subnet_ft.training.step_by_step:StepByStepConfig",
            "rationales",
            # The trainer needs the column that says which rows are rationales.
            fixed={**_ON_COMPLETIONS, **_ALL_COLUMNS},
        ),
        Algorithm("reward", "trl:RewardTrainer", "trl:RewardConfig", "preferences", model_kind="reward_model"),
    )
}


def learns_from(name: str) -> LearnsFrom | None:
    """Return what the algorithm `name` learns from; `None` for a name that is not in the table."""
    known = ALGORITHMS.get(name)
    return None if known is None else known.learns_from


def trains_reward_model(name: str) -> bool:
    """Whether the algorithm `name` trains a reward model."""
    known = ALGORITHMS.get(name)
    return known is not None and known.model_kind == "reward_model"


def load_object(path: str) -> Any:
    """Import what `module:name` names."""
    module, _, name = path.partition(":")
    with warnings.catch_warnings():
        # What changes in a later release, the tests of the table find.
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        return getattr(importlib.import_module(module), name)
