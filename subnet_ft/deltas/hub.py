"""Deltas on the Hub: one file per repository, with a model card that says what it is and how to apply it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from subnet_ft.checkpoints.resolve import is_hub_id
from subnet_ft.deltas.checks import base_digest, result_digest
from subnet_ft.deltas.download import HUB, HUB_FILE, asking_the_hub, download
from subnet_ft.deltas.file import DeltaFile
from subnet_ft.deltas.writing import check_writable, sync_folder, writing
from subnet_ft.errors import DeltaError


def push_delta(path: str | Path, repo: str, *, evidence: Sequence[str] = (), private: bool = False) -> str:
    """Upload a delta file and its model card; the repository is created if there is none.

    Args:
        path: A `NAME.delta.safetensors` file; its SHA-256 is checked first.
        repo: Hub id, `owner/name`.
        evidence: What a report says of the run, a sentence each, for the card.
        private: Create a private repository.

    Returns:
        The address of the upload.

    Raises:
        DeltaFileError: The file is missing or damaged.
        DeltaError: The file has no positions of its own, or the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    delta = DeltaFile(path)
    if delta.header.mask_fingerprint is not None:
        raise DeltaError(
            f"`{path}` has no positions of its own, so nobody could apply it without the mask "
            f"{delta.header.mask_fingerprint}. Export it with positions (leave out `--mask-reference`)."
        )
    card = model_card(delta, repo, evidence=evidence)
    with asking_the_hub(f"push to `{repo}`"):
        api = HfApi()
        api.create_repo(repo, private=private or None, repo_type="model", exist_ok=True)
        # The card states the SHA-256 of the file, so the file comes first.
        api.upload_file(path_or_fileobj=str(path), path_in_repo=HUB_FILE, repo_id=repo, commit_message="Upload a delta")
        info = api.upload_file(
            path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repo, commit_message="Say what it is"
        )
    return str(info)


def pull_delta(repo: str, path: str | Path, *, revision: str | None = None) -> DeltaFile:
    """Download the delta of a repository; the file appears whole or not at all.

    Args:
        repo: Hub id, `owner/name`.
        path: `NAME.delta.safetensors`; a file that is there is replaced.
        revision: Branch, tag or commit.

    Returns:
        The file, opened: its header and its SHA-256 are checked before it takes its place.

    Raises:
        DeltaFileError: What was downloaded is damaged, or no delta, or `path` cannot be written.
        DeltaError: The Hub cannot be reached, or has no such file.
    """
    target = Path(path)
    check_writable(target)
    found = download(repo, revision)
    with writing(target):
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.") as staging:
            copied = Path(staging) / target.name
            shutil.copyfile(found, copied)
            DeltaFile(copied)
            with copied.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(copied, target)
        sync_folder(target.absolute().parent)
    return DeltaFile(target)


def model_card(delta: DeltaFile, repo: str, *, evidence: Sequence[str] = ()) -> str:
    """Return the model card of a delta, in Markdown."""
    changed, total = delta.num_values, delta.num_parameters
    name, revision = delta.header.base_name, delta.header.base_revision
    # A folder's name is of no use to others; the fingerprints say which weights are meant. That the folder is not here
    # says nothing: the delta may have been made elsewhere. Only a base that came from the Hub has a revision.
    known = revision is not None and is_hub_id(name)
    front = ["tags: [subnet-ft, delta]", *([f"base_model: {json.dumps(name)}"] if known else [])]
    at = _plain(revision or "")
    base = f"`{name}` at `{at}`" if known else "the base named below"
    command = f"subnet-ft delta apply {name if known else 'BASE'} {HUB}{repo} -o FOLDER"
    command += f" --base-revision {shlex.quote(at)}" if known else ""
    rows = {
        "base": _plain(name) if known else "no model of the Hub; known by its digest",
        "digest of the base's fingerprints": base_digest(delta),
        "digest of the result's fingerprints": result_digest(delta),
        "weights with a new value": f"{changed:,} of {total:,}, density {changed / max(total, 1):.4%}",
        "size": f"{delta.nbytes:,} bytes, {delta.header.encoding}",
        "SHA-256 (as the file records it)": delta.sha256,
    }
    said = [f"- {_plain(line)}" for line in evidence] or ["No report came with this delta: nothing is known of it."]
    return "\n".join(
        [
            *("---", *front, "---", ""),
            *(f"# {repo}", ""),
            f"A sparse delta of {base}: the new values of the weights that training changed. Applied to that base it",
            "is the tuned model, bit for bit; another base is refused.",
            *("", "| | |", "|---|---|", *(f"| {key} | `{value}` |" for key, value in rows.items()), ""),
            *("## How to apply it", "", "```"),
            *(command, "```", ""),
            *("## What the report says", "", *said, ""),
        ]
    )


def _plain(text: str) -> str:
    """Keep a text from being read as Markdown of more than one line, or as code that ends early."""
    return " ".join(text.split()).replace("`", "'").replace("|", "/")
