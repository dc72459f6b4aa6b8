"""Models whose linear layers are held in 8 or 4 bits by bitsandbytes."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from subnet_ft.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Quantization = Literal["int8", "nf4"]
"""How the weights of linear layers are held: `int8`, LLM.int8 (arXiv 2208.07339); `nf4`, 4 bits with doubly quantized
scales (arXiv 2305.14314, section 3). Embeddings, the output embedding, norms, biases and stacked experts stay as they
are."""


def import_bitsandbytes() -> Any:
    """Import bitsandbytes without letting it ask the Hub for code, and keep what it says on every call to itself.

    On CPUs with AVX512-BF16 it loads a kernel from the Hub while it is imported, if the package `kernels` is there. The
    results of a run would depend on that download. A program that imports it earlier makes that choice itself.

    Raises:
        MissingDependencyError: It is not installed.
    """
    with _without_hub_kernels():
        try:
            import bitsandbytes
        except ImportError as error:
            raise MissingDependencyError("bitsandbytes", "to hold weights in 8 or 4 bits", "quantization") from error
    # LLM.int8 computes in float16 by definition, and says so for every layer of every forward pass.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_says_no_cast)
    return bitsandbytes


def keep_offline() -> None:
    """Import bitsandbytes as `import_bitsandbytes` does, if it is there, before another package imports it."""
    with contextlib.suppress(MissingDependencyError):
        import_bitsandbytes()


@functools.cache
def why_not(quantization: Quantization) -> str | None:
    """Say why this machine cannot run a quantized layer, by running one of 64 x 64; `None` if it can.

    Args:
        quantization: Which kind of layer.

    Returns:
        The reason as the end of a sentence.
    """
    import torch

    try:
        bitsandbytes = import_bitsandbytes()
    except MissingDependencyError as error:
        return str(error)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    linear: Any
    if quantization == "int8":
        linear = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    else:
        linear = bitsandbytes.nn.Linear4bit(
            64, 64, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
        )
    values = torch.ones(2, 64, dtype=torch.bfloat16, device=device)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            linear = linear.to(torch.bfloat16).to(device)
            _keep_one_layout(linear, bitsandbytes)
            result = linear(values)
    except Exception as error:  # whatever a platform raises that lacks the kernel
        return f"bitsandbytes {bitsandbytes.__version__} cannot run it on {device}: {_in_one_line(error)}"
    if not bool(result.isfinite().all()):
        return f"bitsandbytes {bitsandbytes.__version__} gives wrong numbers on {device}"
    return None


def config_of(quantization: Quantization, folder: Path) -> Any:
    """Return transformers' config with which to load the checkpoint in `folder`.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
        CheckpointError: It cannot run this kind on this machine, or the checkpoint is quantized already.
    """
    import torch
    from transformers import BitsAndBytesConfig

    import_bitsandbytes()
    reason = why_not(quantization)
    if reason is not None:
        raise CheckpointError(f"A model cannot be held in {quantization} here: {reason}.")
    _refuse_quantized(folder)
    config: Any = BitsAndBytesConfig
    if quantization == "int8":
        return config(load_in_8bit=True)
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def settle(model: PreTrainedModel, *, quantization: Quantization) -> None:
    """Check that a loaded model is quantized, and fix how its layers compute.

    Args:
        model: As transformers loaded it. In-out: its weights stay as they are.
        quantization: What was asked for.

    Raises:
        CheckpointError: None of its layers is quantized.
    """
    if not quantized_layers(model):
        raise CheckpointError(
            f"`{type(model).__name__}` has no linear layer beside its output embedding, so {quantization} would hold "
            "nothing in fewer bits. Load it without `quantization`."
        )
    _keep_one_layout(model, import_bitsandbytes())


def quantized_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the linear layers of a model that bitsandbytes holds in 8 or 4 bits, by name."""
    layers = import_bitsandbytes().nn
    kinds = (layers.Linear8bitLt, layers.Linear4bit)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def quantized_size(model: torch.nn.Module) -> int:
    """Return the bytes that the tensors of a model take on disk, scales of quantized layers included, tied ones once.

    A safetensors file adds a header with names and shapes, some kilobytes. For a model that is not quantized it is the
    size of its ordinary checkpoint.

    Args:
        model: In memory, on one device.
    """
    return _nbytes(model.state_dict())


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's weights in memory, scales of quantized layers included, tied ones once.

    Args:
        model: In memory, on one device.
    """
    buffers = {name for name, _ in model.named_buffers()}
    return _nbytes({name: tensor for name, tensor in model.state_dict().items() if name not in buffers})


def _nbytes(tensors: dict[str, torch.Tensor]) -> int:
    # A tensor that shares memory with another, such as a tied output embedding, is stored once.
    return sum({(tensor.data_ptr(), tensor.shape): tensor.nbytes for tensor in tensors.values()}.values())


def _refuse_quantized(folder: Path) -> None:
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError):
        return  # transformers says what is wrong with it
    if stored is not None:
        raise CheckpointError(
            f"`{folder}` is quantized already, by `{stored.get('quant_method')}`. Name a checkpoint of dense weights."
        )


def _keep_one_layout(model: torch.nn.Module, bitsandbytes: Any) -> None:
    """Compute with the very values that are stored, in training, in evaluation and after saving.

    On CPUs with AVX512-BF16 bitsandbytes repacks NF4 weights at the first forward pass in evaluation mode and rounds
    their scales to bfloat16. The model would differ from the one that is trained upon and from the one that is saved,
    and layers whose sizes are no multiples of 32 and 64 raise.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _says_no_cast(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in str(record.msg)


def _says_no_hub_kernel(record: logging.LogRecord) -> bool:
    return "kernels-community" not in str(record.msg)


@contextlib.contextmanager
def _without_hub_kernels() -> Iterator[None]:
    if "bitsandbytes" in sys.modules:
        yield
        return
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(_says_no_hub_kernel)
    modules: dict[str, Any] = sys.modules
    missing = object()
    kernels = modules.get("kernels", missing)
    modules["kernels"] = None  # importing it raises ImportError
    try:
        yield
    finally:
        logger.removeFilter(_says_no_hub_kernel)
        if kernels is missing:
            del modules["kernels"]
        else:
            modules["kernels"] = kernels


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
