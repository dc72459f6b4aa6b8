"""Which ways of spreading a trainer over processes can be served, and what to use instead of the others."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from packaging.version import Version
from torch.nn.parallel import DistributedDataParallel

from subnet_ft.errors import MaskMismatchError, TrainerError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim.processes import communication_device, num_processes
from subnet_ft.optim.shards import is_sharded

if TYPE_CHECKING:
    from transformers import Trainer

_EQUIVALENTS = {
    1: "DDP, under which restricted trainers exchange compact gradients; state for the mask alone is small already",
    2: "FSDP2 with `fsdp_reshard_after_forward: false`",
    3: "FSDP2 with `fsdp_reshard_after_forward: true`",
}
"""ZeRO stage to what does the same here; stage 0 is DDP."""


def check_processes(trainer: Trainer) -> None:
    """Refuse DeepSpeed, FSDP1 and what shards a model beside FSDP2, before anything is changed.

    Raises:
        TrainerError: The message says what to use instead.
    """
    if trainer.is_deepspeed_enabled:
        raise TrainerError(_deepspeed(trainer))
    accelerator: Any = trainer.accelerator
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") and not trainer.is_fsdp_enabled:
        raise TrainerError(
            f"The launcher asks for FSDP (ACCELERATE_USE_FSDP), and accelerate runs {accelerator.distributed_type} "
            "instead, as it does on CPUs: nothing would be sharded. Launch with DDP, or on GPUs."
        )
    if getattr(trainer, "is_fsdp_xla_enabled", False):
        raise TrainerError("FSDP on XLA flattens parameters, so no mask finds them. Train on GPUs with FSDP2.")
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer)
    parallelism = getattr(accelerator, "parallelism_config", None)
    for kind in ("tp", "cp", "sp"):
        if parallelism is not None and getattr(parallelism, f"{kind}_size", 1) > 1:
            raise TrainerError(
                f"`{kind}_size` is {getattr(parallelism, f'{kind}_size')}: a masked optimizer takes parameters that "
                "are replicated, or sharded by FSDP2 on their first dimension. Leave it at 1, with more FSDP2 ranks."
            )
    model: Any = trainer.model
    sharded = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    if sharded:
        raise TrainerError(
            f"`{sharded[0]}` is sharded before the trainer has started, by tensor or expert parallelism (`tp_plan`, "
            "`device_mesh`) or by hand. Load the whole model, and let the trainer shard it with FSDP2."
        )


def check_one_mask(mask: SubnetMask) -> None:
    """Compare the masks of all processes, which call it together; another one must not wait for them in vain.

    Raises:
        MaskMismatchError: They have different masks.
    """
    if num_processes() == 1:
        return
    device = communication_device()
    own = torch.tensor(list(bytes.fromhex(mask.fingerprint)), dtype=torch.uint8, device=device)
    found = [torch.empty_like(own) for _ in range(num_processes())]
    dist.all_gather(found, own)
    others = sorted({bytes(other.tolist()).hex()[:16] for other in found})
    if len(others) > 1:
        raise MaskMismatchError(
            f"The processes were given {len(others)} different masks: {', '.join(others)}. Load one file in all."
        )


def check_wrapped(trainer: Any) -> None:
    """Check at the first step that DDP leaves to a masked optimizer what it was told to leave, and nothing else.

    Raises:
        TrainerError: DDP wraps another module than the trainer's model, and reduces dense gradients as well; or it was
            wrapped for an earlier trainer, and reduces none.
    """
    wrapped = trainer.model_wrapped
    if not isinstance(wrapped, DistributedDataParallel):
        return
    trained = [name for name, p in wrapped.module.named_parameters() if p.requires_grad]
    reduced = [name for name in trained if name not in wrapped.parameters_to_ignore]
    if not trainer.masked_optimizer.compact_grads:
        if len(reduced) < len(trained):
            left = next(name for name in trained if name not in reduced)
            raise TrainerError(
                f"DDP leaves the gradient of `{left}` alone, as `prepare_ddp` told it, and this trainer needs dense "
                "ones from it. Build the trainer on a fresh model, or leave `compact_grads` on."
            )
        return
    if len(reduced) > 1:
        raise TrainerError(
            f"DDP reduces the dense gradients of {len(reduced)} tensors, `{reduced[0]}` among them, although the "
            "masked optimizer exchanges compact ones. Let the trainer wrap the model that it was restricted with, or "
            "pass `compact_grads=False`."
        )


def _check_fsdp(trainer: Trainer) -> None:
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise TrainerError(
            "FSDP1 flattens parameters, so no mask finds them. Use FSDP2: `fsdp_version: 2` in accelerate's config, or "
            "`fsdp_config={'version': 2}` in the trainer's arguments."
        )
    if trainer.args.save_only_model and "FULL" not in str(plugin.state_dict_type):
        raise TrainerError(
            "`save_only_model` with `state_dict_type: SHARDED_STATE_DICT` would save checkpoints without weights. "
            "Choose FULL_STATE_DICT, or save the optimizer, too."
        )
    if is_peft_model(trainer.model):
        raise TrainerError(
            "Adapters of PEFT under FSDP2 are not saved as adapters here. Their state is small: train them under DDP."
        )
    if plugin.cpu_offload and Version(torch.__version__.partition("+")[0]) < Version("2.13"):
        raise TrainerError(
            f"CPU offload under FSDP2 is tested with torch 2.13 and later; older ones may hand gradients to the "
            f"optimizer before they have arrived from the GPU. This is torch {torch.__version__}: update it, or leave "
            "`fsdp_offload_params` off."
        )
    model: Any = trainer.model
    optimizer_cls = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)[0]
    if getattr(optimizer_cls, "__module__", "").partition(".")[0] == "bitsandbytes":
        raise TrainerError(
            f"`{optimizer_cls.__name__}` keeps a scale per block of values, and parts of parameters have other blocks: "
            "what it saves under FSDP2 could not be loaded again. Use `adamw_torch`; its state is sharded."
        )
    policy = plugin.mixed_precision_policy
    wanted = trainer.accelerator.mixed_precision
    if wanted != "no" or policy is not None:
        raise TrainerError(
            f"Mixed precision ({wanted}) makes accelerate keep trainable parameters in float32 under FSDP2, so that a "
            "run in bfloat16 becomes one in float32, of another mask. Load the model in bfloat16 and switch mixed "
            "precision off: `bf16=False` in the trainer's arguments, `mixed_precision: 'no'` in accelerate's config."
        )


def _deepspeed(trainer: Trainer) -> str:
    plugin: Any = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    stage = getattr(plugin, "zero_stage", None)
    instead = _EQUIVALENTS.get(stage, "DDP or FSDP2") if isinstance(stage, int) else "DDP or FSDP2"
    return (
        f"DeepSpeed (ZeRO stage {'unknown' if stage is None else stage}) joins parameters into flat partitions of its "
        "own and steps those, so neither the mask of a tensor nor its frozen weights can be kept to. Use "
        f"{instead}: see recipes/accelerate/."
    )
