"""`hub:OWNER/NAME[@REVISION]` in the place of a delta's file, against a stand-in for the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from delta_checkpoints import save_pair, unchanged, weights
from hub_stand_in import REPO, Hub, stand_in
from huggingface_hub.errors import HfHubHTTPError, XetDownloadError

from subnet_ft.cli import main
from subnet_ft.deltas import DeltaFile, apply_delta, compose_deltas, export_delta
from subnet_ft.deltas.download import HUB_FILE, asking_the_hub, located
from subnet_ft.errors import DeltaError, DeltaFileError

NAME = f"hub:{REPO}"
HTTP_ERROR = HfHubHTTPError.__bases__[0]
"""What the HTTP library under the Hub's client raises; it is no OSError."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The stand-in, in place of the Hub's client, with a delta of the pair in its folder."""
    made = stand_in(tmp_path / "hub", monkeypatch)
    export_delta(*save_pair(tmp_path / "pair"), made.folder / HUB_FILE)
    return made


def test_located_downloads_what_a_user_names_and_leaves_paths_alone(hub: Hub, tmp_path: Path) -> None:
    assert located(NAME) == located(f"{NAME}@v1.0") == hub.folder / HUB_FILE
    assert hub.asked == [f"get {HUB_FILE} at None", f"get {HUB_FILE} at v1.0"]
    assert located(Path(NAME)) == Path(NAME)
    assert located("d.delta.safetensors") == Path("d.delta.safetensors")
    assert len(hub.asked) == 2


@pytest.mark.parametrize("name", ["hub:", "hub:x", "hub:a/b/c", "hub:a/b@", "hub:a/b@c@d", "hub:../x@y z", "hub:/x"])
def test_located_refuses_what_is_no_address_before_anything_is_asked(name: str, hub: Hub) -> None:
    with pytest.raises(DeltaError, match="is no address of a delta on the Hub"):
        located(name)
    assert not hub.asked


def test_every_command_takes_a_delta_of_the_hub(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = tmp_path / "pair" / "base", tmp_path / "pair" / "tuned"
    out, composed = tmp_path / "out", tmp_path / "c.delta.safetensors"
    here = str(hub.folder / HUB_FILE)

    def printed(*arguments: str) -> dict[str, Any]:
        assert main(["delta", *arguments, "--json", "-q"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    assert printed("info", f"{NAME}@main") == printed("info", here)
    assert printed("verify", str(base), NAME, str(tuned))["fine"]
    found = printed("diff", NAME, here)
    assert found["first"] == found["equal"] > 0
    printed("compose", NAME, here, "-o", str(composed), "--base", str(base))
    printed("apply", str(base), NAME, "-o", str(out))
    assert weights(out) == weights(tuned)
    printed("apply", str(base), NAME, "--in-place")
    assert weights(base) == weights(tuned)


def test_a_damaged_or_missing_file_of_the_hub_writes_nothing(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "pair" / "base"
    content = bytearray((hub.folder / HUB_FILE).read_bytes())
    content[-1] ^= 1
    (hub.folder / HUB_FILE).write_bytes(content)
    with unchanged(tmp_path), pytest.raises(DeltaFileError, match="is damaged: its SHA-256"):
        apply_delta(base, NAME, in_place=True)
    (hub.folder / HUB_FILE).unlink()
    with unchanged(tmp_path):
        assert main(["delta", "apply", str(base), NAME, "-o", str(tmp_path / "out"), "-q"]) == 2
    assert f"Cannot pull `{HUB_FILE}` of `{REPO}`. The Hub's client says: 404" in capsys.readouterr().err


def test_a_delta_of_the_hub_without_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DeltaError, match=rf"Cannot pull `{HUB_FILE}` of `{REPO}` at `v1`\. HF_HUB_OFFLINE is set"):
        located(f"{NAME}@v1")


@pytest.mark.parametrize("error", [HTTP_ERROR("no route"), OSError("no route"), XetDownloadError("no route")])
def test_whatever_the_client_raises_is_an_error_of_ours(error: Exception, hub: Hub) -> None:
    with (
        pytest.raises(DeltaError, match=r"Cannot push\. The Hub's client says: no route Check the name"),
        asking_the_hub("push"),
    ):
        raise error


def test_nothing_that_a_delta_says_is_fetched(hub: Hub, tmp_path: Path) -> None:
    file = DeltaFile(hub.folder / HUB_FILE).delta()
    for name in (NAME, REPO):
        object.__setattr__(file.base, "name", name)
        path = file.save(tmp_path / "d.delta.safetensors")
        with pytest.raises(DeltaError, match="never fetched"):
            compose_deltas(path, path, tmp_path / "c.delta.safetensors")
    assert not hub.asked
