"""The `task` section of a recipe: data, prompts, how answers are judged, and what is made by sampling beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from subnet_ft.recipe.ranges import Count, CountOrZero, Range


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A dataset on the Hub or on disk, loaded with `datasets`."""

    path: str
    """Hub id, local folder, or a `.jsonl`, `.json`, `.csv` or `.parquet` file."""

    name: str | None = None
    """The dataset's configuration, such as `main` of `openai/gsm8k`."""

    train_split: str = "train"
    """Split that training examples come from."""

    eval_split: str = "test"
    """Split that held-out examples come from; may equal `train_split`, the two sets are kept apart."""


@dataclass(frozen=True, kw_only=True)
class PairsSpec:
    """Completions sampled from the base model, scored, and kept: recipes with the same settings share them.

    An algorithm that learns from preferences gets a right completion against a wrong one of each prompt, one that
    learns from labelled completions gets them all, and one that copies samples gets the right ones.
    """

    num_prompts: Count
    """Training prompts to sample for; those with only right or only wrong completions give no pair."""

    num_samples: Annotated[int, Range(least=2)] = 8
    """Completions per prompt."""

    temperature: Annotated[float, Range(above=0.0)] = 0.8
    """Sampling temperature."""

    max_new_tokens: Count = 256
    """Longest completion, in tokens."""

    batch_size: Count = 64
    """Completions generated at a time; changes speed, memory and the random draws."""

    max_right: Count | None = None
    """Different right completions of a prompt that `raft` copies, at most, in the order sampled; `None`: one."""


@dataclass(frozen=True, kw_only=True)
class RationalesSpec:
    """Rationales and answers that the recipe's `teacher` writes, once: recipes with the same settings share them.

    `distilling_step_by_step` learns two things of each: the answer after `label_prefix` and the prompt, the rationale
    after `rationale_prefix` and the prompt.
    """

    prompt: str
    """What the teacher is given: a format template over the same fields as `task.prompt`, which makes it reason."""

    num_prompts: Count
    """Training prompts that the teacher explains."""

    chat: bool = False
    """Wrap the teacher's prompt as one user message and render it with the teacher's chat template."""

    max_new_tokens: Count = 256
    """Longest text of the teacher, in tokens."""

    temperature: Annotated[float, Range(least=0.0)] = 0.0
    """0 takes the teacher's likeliest text, above 0 samples one."""

    batch_size: Count = 64
    """Texts written at a time; when they are sampled it changes the draws."""

    answer_pattern: str | None = None
    """Regular expression with one group that finds the answer in the teacher's text; `None`: `task.answer_pattern`."""

    rationale_pattern: str | None = None
    """Regular expression with one group that finds the rationale; `None`: what stands before the answer's match."""

    keep: Literal["right", "all"] = "right"
    """Learn from the texts whose answer is right by the task's verifier, or, as the paper does, from all that give one.
    The label is the teacher's answer in both cases."""

    completion: str | None = None
    """Format template of the rationale as it is learned, over the example's fields and `{rationale}`: `' {rationale}'`
    after a prompt that ends without a space. `None`: the rationale itself."""

    label_prefix: str = "[label] "
    """Put before every prompt where the answer is asked for: in training, and before the held-out prompts."""

    rationale_prefix: str = "[rationale] "
    """Put before a training prompt where the rationale is asked for."""


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """Prompts and how an answer to them is judged."""

    name: str
    """`reasoning_gym/DATASET`, such as `reasoning_gym/chain_sum`, or `dataset` for what `dataset` names."""

    params: dict[str, Any] = field(default_factory=dict)
    """reasoning-gym's own fields of that dataset's config, verbatim; empty for `dataset`."""

    dataset: DatasetSpec | None = None
    """The data of a `dataset` task: prompts with answers or completions, preferences (columns prompt, chosen,
    rejected), or labelled completions (columns prompt, completion, label)."""

    num_train: CountOrZero = 0
    """Training examples; required, except in `evaluation.task`."""

    num_eval: CountOrZero = 0
    """Held-out examples; required of the task that evaluation uses."""

    prompt: str | None = None
    """Format template over an example's fields: `{question}`, `{answer}` and metadata of a reasoning-gym example, or
    the columns of a dataset. `None`: the example's own question, or the column `prompt`."""

    chat: bool = False
    """Wrap the prompt as one user message and render it with the model's chat template."""

    system_prompt: str | None = None
    """System message before the user message; needs `chat: true`."""

    answer: str | None = None
    """Format template of the reference answer over a dataset's columns; `None`: the column `answer`, else
    `completion`."""

    answer_pattern: str | None = None
    """Regular expression with one group that finds the answer in a completion, and in a dataset's reference answer;
    `None`: the whole text without surrounding white space."""

    rewards: list[str] = field(default_factory=lambda: ["correct"])
    """Rewards that are added up: `correct` (1 for a fully right answer, else 0), `score` (the verifier's own score in
    [0, 1]) or `package.module:function` with TRL's reward-function signature."""

    completion: str | None = None
    """Format template of what `sft` learns to write after a prompt, over the same fields as `prompt`: `' {answer}'`
    after a prompt that ends without a space. `None`: a dataset's column `completion`, else the reference answer. Under
    `distilling_step_by_step`, `{answer}` is the teacher's answer, and `None` is that answer."""

    pairs: PairsSpec | None = None
    """Sample completions from the base model, for an algorithm that learns from pairs, labels or samples."""

    rationales: RationalesSpec | None = None
    """Let the teacher explain its answers, for an algorithm that learns from rationales."""
