"""docs/delta_format.md, whose example is the file byte by byte and whose reader reads real files; docs/deltas.md."""

from __future__ import annotations

import ast
import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from delta_checkpoints import contents, record, save_pair
from hub_stand_in import REPO, stand_in
from report_evidence import full_report

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.cli import main
from subnet_ft.cli.parser import parse
from subnet_ft.deltas import Delta, TensorDelta, export_delta
from subnet_ft.deltas.checks import base_digest, result_digest
from subnet_ft.evidence.report import write_report
from subnet_ft.masks import extract

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "delta_format.md").read_text(encoding="utf-8")
GUIDE = (DOCS / "deltas.md").read_text(encoding="utf-8")
SUFFIX = ".delta.safetensors"


def defined(heading: str, packages: set[str]) -> dict[str, Any]:
    """Return the names that the page's own program under a heading defines; it may import these packages only."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (program,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(program.splitlines()) <= 60
    imported = {name for node in ast.walk(ast.parse(program)) for name in getattr(node, "names", ())}
    assert {alias.name for alias in imported} == {"hashlib", "json", "struct", "numpy", *packages}
    names: dict[str, Any] = {}
    exec(compile(program, "docs/delta_format.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """The names that the page's reader defines."""
    return defined("An independent reader", {"zstandard"})


@pytest.fixture(scope="module")
def writer() -> dict[str, Any]:
    """The names that the page's writer defines."""
    return defined("An independent writer", set())


def test_page_writer_makes_the_example(writer: dict[str, Any], tmp_path: Path) -> None:
    base = {"w": torch.arange(1, 11).bfloat16().view(2, 5), "norm": torch.tensor([0.5]).bfloat16()}
    tuned = {"w": base["w"].clone(), "norm": base["norm"]}
    tuned["w"].view(-1)[1], tuned["w"].view(-1)[8] = 2.5, -1.0
    bits = [{name: weight.view(torch.int16).numpy() for name, weight in model.items()} for model in (base, tuned)]
    writer["write_delta"](tmp_path / f"d{SUFFIX}", *bits, "tiny", {"kind": "example"})
    assert (tmp_path / f"d{SUFFIX}").read_bytes() == example()


def test_page_writer_makes_the_file_of_export(writer: dict[str, Any], tmp_path: Path) -> None:
    for family, dtype, integers in (("mixtral", torch.bfloat16, torch.int16), ("llama", torch.float32, torch.int32)):
        pair = save_pair(tmp_path / family, family, dtype=dtype)
        delta = export_delta(*pair, tmp_path / f"{family}{SUFFIX}")
        models = [
            {name: tensor.clone().view(integers).numpy() for name, tensor in open_checkpoint(folder).tensors()}
            for folder in pair
        ]
        theirs = tmp_path / f"{family}-2{SUFFIX}"
        writer["write_delta"](theirs, *models, delta.base.name, delta.header.source)
        assert theirs.read_bytes() == delta.path.read_bytes()


def test_page_says_what_the_digests_and_the_fingerprint_of_a_mask_are(tmp_path: Path) -> None:
    delta = export_delta(*save_pair(tmp_path), tmp_path / f"d{SUFFIX}").delta()
    for digest, prints in ((base_digest(delta), delta.base.fingerprints), (result_digest(delta), delta.result)):
        lines = b"".join(name.encode() + b"\0" + prints[name].encode() + b"\n" for name in sorted(prints))
        assert hashlib.sha256(lines).hexdigest() == digest
    mask = hashlib.sha256()
    for name in sorted(delta.tensors):
        tensor = delta.tensors[name]
        mask.update(name.encode() + b"\0" + str(tensor.shape).encode() + b"\0" + str(tensor.count).encode() + b"\0")
        mask.update(tensor.bits.numpy().tobytes())
    assert mask.hexdigest() == delta.mask.fingerprint


def test_guide_commands_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path / "hub", monkeypatch)
    monkeypatch.chdir(tmp_path)
    save_pair(tmp_path)
    shutil.copytree("base", "changed")
    extract("base", "tuned").save("m.subnet.safetensors")
    for name, seed in (("A", 2), ("B", 3)):
        other = save_pair(tmp_path / name, seed=seed)[1]
        export_delta("base", other, f"{name}{SUFFIX}")
    block = GUIDE.split("```\n")[1]
    lines = [line.partition("  #")[0].strip() for line in block.splitlines()]
    assert len(lines) > 10
    for number, line in enumerate(lines):
        in_place = "--in-place" in line or " revert " in line
        values = {"BASE": "base", "TUNED": "tuned", "MASK": "m.subnet.safetensors", "OWNER/NAME": REPO, "DIR": "report"}
        values["FOLDER"] = "changed" if in_place else f"new-{number}"
        words = [values.get(word, word) for word in line.replace("[", "").replace("]", "").split()]
        assert words[0] == "subnet-ft"
        assert parse(words[1:]).command is not None
        if "to-shira" in line:  # which refuses most deltas
            continue
        if "push" in line:
            write_report(full_report(), tmp_path / "report")
        code = main([*words[1:], "-q"] if "--mask-reference" not in line else [*words[1:7], "-q"])
        assert code == 0, line
    assert contents(tmp_path / "changed") == contents(tmp_path / "base")


def example() -> bytes:
    rows = re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+)", PAGE, flags=re.MULTILINE)
    return bytes.fromhex("".join(rows))


def test_page_has_the_bytes_of_its_example(tmp_path: Path) -> None:
    base = {"w": torch.arange(1, 11).bfloat16().view(2, 5), "norm": torch.tensor([0.5]).bfloat16()}
    tuned = {"w": base["w"].clone(), "norm": base["norm"]}
    tuned["w"].view(-1)[1], tuned["w"].view(-1)[8] = 2.5, -1.0
    tensors = {
        "w": TensorDelta(torch.tensor([2, 1], dtype=torch.uint8), tuned["w"].view(-1)[[1, 8]], (2, 5)),
        "norm": TensorDelta(torch.empty(0, dtype=torch.uint8), base["norm"][:0], (1,)),
    }
    delta = Delta(tensors, record(base, "tiny"), record(tuned).fingerprints, {"kind": "example"})
    assert example() == delta.save(tmp_path / f"d{SUFFIX}").read_bytes()


@pytest.mark.parametrize("form", ["raw", "zstd", "mask"])
def test_page_reader_makes_the_tuned_weights(form: str, reader: dict[str, Any], tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "mixtral")
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}", zstd=form == "zstd")
    mask_bits = None
    if form == "mask":
        mask = delta.delta().mask
        mask_bits = {name: tensor.bits.numpy().tobytes() for name, tensor in mask.tensors.items()}
        export_delta(base, tuned, delta.path, mask=mask, mask_reference=True)
    weights = {name: bits_of(tensor).copy() for name, tensor in open_checkpoint(base).tensors()}
    reader["apply"](weights, reader["read_delta"](delta.path, mask_bits))
    for name, tensor in open_checkpoint(tuned).tensors():
        assert np.array_equal(weights[name], bits_of(tensor)), name


def test_page_reader_refuses_a_flipped_bit(reader: dict[str, Any], tmp_path: Path) -> None:
    path = export_delta(*save_pair(tmp_path), tmp_path / f"d{SUFFIX}").path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        reader["read_delta"](path)


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    found: np.ndarray = tensor.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(-1)
    return found


@pytest.mark.parametrize("density", [0.0, 0.05, 0.17, 1.0])
def test_size_is_two_bytes_per_new_value_and_a_bit_per_weight(density: float, tmp_path: Path) -> None:
    count = 1_000_003
    chosen = torch.rand(count, generator=torch.Generator().manual_seed(0)) < density
    base = {"w": torch.zeros(count, dtype=torch.bfloat16)}
    tuned = {"w": chosen.bfloat16()}
    mask_bits = np.packbits(chosen.numpy(), bitorder="little")
    tensor = TensorDelta.build(torch.from_numpy(mask_bits), tuned["w"][chosen], (count,))
    path = Delta({"w": tensor}, record(base), record(tuned).fingerprints).save(tmp_path / f"d{SUFFIX}")
    real = float(chosen.float().mean())
    assert path.stat().st_size <= 1.01 * (2 * real + 0.13) * count + 1000
    if density:
        assert path.stat().st_size >= 0.99 * (2 * real + 0.125) * count
