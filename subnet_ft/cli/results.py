"""Where a command's result goes, its exit codes, and the checks that several commands make first."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from subnet_ft.errors import SubnetError

if TYPE_CHECKING:
    from subnet_ft.recipe import Recipe

FINE, VERIFICATION_FAILED, WRONG_INPUT, UNEXPECTED = 0, 1, 2, 3

Emit = Callable[[str], None]


@contextlib.contextmanager
def stdout_for_results() -> Iterator[Emit]:
    """Send what libraries print to stderr; only what is emitted reaches stdout."""
    stdout = sys.stdout

    def emit(text: str) -> None:
        stdout.write(text + "\n")
        stdout.flush()

    with contextlib.redirect_stdout(sys.stderr):
        yield emit


def printable(text: str, *, keep: str = "") -> str:
    """Keep a stranger's text, such as the name of a tensor, from steering the terminal; `keep` is left as it is."""
    return "".join(character if character.isprintable() or character in keep else "?" for character in text)


def check_folder(path: Path) -> None:
    """Check that files can be made in a folder, which may not exist yet, before the work whose results it will hold."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        # Only making a file tells: root may do what the permissions of /proc or of a read-only disk seem to allow.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = "is a file" if existing.is_file() else f"cannot be written to ({error.strerror})"
        raise SubnetError(f"`{path}` cannot be an output folder: `{existing}` {reason}. Choose another one.") from error


def recipe_to_judge(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe where nothing is trained, so that the machine need not have what training needs."""
    from subnet_ft.recipe import load_recipe
    from subnet_ft.training import config_fields

    return load_recipe(path, overrides, algorithms=config_fields())
