"""`verify_delta` and its exit codes: 0 for fine, 1 for a fingerprint that differs, 2 for what cannot be compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from delta_checkpoints import save_pair, unchanged
from safetensors.torch import load_file, save_file

from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.cli import main
from subnet_ft.deltas import Delta, export_delta, verify_delta
from subnet_ft.errors import DeltaMismatchError

SUFFIX = ".delta.safetensors"
NORM = "model.norm.weight"


def flip(folder: Path, name: str = NORM) -> None:
    """Change one bit of one weight of a checkpoint."""
    stored = load_file(folder / "model.safetensors")
    stored[name].view(torch.int16).view(-1)[-1] ^= 1
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, a tuned checkpoint, and their delta."""
    base, tuned = save_pair(tmp_path)
    return base, tuned, export_delta(base, tuned, tmp_path / f"d{SUFFIX}").path


def code(tmp_path: Path, *arguments: Path) -> int:
    with unchanged(tmp_path):
        return main(["delta", "verify", *map(str, arguments), "-q"])


def test_verify_names_the_one_tensor_that_differs_on_each_side(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, path = files
    assert verify_delta(base, path, tuned).is_fine
    assert verify_delta(base, path).wrong_tuned is None
    assert code(tmp_path, base, path, tuned) == 0
    flip(tuned)
    found = verify_delta(base, path, tuned)
    assert (found.wrong_base, found.wrong_result, found.wrong_tuned) == ([], [], [NORM])
    assert code(tmp_path, base, path, tuned) == 1
    flip(base)
    found = verify_delta(base, path)
    assert (found.wrong_base, found.wrong_result) == ([NORM], [NORM])  # the base's weight is not among the new ones
    assert code(tmp_path, base, path) == 1
    delta = Delta.load(path)
    delta.result[NORM] = "0" * 32
    flip(base)
    assert verify_delta(base, delta).wrong_result == [NORM]
    assert code(tmp_path, base, delta.save(tmp_path / f"wrong{SUFFIX}")) == 1


def test_verify_exits_2_where_nothing_can_be_compared(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned, path = files
    other = save_tiny("qwen2", tmp_path / "other")
    broken = tmp_path / f"broken{SUFFIX}"
    broken.write_bytes(path.read_bytes()[:-1])
    for arguments, message in (
        ((other, path), "different parameters"),
        ((base, path, other), "different parameters"),
        ((base, broken), "truncated"),
        ((base, tmp_path / f"no{SUFFIX}"), "no delta file at"),
        ((tmp_path / "no", path), "There is no checkpoint"),
        ((base, path, tmp_path / "no"), "There is no checkpoint"),
    ):
        assert code(tmp_path, *arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert "Traceback" not in captured.err
        assert captured.out == ""
    with pytest.raises(DeltaMismatchError, match="different parameters"):
        verify_delta(base, path, other)
    assert verify_delta(tuned, path).wrong_base


def test_verify_keeps_names_from_steering_the_terminal(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _, path = files
    delta = Delta.load(path)
    evil = "\x1b]0;evil\x07\x1b[2J"
    renamed = {name: evil if name == NORM else name for name in delta.tensors}
    hostile = Delta(
        {renamed[name]: tensor for name, tensor in delta.tensors.items()},
        type(delta.base)(
            f"a\nb{evil}",
            None,
            {renamed[name]: value for name, value in delta.base.dtypes.items()},
            {renamed[name]: value for name, value in delta.base.fingerprints.items()},
        ),
        {renamed[name]: value for name, value in delta.result.items()},
    ).save(tmp_path / f"h{SUFFIX}")
    assert code(tmp_path, base, hostile) == 2
    assert main(["delta", "info", str(hostile)]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.err + captured.out
    assert "?]0;evil?" in captured.err
    assert "a?b?]0;evil?" in captured.out
