"""`subnet-ft delta`: every command with its JSON and exit code."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from delta_checkpoints import contents, save_pair, weights

from subnet_ft.cli import main
from subnet_ft.masks import extract

SUFFIX = ".delta.safetensors"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A base, two checkpoints tuned from it, and paths for their deltas."""
    base, first = save_pair(tmp_path / "1", seed=1, density=0.3)
    second = save_pair(tmp_path / "2", seed=2, density=0.3)[1]
    names = {name: str(tmp_path / f"{name}{SUFFIX}") for name in ("a", "b", "c")}
    return {"base": str(base), "first": str(first), "second": str(second), "out": str(tmp_path / "out"), **names}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["delta", *arguments, "--json", "-q"]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    assert "version" in found
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["delta", *arguments, "-q"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_delta_commands_from_export_to_revert(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    made = printed(capsys, "export", files["base"], files["first"], "-o", files["a"])
    assert made == printed(capsys, "info", files["a"])
    assert made["file"] == files["a"]
    assert made["bytes"] == Path(files["a"]).stat().st_size
    assert 0.25 < made["density"] == made["num_values"] / made["num_parameters"] < 0.35
    packed = printed(capsys, "export", files["base"], files["second"], "-o", files["b"], "--zstd")
    assert packed["encoding"] == "zstd"
    assert packed["base_digest"] == made["base_digest"]

    printed(capsys, "apply", files["base"], files["a"], "-o", files["out"])
    assert weights(Path(files["out"])) == weights(Path(files["first"]))
    assert printed(capsys, "verify", files["base"], files["a"], files["out"])["fine"]
    wrong = printed(capsys, "verify", files["base"], files["a"], files["second"], code=1)
    assert wrong["wrong_base"] == wrong["wrong_result"] == []
    assert wrong["wrong_tuned"]
    assert printed(capsys, "verify", files["second"], files["a"], code=1)["wrong_base"]

    before = contents(Path(files["base"]))
    assert printed(capsys, "apply", files["base"], files["b"], "--in-place")["in_place"]
    assert weights(Path(files["base"])) == weights(Path(files["second"]))
    printed(capsys, "revert", files["base"])
    assert contents(Path(files["base"])) == before


def test_delta_diff_and_compose(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    one = printed(capsys, "export", files["base"], files["first"], "-o", files["a"])
    two = printed(capsys, "export", files["base"], files["second"], "-o", files["b"])
    found = printed(capsys, "diff", files["a"], files["b"])
    assert (found["first"], found["second"]) == (one["num_values"], two["num_values"])
    assert 0 < found["shared"] < found["first"]
    assert found["equal"] < found["shared"]
    assert "--on-conflict" in refused(capsys, "compose", files["a"], files["b"], "-o", files["c"])
    union = found["first"] + found["second"] - found["shared"]
    for policy, winner in (("first", "a"), ("second", "b")):
        made = printed(capsys, "compose", files["a"], files["b"], "-o", files["c"], "--on-conflict", policy)
        assert made["num_values"] == union
        kept = printed(capsys, "diff", files[winner], files["c"])
        assert kept["first"] == kept["shared"] == kept["equal"]
        assert printed(capsys, "verify", files["base"], files["c"])["fine"]
    printed(capsys, "export", files["first"], files["second"], "-o", files["b"])
    printed(capsys, "compose", files["a"], files["b"], "-o", files["c"])
    assert printed(capsys, "verify", files["base"], files["c"], files["second"])["fine"]
    assert "different bases" in refused(capsys, "diff", files["a"], files["b"])


def test_delta_export_with_a_mask_leaves_nothing_out(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = str(extract(files["base"], files["first"]).save(tmp_path / "m.subnet.safetensors"))
    both = ["--mask", mask, "--mask-reference"]
    assert "needs that mask" in refused(
        capsys, "export", files["base"], files["first"], "-o", files["a"], "--mask-reference"
    )
    assert "changed outside the mask" in refused(
        capsys, "export", files["base"], files["second"], "-o", files["a"], *both
    )
    assert not Path(files["a"]).exists()
    full = printed(capsys, "export", files["base"], files["first"], "-o", files["b"], "--mask", mask)
    made = printed(capsys, "export", files["base"], files["first"], "-o", files["a"], *both)
    assert made["mask"] is not None
    assert made["bytes"] < full["bytes"]
    assert "--mask" in refused(capsys, "apply", files["base"], files["a"], "-o", files["out"])
    printed(capsys, "apply", files["base"], files["a"], "-o", files["out"], "--mask", mask)
    assert weights(Path(files["out"])) == weights(Path(files["first"]))


def test_delta_prints_lines_for_people(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, line in (
        (("export", files["base"], files["first"], "-o", files["a"]), "SHA-256"),
        (("info", files["a"]), "bytes, "),
        (("diff", files["a"], files["a"]), "100.0% of those"),
        (("verify", files["base"], files["a"], files["first"]), "every fingerprint as recorded"),
        (("apply", files["base"], files["a"], "--in-place"), "undo with `subnet-ft delta revert"),
        (("revert", files["base"]), "as before"),
    ):
        assert main(["delta", *arguments, "-q"]) == 0
        assert line in capsys.readouterr().out


def test_delta_refuses_wrong_input(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "no delta file at" in refused(capsys, "info", files["a"])
    assert "does not end in" in refused(capsys, "export", files["base"], files["first"], "-o", "x.safetensors")
    with pytest.raises(SystemExit) as stopped:
        main(["delta", "apply", files["base"], files["a"]])
    assert stopped.value.code == 2


def test_delta_commands_take_a_base_of_the_hub_at_a_revision(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = {None: files["second"], "v1": files["base"]}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, *, revision, **_: at[revision])
    base, v1 = "someone/a-base", ("--base-revision", "v1")
    made = printed(capsys, "export", base, files["first"], "-o", files["a"], *v1)
    assert (made["base"], made["base_revision"]) == (base, "v1")
    assert main(["delta", "info", files["a"], "-q"]) == 0
    assert f"{base} at v1\n" in capsys.readouterr().out
    printed(capsys, "export", base, files["second"], "-o", files["b"], *v1)
    assert f"(`{base}` at `v1`)" in refused(capsys, "apply", base, files["a"], "-o", files["out"])
    printed(capsys, "apply", base, files["a"], "-o", files["out"], *v1)
    assert weights(Path(files["out"])) == weights(Path(files["first"]))
    printed(capsys, "verify", base, files["a"], files["first"], code=1)
    printed(capsys, "verify", base, files["a"], files["first"], *v1)
    composed = ("compose", files["a"], files["b"], "-o", files["c"], "--on-conflict", "first")
    printed(capsys, *composed, "--base", base, *v1)
    assert "Name the base, too" in refused(capsys, *composed, *v1)
    assert "is not a Hub id" in refused(capsys, "apply", files["base"], files["a"], "--in-place", *v1)


def test_delta_apply_in_place_prints_a_command_that_a_shell_takes(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spaced = Path(files["base"]).rename(tmp_path / "my base")
    printed(capsys, "export", str(spaced), files["first"], "-o", files["a"])
    assert main(["delta", "apply", str(spaced), files["a"], "--in-place", "-q"]) == 0
    command = capsys.readouterr().out.partition("undo with `")[2].partition("`")[0]
    assert shlex.split(command) == ["subnet-ft", "delta", "revert", str(spaced)]


@pytest.mark.parametrize("words", [["revert", ""], ["apply", "", "d", "--in-place"], ["apply", "", "d", "-o", "x"]])
def test_delta_commands_that_change_folders_take_no_empty_name_for_this_one(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["delta", *words])
    assert stopped.value.code == 2
    assert "it is empty; name a checkpoint" in capsys.readouterr().err


def test_delta_commands_take_masks_where_a_file_of_several_refers_to_one(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = {
        name: str(extract(files["base"], files[name]).save(tmp_path / f"{name}.subnet.safetensors"))
        for name in ("first", "second")
    }
    for name, path in (("first", files["a"]), ("second", files["b"])):
        printed(capsys, "export", files["base"], files[name], "-o", path, "--mask", masks[name], "--mask-reference")
    both = ["--mask", masks["second"], "--mask", masks["first"]]
    assert "`--mask`" in refused(capsys, "diff", files["a"], files["b"])
    assert printed(capsys, "diff", files["a"], files["b"], *both)["shared"]
    printed(capsys, "compose", files["a"], files["b"], "-o", files["c"], "--on-conflict", "first", *both)
    assert printed(capsys, "verify", files["base"], files["c"])["fine"]
    assert "Leave out the mask" in refused(capsys, "verify", files["base"], files["c"], "--mask", masks["first"])
    # A chain of a file with positions of its own and one without.
    printed(capsys, "export", files["first"], files["second"], "-o", files["c"])
    printed(capsys, "apply", files["base"], files["a"], files["c"], "-o", files["out"], "--mask", masks["first"])
    assert weights(Path(files["out"])) == weights(Path(files["second"]))
