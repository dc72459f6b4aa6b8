"""What the compilers make of the Triton kernels, against the committed table; it needs no GPU."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "kernels" / "benchmarks" / "static_proof.py"
RESULTS = ROOT / "kernels" / "benchmarks" / "results"
AGAIN = "If the change is meant, write the table again: python kernels/benchmarks/static_proof.py --write " + str(
    RESULTS.relative_to(ROOT)
)
EXPECTED: dict[str, Any] = json.loads((RESULTS / "static.json").read_text(encoding="utf-8"))

OLDEST = (3, 7)
"""The first Triton for which the proof holds."""

Rows = dict[tuple[str, str], dict[str, Any]]


def run(folder: Path, *, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT / "kernels")}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--json"], env=environment, capture_output=True, text=True, timeout=600
    )


def by_name(report: dict[str, Any]) -> Rows:
    return {(row["kernel"], row["target"]): row for row in report["rows"]}


@pytest.fixture
def expected() -> Rows:
    """The committed table, which holds for one version of Triton and the compilers that it brings."""
    installed = importlib.metadata.version("triton")
    if installed != EXPECTED["triton"]:
        pytest.skip(f"the table was made by triton {EXPECTED['triton']}, here is {installed}")
    return by_name(EXPECTED)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    pytest.importorskip("triton", reason="needs triton, which exists for Linux only")
    installed = importlib.metadata.version("triton")
    if tuple(map(int, installed.split(".")[:2])) < OLDEST:
        pytest.skip(f"triton {installed} fuses operations of AMD kernels, or cannot compile them without ROCm")
    done = run(tmp_path_factory.mktemp("triton"), interpret=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return by_name(json.loads(done.stdout))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("static_proof", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_static_proof_covers_the_table(compiled: Rows) -> None:
    assert set(compiled) == set(by_name(EXPECTED))


def test_kernels_spill_no_register_and_fuse_no_operations(compiled: Rows) -> None:
    for name, row in compiled.items():
        assert row["spills"] == 0, name
        assert not row["is_fused"], name


def test_kernels_compute_offsets_in_64_bits(compiled: Rows) -> None:
    assert [name for name, row in compiled.items() if not row["is_64_bit"]] == []


def test_kernels_access_memory_as_wide_as_in_the_table(compiled: Rows, expected: Rows) -> None:
    for name, row in expected.items():
        assert {action: compiled[name][action] for action in ("loads", "stores")} == {
            action: row[action] for action in ("loads", "stores")
        }, f"{name}. {AGAIN}"


def test_kernels_take_no_more_registers_than_in_the_table(compiled: Rows, expected: Rows) -> None:
    for name, row in expected.items():
        for count in ("registers", "shared", "stack"):
            assert compiled[name][count] <= row[count], f"{name}: {count}. {AGAIN}"


def test_a_full_mask_moves_weights_in_vectors_of_16_bytes(compiled: Rows, expected: Rows) -> None:
    for (kernel, target), row in compiled.items():
        if kernel.startswith("step_full"):
            assert row["loads"]["128"] >= 4, (kernel, target)
            assert set(row["stores"]) == {"128"}, (kernel, target)


def test_a_sparse_mask_needs_no_shared_memory(compiled: Rows) -> None:
    """Every slot finds its element inside its warp."""
    assert [name for name, row in compiled.items() if "slots" in name[0] and row["shared"]] == []


def test_every_kernel_with_a_grid_is_proven() -> None:
    launched = set()
    for path in (ROOT / "kernels" / "subnet_kernels" / "gpu").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "tl.program_id" in ast.unparse(node):
                launched.add(node.name)
    assert launched == {row["kernel"].split()[0] for row in EXPECTED["rows"]}
    assert len(launched) == 8


def test_markdown_table_is_that_of_the_report(script: ModuleType) -> None:
    assert (RESULTS / "static.md").read_text(encoding="utf-8") == script.as_markdown(EXPECTED)


def test_static_proof_notices_narrow_offsets(script: ModuleType) -> None:
    start = "%0 = tt.get_program_id x : i32 loc(#a)\n"
    wide = start + "%1 = arith.extsi %0 : i32 to i64 loc(#b)\n"
    assert script._is_64_bit(wide)
    assert not script._is_64_bit(start + "%1 = arith.muli %0, %c1024_i32 : i32 loc(#b)\n")
    assert not script._is_64_bit(wide + "%2 = arith.trunci %1 : i64 to i32 loc(#c)\n")


def test_static_proof_refuses_the_interpreter(tmp_path: Path) -> None:
    done = run(tmp_path, interpret=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 interprets kernels instead of compiling them" in done.stderr
