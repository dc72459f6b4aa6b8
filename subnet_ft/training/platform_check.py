"""What this machine lacks for a recipe, found before a weight is loaded: each lack a key and its reason."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.checkpoints.quantized import Quantization, import_bitsandbytes, why_not
from subnet_ft.errors import MissingDependencyError
from subnet_ft.recipe.algorithms import ALGORITHMS
from subnet_ft.recipe.methods import METHODS, trained_methods

if TYPE_CHECKING:
    from subnet_ft.recipe import Recipe

Problems = Iterator[tuple[str, str]]

_FLASH = re.compile(r"flash_attention_(\d)")
_GPU_ONLY = ("use_vllm", "use_liger_kernel")
"""Fields of `training` whose packages run on a GPU only."""
_COMPILES = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def platform_problems(recipe: Recipe, *, methods: Sequence[str] = (), quantizations: Sequence[str] = ()) -> Problems:
    """Yield what would stop this recipe on this machine after minutes of loading, or in the middle of training.

    Args:
        recipe: Its sections are checked one by one, so that a wrong field elsewhere hides nothing.
        methods: Methods that are trained; the recipe's own and its baselines when there are none.
        quantizations: Kinds of quantized copies that are judged.

    Yields:
        A dotted key, or an option of the command line, and the end of a sentence.
    """
    for name in trained_methods(recipe, methods):
        held = METHODS[name].quantization if name in METHODS else None
        if held is not None:
            key = "method" if name == recipe.method else f"methods.{name}"
            yield from _quantized(key, f"`{name}` holds the base in {held}", held)
    for kind in quantizations:
        if kind in ("int8", "nf4"):
            yield from _quantized("--quantized", f"no copy can be held in {kind}", kind)  # type: ignore[arg-type]
    yield from _reference(recipe, methods)
    yield from _optimizer(recipe)
    yield from _dtype("model.dtype", recipe.model.dtype)
    yield from _attention("model.attn_implementation", recipe.model.attn_implementation, recipe.model.dtype)
    if recipe.teacher is not None:
        yield from _dtype("teacher.dtype", recipe.teacher.dtype)
        yield from _attention("teacher.attn_implementation", recipe.teacher.attn_implementation, recipe.teacher.dtype)
    yield from _compilation(recipe.training)
    for name in _GPU_ONLY:
        if recipe.training.get(name) and not torch.cuda.is_available():
            yield f"training.{name}", "needs a GPU, and torch finds none here; remove it"


@functools.cache
def why_not_8bit_moments() -> str | None:
    """Say why this machine cannot keep moments in 8 bits, by one step on 4096 weights; `None` if it can."""
    try:
        bitsandbytes = import_bitsandbytes()
    except MissingDependencyError as error:
        return str(error).rstrip(".")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.nn.Parameter(torch.zeros(4096, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        bitsandbytes.optim.AdamW8bit([weight], lr=1.0, weight_decay=0.0).step()
    except Exception as error:  # whatever a platform raises that lacks the kernel
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"bitsandbytes {bitsandbytes.__version__} has no 8-bit AdamW on {device}: {reason}"
    # The first step of Adam has the length of the learning rate, whatever the gradient.
    if not torch.allclose(weight.detach(), torch.full_like(weight, -1.0), atol=0.01):
        return f"bitsandbytes {bitsandbytes.__version__} takes a wrong 8-bit step on {device}"
    return None


def _quantized(key: str, purpose: str, kind: Quantization) -> Problems:
    reason = why_not(kind)
    if reason is not None:
        yield key, f"{purpose}: {reason.rstrip('.')}"


def _reference(recipe: Recipe, methods: Sequence[str]) -> Problems:
    kind, is_free = recipe.reference.quantization, recipe.reference.source == "policy"
    known = ALGORITHMS.get(recipe.algorithm)
    if known is None or not (kind or is_free):
        return
    key = "reference.source" if is_free else "reference.quantization"
    reset = "set it to `model`" if is_free else "set it to null"
    if kind is not None:
        yield from _quantized("reference.quantization", f"the reference model cannot be held in {kind}", kind)
    for name in trained_methods(recipe, methods):
        if name in METHODS and METHODS[name].trains == "adapter":
            yield key, f"`{name}` has no reference model of its own: the base under its adapter is one; {reset}"
    weight = known.reference_weight
    if weight is not None:
        defaults = {field.name: field.default for field in dataclasses.fields(known.config_class)}
        if not recipe.training.get(weight, defaults[weight]):
            yield key, f"`{known.name}` holds no reference model while `training.{weight}` is 0; set one of the two"


def _optimizer(recipe: Recipe) -> Problems:
    if recipe.subnet.optimizer.name == "adamw_8bit":
        reason = why_not_8bit_moments()
        if reason is not None:
            yield "subnet.optimizer.name", f"`adamw_8bit` cannot run here: {reason}"


def _dtype(key: str, dtype: str) -> Problems:
    if dtype != "bfloat16" or not torch.cuda.is_available() or torch.version.hip:
        return
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        yield (
            key,
            f"`{torch.cuda.get_device_name()}` has no bfloat16 (compute capability {capability[0]}.{capability[1]}, "
            "needed is 8.0); use float32",
        )


def _attention(key: str, name: str | None, dtype: str) -> Problems:
    if name in (None, "eager", "sdpa"):
        return
    flash = _FLASH.fullmatch(name or "")
    if flash is not None or "/" in str(name):
        if not torch.cuda.is_available():
            yield key, f"`{name}` needs a GPU, and torch finds none here; use `sdpa` or `eager`"
        if dtype == "float32":
            yield key, f"`{name}` computes in bfloat16 or float16, and the dtype is float32; use `sdpa` or `eager`"
        if flash is not None and not _has_flash(int(flash[1])):
            yield key, f"`{name}` needs its package, which is not installed; `pip install flash-attn`, or use `sdpa`"
        if flash is None and not _has_kernels():
            yield key, f"`{name}` is a kernel of the Hub; `pip install kernels`, or use `sdpa`"
    elif name == "flex_attention":
        if not torch.cuda.is_available():
            yield key, "`flex_attention` has no backward pass on a CPU, and torch finds no GPU here; use `sdpa`"
    else:
        yield key, f"unknown, got {name!r}; choose `sdpa`, `eager`, `flash_attention_2` or `flex_attention`"


def _has_kernels() -> bool:
    from transformers.utils import import_utils

    return bool(import_utils.is_kernels_available())


def _has_flash(version: int) -> bool:
    from transformers import utils

    check: Any = getattr(utils, f"is_flash_attn_{version}_available", None)
    return check is not None and bool(check())


def _compilation(training: dict[str, Any]) -> Problems:
    # As in transformers: naming a backend or a mode switches compilation on.
    if not any(training.get(name) for name in _COMPILES):
        return
    try:
        torch._dynamo.eval_frame.check_if_dynamo_supported()
    except RuntimeError as error:
        yield "training.torch_compile", f"torch cannot compile here: {' '.join(str(error).split())}"
        return
    backend, mode = training.get("torch_compile_backend") or "inductor", training.get("torch_compile_mode")
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        yield "training.torch_compile_backend", f"unknown, got {backend!r}; torch has {', '.join(known)}"
        return
    if mode is not None:
        modes = [name for name in torch._inductor.list_mode_options() if name]
        if backend != "inductor":
            yield "training.torch_compile_mode", f"only for the backend `inductor`, not for `{backend}`; remove it"
        elif mode not in modes:
            yield "training.torch_compile_mode", f"unknown, got {mode!r}; torch has {', '.join(modes)}"
    if backend == "inductor":
        named = [name for name in _COMPILES if training.get(name)]
        yield from _inductor(f"training.{named[0]}")


def _inductor(key: str) -> Problems:
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        if not has_triton():
            yield key, "`inductor` compiles for a GPU with Triton, which does not run here; use `aot_eager`"
        return
    from torch._inductor import config

    named = config.cpp.cxx if isinstance(config.cpp.cxx, (tuple, list)) else (config.cpp.cxx,)
    compilers = [name for name in named if name]
    if not any(shutil.which(name) for name in compilers):
        yield (
            key,
            f"`inductor` needs a C++ compiler, and there is no {' or '.join(f'`{name}`' for name in compilers)}; "
            "install one (`CXX` names another), or set `torch_compile_backend` to `aot_eager`",
        )
