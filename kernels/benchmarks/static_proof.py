"""Compile the Triton kernels for GPUs that are not here, and report what the compilers made of them.

For every variant and target: registers, spills (instructions that move a register to local memory or back), stack and
shared memory in bytes, instructions, and how many loads and stores of global memory have which width, in bits. It also
checks that no multiplication is fused with an addition, and that a program's number is used in 64 bits only.

Usage: python kernels/benchmarks/static_proof.py [--json | --write FOLDER]
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "gfx942")
_CUDA_WIDTH = re.compile(r"\.(?:[US])?(8|16|64|128)\b")
_HIP_WIDTHS = {
    "ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32, "dwordx2": 64,
    "dwordx3": 96, "dwordx4": 128,
}  # fmt: skip


def main() -> int:
    """Print the report, or write it as static.json and static.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write static.json and static.md there")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it.", file=sys.stderr)
        return 2
    report = compile_all()
    if options.write:
        (options.write / "static.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (options.write / "static.md").write_text(as_markdown(report), encoding="utf-8")
    print(json.dumps(report) if options.json else as_markdown(report))
    return 0


def compile_all() -> dict[str, Any]:
    """Return the report: the version of Triton, and a row per variant and target."""
    import triton
    from variants import variants

    rows = [
        {"kernel": variant.name, "target": target, **_compile(variant, target)}
        for variant in variants()
        for target in TARGETS
    ]
    return {"triton": triton.__version__, "rows": rows}


def _compile(variant: Any, target: str) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from subnet_kernels.gpu.launch import OPTIONS, num_warps

    is_cuda = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if is_cuda else GPUTarget("hip", target, 64)
    signature = {**variant.signature, **dict.fromkeys(variant.constants, "constexpr")}
    # Tensors that torch allocates begin at multiples of 16, and a launch says so where the kernel lets it.
    aligned = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in variant.kernel.params
        if signature[parameter.name][0] == "*" and not parameter.do_not_specialize
    }
    source = ASTSource(variant.kernel, signature, variant.constants, aligned)
    warps = num_warps(variant.is_slotwise, gpu.warp_size)
    compiled = triton.compile(source, target=gpu, options={"num_warps": warps, **OPTIONS})
    facts = _from_cubin(compiled.asm["cubin"]) if is_cuda else _from_amdgcn(compiled.asm["amdgcn"])
    return {
        "warps": warps,
        **facts,
        "shared": compiled.metadata.shared,
        "is_fused": _is_fused(compiled),
        "is_64_bit": _is_64_bit(compiled.asm["ttir"]),
    }


def _from_cubin(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    mnemonics = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass)
    return {
        "registers": found["REG"],
        "spills": sum(mnemonic.startswith(("LDL", "STL")) for mnemonic in mnemonics) + found["LOCAL"],
        "stack": found["STACK"],
        "instructions": len(mnemonics) - mnemonics.count("NOP"),
        "loads": _widths(_cuda_width(m) for m in mnemonics if m.startswith("LDG.")),
        "stores": _widths(_cuda_width(m) for m in mnemonics if m.startswith("STG.")),
    }


def _from_amdgcn(assembly: str) -> dict[str, Any]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, name
        return int(found.group(1))

    code = assembly.partition(".amdgpu_metadata")[0]
    accesses = re.findall(r"^\s+(?:global|buffer|flat)_(load|store)_(\w+)", code, re.MULTILINE)
    by_action = {
        action: _widths(_HIP_WIDTHS[re.sub("_d16(_hi)?$", "", kind)] for which, kind in accesses if which == action)
        for action in ("load", "store")
    }
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count")
        + number("sgpr_spill_count")
        + len(re.findall(r"^\s+scratch_", code, re.M)),
        "stack": number("private_segment_fixed_size"),
        "instructions": len(re.findall(r"^\s+[vs]_\w+|^\s+(?:ds|global|buffer|flat)_\w+", code, re.MULTILINE)),
        "loads": by_action["load"],
        "stores": by_action["store"],
    }


def _cuda_width(mnemonic: str) -> int:
    width = _CUDA_WIDTH.search(mnemonic)
    return int(width.group(1)) if width else 32


def _widths(widths: Any) -> dict[str, int]:
    """Count how often each width occurs; the keys are strings, as JSON has them."""
    return {str(width): count for width, count in sorted(collections.Counter(widths).items())}


def _is_fused(compiled: Any) -> bool:
    """Tell whether a multiplication and an addition may round once: by option, or in what the backend was given."""
    fusions = re.search(r"llvm\.(fma|fmuladd)\.| contract | fast ", compiled.asm["llir"])
    return bool(compiled.metadata.enable_fp_fusion or fusions)


def _is_64_bit(ttir: str) -> bool:
    """Tell whether the program's number is widened before any other use, and no 64-bit number is narrowed again.

    Random bits of the stochastic rounding are the exception: they are 16 bits by then.
    """
    program = re.search(r"(%\w+) = tt\.get_program_id x : i32", ttir)
    assert program is not None
    uses = re.findall(rf"= (\S+) [^\n]*{re.escape(program.group(1))}(?!\w)", ttir.partition("tt.get_program_id")[2])
    narrowed = re.findall(r"arith\.trunci [^\n]*: i64 to i32", ttir)  # scalars: tiles, slots, offsets
    return uses == ["arith.extsi"] and not narrowed


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def as_markdown(report: dict[str, Any]) -> str:
    """Return the report as a table: a row per kernel, three targets beside each other."""
    rows: dict[str, dict[str, Any]] = {}
    for row in report["rows"]:
        rows.setdefault(row["kernel"], {})[row["target"]] = row
    head = "| kernel | registers " + " / ".join(TARGETS) + " | spills | shared bytes, sm_90 | instructions, sm_90 | "
    lines = [
        f"Compiled by Triton {report['triton']}; nothing here was measured on a GPU. Widths are bits × how often.",
        "",
        head + "loads, sm_90 | stores, sm_90 | loads, gfx942 | stores, gfx942 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kernel, by_target in rows.items():
        hopper, amd = by_target["sm_90"], by_target["gfx942"]
        cells = [
            kernel,
            " / ".join(str(by_target[target]["registers"]) for target in TARGETS),
            str(sum(by_target[target]["spills"] for target in TARGETS)),
            str(hopper["shared"]),
            str(hopper["instructions"]),
            *(_as_text(row[action]) for row in (hopper, amd) for action in ("loads", "stores")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _as_text(widths: dict[str, int]) -> str:
    return ", ".join(f"{width} × {count}" for width, count in widths.items())


if __name__ == "__main__":
    sys.exit(main())
