"""A folder in place of the Hub, for tests of what is uploaded and downloaded."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

REPO = "someone/a-delta"


class Hub:
    """Stands in for the Hub: a folder with the files of one repository, and what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []

    def create_repo(self, repo_id: str, *, private: bool | None, repo_type: str, exist_ok: bool) -> None:
        assert (repo_type, exist_ok) == ("model", True)
        self.asked.append(f"create {repo_id} private={private}")

    def upload_file(self, *, path_or_fileobj: str | bytes, path_in_repo: str, repo_id: str, commit_message: str) -> str:
        self.asked.append(path_in_repo)
        content = path_or_fileobj if isinstance(path_or_fileobj, bytes) else Path(path_or_fileobj).read_bytes()
        (self.folder / path_in_repo).write_bytes(content)
        return f"https://hub/{repo_id}"

    def download(self, repo_id: str, filename: str, *, revision: str | None) -> str:
        assert repo_id == REPO
        self.asked.append(f"get {filename} at {revision}")
        if not (self.folder / filename).is_file():
            raise EntryNotFoundError(f"404: {filename} is not in {repo_id}")
        return str(self.folder / filename)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Put a new stand-in in place of the Hub's client, with its files in `folder`."""
    folder.mkdir()
    made = Hub(folder)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda api, *args, **kwargs: made.create_repo(*args, **kwargs)
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_file", lambda api, **kwargs: made.upload_file(**kwargs))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return made
