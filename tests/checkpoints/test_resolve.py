"""Which folder a name stands for, and what is said when it stands for none."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import same_bits

from subnet_ft.checkpoints import open_checkpoint, resolve_checkpoint
from subnet_ft.checkpoints.tiny import save_tiny, tiny_model
from subnet_ft.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_resolve_checkpoint_takes_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    assert resolve_checkpoint("org/model") == Path("org/model")
    assert resolve_checkpoint(tmp_path / "org") == tmp_path / "org"


def test_open_checkpoint_makes_a_tiny_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBNET_FT_CACHE", str(tmp_path))
    checkpoint = open_checkpoint("tiny:llama")
    assert checkpoint.name == "tiny:llama"
    assert checkpoint.revision is None
    assert checkpoint.folder.is_relative_to(tmp_path)
    assert (checkpoint.folder / "tokenizer.json").is_file()
    expected = dict(tiny_model("llama").named_parameters())
    assert all(same_bits(tensor, expected[name].detach()) for name, tensor in checkpoint.tensors())

    monkeypatch.setattr("subnet_ft.checkpoints.tiny.save_tiny", lambda *_, **__: pytest.fail("built again"))
    assert resolve_checkpoint("tiny:llama") == checkpoint.folder


def test_resolve_checkpoint_refuses_an_unknown_family() -> None:
    with pytest.raises(CheckpointError, match=r"`tiny:lama` is not a tiny model\. Choose one of deepseek_v3"):
        resolve_checkpoint("tiny:lama")


def test_open_checkpoint_downloads_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot_download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(save_tiny("llama", tmp_path / COMMIT))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("org/model", revision="main")
    assert (asked["name"], asked["revision"]) == ("org/model", "main")
    assert {"config.json", "tokenizer*", "model.safetensors"} <= set(asked["allow_patterns"])
    assert not any(".bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])
    assert (checkpoint.name, checkpoint.revision) == ("org/model", COMMIT)
    assert len(checkpoint.specs) == 20


def test_resolve_checkpoint_says_what_it_looked_for_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint("org/nowhere", revision="v2")
    message = str(caught.value)
    assert f"`{tmp_path / 'org' / 'nowhere'}`" in message
    assert "the Hub model `org/nowhere` at revision `v2`" in message
    assert "HF_HUB_OFFLINE is set" in message


@pytest.mark.parametrize("name", ["./org/model", "/nowhere/model", "a/b/c", "~/nowhere", "", Path("org/model")])
def test_resolve_checkpoint_asks_no_hub_for_a_path(name: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(CheckpointError, match=r"There is no checkpoint `.*`: no folder `/"):
        resolve_checkpoint(name)


def test_resolve_checkpoint_names_the_folder_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=rf"is a file\. Name the checkpoint's folder, `{tmp_path}`"):
        resolve_checkpoint(tmp_path / "model.safetensors")


def test_resolve_checkpoint_refuses_a_revision_of_what_has_none(tmp_path: Path) -> None:
    for name in (tmp_path, "tiny:llama", "package:module/file.gguf"):
        with pytest.raises(CheckpointError, match="not a Hub id, so it has no revision `main`"):
            resolve_checkpoint(name, revision="main")
