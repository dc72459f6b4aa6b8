"""What a folder holds that is no checkpoint for us, and the command that makes one of it; nothing here is opened."""

from __future__ import annotations

import shlex
from pathlib import Path

_UNTRUSTED = "It is never loaded here, because unpickling runs code. If you trust it"
_SIDE = "copy the base's config.json and tokenizer files beside it, and use that folder"


def pickled_parts(folder: Path) -> str | None:
    """Say which tool left its pickled parts of a model in a folder, and how to merge them; `None` for no known one."""
    found = _megatron(folder) or _distributed(folder) or _deepspeed(folder) or _verl(folder)
    return f"`{folder}` {found}" if found else None


def without_weights(folder: Path) -> str:
    """Say what a folder without `model.safetensors` and without an index of shards holds instead, and what to do."""
    parts = pickled_parts(folder)
    if parts:
        return parts
    names = sorted(entry.name for entry in folder.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth")) and name not in _TRAINER_STATE]
    gguf = [name for name in names if name.endswith(".gguf")]
    problem = f"`{folder}` has no `model.safetensors` and no `model.safetensors.index.json`"
    if gguf:
        return f"{problem}, only a GGUF. Name the file itself: `{folder / gguf[0]}`."
    if any(name.endswith(".safetensors") for name in names):
        return f"{problem}, only safetensors files of other names. Save the whole model with `save_pretrained`."
    if pickled:
        other = "" if pickled[0].startswith("pytorch_model.") else " (under the name `pytorch_model.bin`)"
        return (
            f"{problem}, only pickled weights (`{pickled[0]}`), which are never loaded here because unpickling runs "
            f"code. If you trust the file, load it with transformers{other} and save it with `save_pretrained`, which "
            "writes safetensors."
        )
    return f"{problem}; it holds {', '.join(names[:5]) or 'nothing'}. Name a folder written by `save_pretrained`."


_TRAINER_STATE = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")


def _distributed(folder: Path) -> str | None:
    """torch.distributed.checkpoint, which FSDP of accelerate and of a trainer uses for SHARDED_STATE_DICT."""
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = [place for place in places if (place / ".metadata").is_file() and any(place.glob("*.distcp"))]
    if not found:
        return None
    # An optimizer's state lies beside the weights in a folder of its own.
    place = next((place for place in found if not place.name.startswith("optim")), found[0])
    command = shlex.join(["accelerate", "merge-weights", str(place), _merged(folder)])
    inside = "" if place == folder else f" in `{place.name}`"
    return (
        f"holds the parts of an FSDP run, pickled by torch.distributed.checkpoint{inside}. {_UNTRUSTED}, merge its "
        f"weights: `{command}`, {_SIDE}. docs/many_gpus.md says how where that command fails, because an optimizer is "
        "among them."
    )


def _deepspeed(folder: Path) -> str | None:
    if (folder / "zero_to_fp32.py").is_file():
        top = folder
    elif any(folder.glob("*_model_states.pt")):  # the folder of one step, in which the script is not
        top = folder.parent
    else:
        return None
    command = shlex.join(["python", str(top / "zero_to_fp32.py"), str(top), _merged(top), "--safe_serialization"])
    return (
        f"holds the parts of a DeepSpeed run, pickled. {_UNTRUSTED}, merge them: `{command}`, {_SIDE}. That writes "
        "float32: to compare with a base in bfloat16, load it with `dtype=torch.bfloat16` and `save_pretrained` it "
        "again. With `stage3_gather_16bit_weights_on_model_save` the run itself would have saved a whole checkpoint."
    )


def _megatron(folder: Path) -> str | None:
    names = ("latest_checkpointed_iteration.txt", "mp_rank_*", "iter_[0-9]*", "common.pt")
    if not any(path for name in names for path in folder.glob(name)):
        return None
    return (
        "is a Megatron checkpoint: other names, other shapes, pickled. Export it with Megatron Bridge, "
        f'`AutoBridge.from_hf_pretrained(BASE).export_ckpt("{folder}", "{_merged(folder)}")`, or with the tool that '
        "trained it, and use the exported folder."
    )


def _verl(folder: Path) -> str | None:
    if not any(folder.glob("model_world_size_*_rank_*.pt")):
        return None
    merge = ["python", "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    command = shlex.join([*merge, "--local_dir", str(folder), "--target_dir", _merged(folder)])
    return f"holds the parts of a verl run, pickled. {_UNTRUSTED}, merge them: `{command}`, and use that folder."


def _merged(folder: Path) -> str:
    return f"{folder}-merged"
