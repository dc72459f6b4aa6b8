"""Deltas of the Hub, as files of its cache; a file there is checked like any other when it is opened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from subnet_ft.deltas.header import SUFFIX
from subnet_ft.errors import DeltaError

HUB = "hub:"
"""What stands before a Hub id where otherwise a file is named."""
HUB_FILE = f"model{SUFFIX}"
"""Name of the delta in its repository."""

_ADDRESS = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([^@\s]+))?")


def located(name: str | Path) -> Path:
    """Return the file of a delta that a user named; `hub:OWNER/NAME[@REVISION]` is downloaded, if it is not cached.

    Only what a user wrote may be given here, never a name out of a file.

    Raises:
        DeltaError: It is no address of the Hub, or the Hub cannot be reached, or has no such file.
    """
    if not isinstance(name, str) or not name.startswith(HUB):
        return Path(name)
    found = _ADDRESS.fullmatch(name)
    if found is None:
        raise DeltaError(
            f"{name!r} is no address of a delta on the Hub. Write `{HUB}OWNER/NAME` or `{HUB}OWNER/NAME@REVISION`."
        )
    return download(found[1], found[2])


def download(repo: str, revision: str | None = None) -> Path:
    """Return the file in the cache with the delta of a repository.

    Args:
        repo: Hub id, `owner/name`.
        revision: Branch, tag or commit.

    Raises:
        DeltaError: The Hub cannot be reached, or has no such file.
    """
    from huggingface_hub import hf_hub_download

    with asking_the_hub(f"pull `{HUB_FILE}` of `{repo}`" + (f" at `{revision}`" if revision else "")):
        return Path(hf_hub_download(repo, HUB_FILE, revision=revision))


@contextmanager
def asking_the_hub(what: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a DeltaError that says what could not be done."""
    from huggingface_hub import constants

    try:
        yield
    except Exception as error:  # the client has no common base for what it raises, and passes on what httpx does
        offline = " HF_HUB_OFFLINE is set: unset it to reach the Hub." if constants.HF_HUB_OFFLINE else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DeltaError(
            f"Cannot {what}.{offline} The Hub's client says: {reason} Check the name, your network and your access "
            "(`hf auth login`)."
        ) from error
