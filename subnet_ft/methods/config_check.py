"""What is wrong with a recipe's methods before anything is loaded: names, fields, values, and what fits together."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any

from subnet_ft.methods.adapters import adapter_config
from subnet_ft.recipe import Recipe
from subnet_ft.recipe.algorithms import trains_reward_model
from subnet_ft.recipe.methods import HYPER_PARAMETERS, METHODS, Method, trained_methods
from subnet_ft.recipe.parsing import Parser, did_you_mean, show
from subnet_ft.recipe.ranges import Count, Range
from subnet_ft.recipe.schema import MethodSpec
from subnet_ft.recipe.training import check_training

Problems: typing.TypeAlias = Iterator[tuple[str, str]]

_SHARE = Annotated[float, Range(least=0.0, below=1.0)]
_RANGES: dict[str, Any] = {
    "r": Count,
    "lora_alpha": Annotated[float, Range(above=0.0)],
    "lora_dropout": _SHARE,
    "num_virtual_tokens": Count,
    "encoder_hidden_size": Count,
    "adapter_len": Count,
    "adapter_layers": Count,
}
"""Narrower than PEFT's own annotations."""

_STARTS = (True, False, "gaussian", "orthogonal")
"""What `init_lora_weights` may be: the rest changes the base's weights, or looks at data as `eva` does."""

_FOLLOWS = {"ppo": "value_trains", "prime": "prm_trains"}
"""The field of `training` by which a second model may train what the policy trains of itself."""

_ITSELF = "it is set by the method itself; remove it"
_OWN_WEIGHTS = "it trains or changes weights of the base, which is frozen and the reference here; remove it"
_OTHER_MODEL = "it makes another model than the base with this method's weights; remove it"
_REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode", "runtime_config"), _ITSELF
    ),
    **dict.fromkeys(("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"), _ITSELF),
    "base_model_name_or_path": "the base is `model.name`; remove it",
    "revision": "the base is `model.name` at `model.revision`; remove it",
    "tokenizer_name_or_path": "the tokenizer is the base's; remove it",
    "tokenizer_kwargs": "the tokenizer is the base's; remove it",
    "bias": f"{_OWN_WEIGHTS}, or compare with `bitfit`",
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "ensure_weight_tying"), _OWN_WEIGHTS),
    **dict.fromkeys(("loftq_config", "corda_config", "lora_ga_config", "kasa_config"), _OWN_WEIGHTS),
    **dict.fromkeys(("megatron_config", "megatron_core", "layer_replication", "alora_invocation_tokens"), _OTHER_MODEL),
    **dict.fromkeys(("use_bdlora", "arrow_config", "velora_config", "monteclora_config"), _OTHER_MODEL),
    **dict.fromkeys(("use_qalora", "qalora_group_size"), _OTHER_MODEL),
}
"""Fields of PEFT's configs that a recipe cannot set, and why."""


def method_problems(
    recipe: Recipe, training_fields: Mapping[str, Any] | None, *, compared: Sequence[str] = ()
) -> Problems:
    """Yield what is wrong with `method` and `methods`.

    Args:
        recipe: Its `method` and `methods` sections have been parsed.
        training_fields: The fields of the algorithm's config with their types, or `None` when they are not known.
        compared: Methods that are trained; the recipe's own and its baselines when there are none.

    Yields:
        A dotted key and the end of a sentence.
    """
    if recipe.method not in METHODS:
        yield "method", f"unknown, got {show(recipe.method)}{did_you_mean(recipe.method, METHODS)}"
    for name in trained_methods(recipe, compared):
        if name in METHODS:
            key = "method" if name == recipe.method else f"methods.{name}"
            yield from ((key, reason) for reason in _with_algorithm(METHODS[name], recipe))
    for name, spec in recipe.methods.items():
        if name not in METHODS:
            yield f"methods.{name}", f"unknown method{did_you_mean(name, METHODS)}"
            continue
        if name in ("full", "subnet"):
            # What a subnetwork recovers is judged under the settings of the full run, and controls have them, too.
            yield f"methods.{name}", "full run, subnetwork and controls share one setting; set `training` itself"
            continue
        # A section that is no map was reported when it was read.
        if spec is not None and spec.training is not None:
            yield from _training(name, spec, recipe.algorithm, training_fields)
        if spec is not None and spec.config is not None:
            yield from _config(METHODS[name], spec)


def _with_algorithm(method: Method, recipe: Recipe) -> Iterator[str]:
    if recipe.algorithm in method.refuses:
        yield f"`{method.name}` cannot train with `{recipe.algorithm}`: {method.refuses[recipe.algorithm]}"
    spec = (recipe.methods or {}).get(method.name)
    with_head = spec is not None and (spec.config or {}).get("final_norm_and_head") is True
    if method.name == "last_layers" and trains_reward_model(recipe.algorithm) and not with_head:
        yield (
            f"`last_layers` leaves the new head of a reward model as it was drawn, and `{recipe.algorithm}` must train "
            "it; set `methods.last_layers.config.final_norm_and_head: true`"
        )
    follows = _FOLLOWS.get(recipe.algorithm)
    # A section that is no map was reported when it was read.
    if method.trains == "adapter" and follows is not None and (recipe.training or {}).get(follows) == "subnet":
        yield (
            f"`{method.name}` trains an adapter, so there is no mask of the policy to give a second model, as "
            f"`training.{follows}: subnet` asks; set it to `full`"
        )
    if method.trains == "adapter" and (recipe.training or {}).get("precompute_ref_log_probs"):
        yield (
            f"`{method.name}` trains an adapter, whose reference is the base, and with "
            "`training.precompute_ref_log_probs` TRL asks the model with its adapter instead; remove that, as the base "
            "under the adapter is no model more to hold"
        )


def _training(name: str, spec: MethodSpec, algorithm: str, training_fields: Mapping[str, Any] | None) -> Problems:
    prefix = f"methods.{name}."
    known = {key: value for key, value in spec.training.items() if key in HYPER_PARAMETERS}
    for key in spec.training:
        if key not in known:
            reason = "not a setting of one method; data, batches and steps are those of the recipe"
            hint = "" if training_fields is not None and key in training_fields else did_you_mean(key, HYPER_PARAMETERS)
            yield f"{prefix}training.{key}", f"{reason}{hint}"
    parser = Parser()
    check_training(parser, known, algorithm, training_fields)
    yield from ((prefix + key, reason) for key, reason in _reported(parser))


def _config(method: Method, spec: MethodSpec) -> Problems:
    prefix = f"methods.{method.name}.config"
    hints = typing.get_type_hints(method.config_class, include_extras=True)
    names = [field.name for field in fields(method.config_class) if field.init]
    refused = _REFUSED if method.trains == "adapter" else {}
    parser = Parser()
    for name, value in spec.config.items():
        key = f"{prefix}.{name}"
        if name in method.fixed:
            if value != method.fixed[name]:
                fixed = f"{show(method.fixed[name])} makes it `{method.name}`; remove it, or choose another method"
                parser.report(key, f"not allowed here, got {show(value)}: {fixed}")
        elif name in names and name in refused:
            parser.report(key, f"not allowed here, got {show(value)}: {_REFUSED[name]}")
        elif name not in names:
            hint = did_you_mean(name, [known for known in names if known not in refused])
            parser.report(key, f"unknown key{hint or f'; `{method.config_class.__name__}` has no such field'}")
        elif name == "init_lora_weights" and value not in _STARTS:
            parser.report(
                key,
                f"must be true, false, gaussian or orthogonal, got {show(value)}; other starts change the base's "
                "weights, or look at data, as `method: eva` does",
            )
        else:
            _value(parser, key, value, _RANGES.get(name, hints[name]))
    yield from _reported(parser)
    if not parser.problems:
        yield from _own_refusal(method, spec, prefix)


def _value(parser: Parser, key: str, value: Any, expected: Any) -> None:
    try:
        parser.check(key, value, expected)
    except ValueError as error:  # of a config inside the config, which is built to be checked
        parser.report(key, f"refused: {' '.join(str(error).split())}")


def _own_refusal(method: Method, spec: MethodSpec, prefix: str) -> Problems:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if method.trains == "adapter":
                adapter_config(method, spec.config, base="the base")
            else:
                method.config_class(**spec.config)
    except Exception as error:  # whatever its constructor raises, these values made it
        reason = " ".join(str(error).split()) or type(error).__name__
        yield prefix, f"{method.config_class.__name__} refuses these settings: {reason}"


def _reported(parser: Parser) -> Problems:
    for problem in parser.problems:
        key, _, reason = problem.partition(": ")
        yield key, reason
