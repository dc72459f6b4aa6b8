"""The table of methods: which weights each trains, and the config whose fields a recipe may set for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from subnet_ft.recipe.algorithms import load_object

if TYPE_CHECKING:
    from subnet_ft.recipe.schema import Recipe

Trains = Literal["mask", "adapter"]
"""What a method trains: `mask`, a part of the model's own weights; `adapter`, weights added to a frozen one."""


@dataclass(frozen=True)
class Method:
    """One method, by the names of what builds it; nothing is imported before it is needed.

    Args:
        name: The recipe's `method`, and the name of its stage.
        trains: Whether it trains the model's own weights or added ones.
        config: `module:class` of its config, whose fields are `methods.NAME.config`; `None` where there is none.
        defaults: Config fields with another default than the config's own; a recipe may change them.
        fixed: Config fields without which it would be another method; a recipe may only repeat them.
        training: Fields of `training` without which it does not train, whatever the recipe says.
        refuses: Algorithms that it cannot train with, each with the reason as the end of a sentence.
        is_quantized: The frozen model is held in 4 bits (NF4, arXiv 2305.14314).
        source: Where the method comes from.
    """

    name: str
    trains: Trains
    config: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)
    is_quantized: bool = False
    source: str = ""

    @property
    def quantization(self) -> Literal["nf4"] | None:
        """How the frozen model is held, if not as it is stored."""
        return "nf4" if self.is_quantized else None

    @property
    def config_class(self) -> Any:
        """The config dataclass, or `None`."""
        return None if self.config is None else load_object(self.config)


# Every linear layer but the output embedding, as in QLoRA; PEFT's own default is the query and value projections.
_ALL_LINEAR = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
_TRAINS_A_COPY = "it trains a second model that starts as the base, and the base is in 4 bits; choose `lora`"
_WITHOUT_PROMPTS = {
    "distillation": "its trainer asks the model below the learned prompt, which would never be seen; choose `lora`"
}
_LONGER = "its trainer compares logits with labels one by one, and a learned prompt makes more logits; choose `lora`"
_PADDED = "behind a learned prompt the reward would be read at the padding of a batch; choose `lora`"
_WITHOUT_CACHE = "a learned prefix is a cache, and transformers' classifiers take none; choose `lora`"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("full", "mask"),
        Method("subnet", "mask", source="arXiv 2505.11711"),
        Method("last_layers", "mask", "subnet_ft.methods.masks:LastLayersConfig"),
        Method("bitfit", "mask", "subnet_ft.methods.masks:BitFitConfig", source="arXiv 2106.10199"),
        Method("lora", "adapter", "peft:LoraConfig", _ALL_LINEAR, source="arXiv 2106.09685"),
        Method(
            "dora",
            "adapter",
            "peft:LoraConfig",
            _ALL_LINEAR,
            {"use_dora": True},
            source="arXiv 2402.09353",
        ),
        Method(
            "eva",
            "adapter",
            "peft:LoraConfig",
            # Its rows look where inputs are large: steps that suit random rows would throw the model off.
            {**_ALL_LINEAR, "lora_alpha": 1},
            {"init_lora_weights": "eva"},
            source="arXiv 2410.07170",
        ),
        Method(
            "qlora",
            "adapter",
            "peft:LoraConfig",
            _ALL_LINEAR,
            refuses=dict.fromkeys(("ppo", "prime"), _TRAINS_A_COPY),
            is_quantized=True,
            source="arXiv 2305.14314",
        ),
        Method("ia3", "adapter", "peft:IA3Config", source="arXiv 2205.05638"),
        Method(
            "shira",
            "adapter",
            "peft:ShiraConfig",
            {"r": 16, "target_modules": "all-linear"},
            source="arXiv 2406.13175",
        ),
        Method(
            "prompt_tuning",
            "adapter",
            "peft:PromptTuningConfig",
            {"num_virtual_tokens": 16},
            refuses={**_WITHOUT_PROMPTS, **dict.fromkeys(("orpo", "simpo"), _LONGER), "reward": _PADDED},
            source="arXiv 2104.08691",
        ),
        Method(
            "prefix_tuning",
            "adapter",
            "peft:PrefixTuningConfig",
            {"num_virtual_tokens": 16},
            # Its prefix is a cache, and layers that are computed again have none.
            training={"activation_checkpointing": False},
            refuses={**_WITHOUT_PROMPTS, "reward": _WITHOUT_CACHE},
            source="arXiv 2101.00190",
        ),
        Method(
            "adapters",
            "adapter",
            "subnet_ft.methods.bottleneck:BottleneckConfig",
            source="arXiv 1902.00751",
        ),
        Method(
            "adaption_prompt",
            "adapter",
            "peft:AdaptionPromptConfig",
            {"adapter_len": 16, "adapter_layers": 2},
            refuses={"reward": "PEFT trains no head beside it, and a reward model's is new; choose `lora`"},
            source="arXiv 2303.16199",
        ),
    )
}


HYPER_PARAMETERS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm",
)  # fmt: skip
"""What `methods.NAME.training` may set: how a method is optimized. Data, batches and steps are those of the recipe."""


def training_of(recipe: Recipe, name: str) -> dict[str, Any]:
    """Return the `training` section that a method is trained with: the recipe's, with the method's own values."""
    own = recipe.methods[name].training if name in recipe.methods else {}
    return {**recipe.training, **own, **METHODS[name].training}


def trained_methods(recipe: Recipe, named: Sequence[str] = ()) -> list[str]:
    """Return what a command trains: the methods that it names, else the recipe's own and its baselines.

    `subnet-ft train` trains the first of the latter only, and `subnet-ft run` the others; a recipe serves both.
    """
    return list(dict.fromkeys(named or [recipe.method, *recipe.baselines]))
