"""What is wrong with a `training` section before anything is loaded: asks the TRL config itself, and this machine."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from subnet_ft.training.algorithms import ALGORITHMS, run_config


class _Package(NamedTuple):
    """Any of `modules` will do; `install` is what pip calls the usual one."""

    install: str
    modules: tuple[str, ...]


_SETTINGS = {
    "use_vllm": _Package("trl[vllm]", ("vllm",)),
    "use_liger_kernel": _Package("liger-kernel", ("liger_kernel",)),
}
_TRACKERS = {
    **{
        name: _Package(name, (name,))
        for name in ("clearml", "codecarbon", "dagshub", "dvclive", "mlflow", "neptune", "swanlab", "trackio", "wandb")
    },
    "azure_ml": _Package("azureml-sdk", ("azureml",)),
    "comet_ml": _Package("comet-ml", ("comet_ml",)),
    "flyte": _Package("flytekit", ("flytekit",)),
    "tensorboard": _Package("tensorboard", ("tensorboard", "tensorboardX")),
}


def config_problems(algorithm: str, training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what would stop a run with these settings, or keep it from resuming to the same bits.

    Args:
        algorithm: A name in `ALGORITHMS`.
        training: The recipe's section, its names and types already checked.

    Yields:
        A dotted key and the end of a sentence.
    """
    for name, package in _SETTINGS.items():
        if training.get(name) and not _is_installed(package):
            yield f"training.{name}", f"needs a package that is not installed; {_pip(package)}"
    known = ALGORITHMS[algorithm]
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = run_config(known, training, output_dir=folder, seed=0)
    except Exception as error:  # whatever its constructor raises, these values made it
        reason = " ".join(str(error).split()) or type(error).__name__
        yield "training", f"{known.config.rpartition(':')[2]} refuses these settings: {reason}"
        return
    yield from _report_to(config)
    yield from _save_steps(config)


def _report_to(config: Any) -> Iterator[tuple[str, str]]:
    from transformers import integrations as untyped

    integrations: Any = untyped
    try:
        integrations.get_reporting_integration_callbacks(config.report_to)
    except ValueError as error:
        yield "training.report_to", str(error)
    for name in config.report_to:
        package = _TRACKERS.get(name)
        if package is not None and not _is_installed(package):
            yield "training.report_to", f"`{name}` is not installed; {_pip(package)}"


def _save_steps(config: Any) -> Iterator[tuple[str, str]]:
    # Completions are not saved: between two generations there are none that a resumed run would have to sample again.
    if getattr(config, "steps_per_generation", None) is None or config.save_strategy != "steps":
        return
    accumulated = config.gradient_accumulation_steps
    generation = config.steps_per_generation * config.num_iterations
    step = generation // math.gcd(generation, accumulated)
    every = config.save_steps
    if every < 1 and config.max_steps > 0:
        every = math.ceil(config.max_steps * every)
    if step == 1 or every % step == 0 or 0 < config.max_steps <= every:
        return
    if every < 1:
        yield "training.save_steps", f"must be a number of steps, a multiple of {step}, got the fraction {every:g}"
        return
    nearest = max(step, round(every / step) * step)
    yield (
        "training.save_steps",
        f"a run resumes to the same bits only between two generations, so `save_steps` x `gradient_accumulation_steps` "
        f"({every} x {accumulated} = {every * accumulated}) must be a multiple of `steps_per_generation` x "
        f"`num_iterations` ({config.steps_per_generation} x {config.num_iterations} = {generation}); "
        f"the nearest `save_steps` is {nearest}",
    )


def _is_installed(package: _Package) -> bool:
    return any(importlib.util.find_spec(module) is not None for module in package.modules)


def _pip(package: _Package) -> str:
    return f"`pip install '{package.install}'`" if "[" in package.install else f"`pip install {package.install}`"
