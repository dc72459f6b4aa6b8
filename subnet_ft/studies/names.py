"""The studies by name, with the question that each answers."""

from __future__ import annotations

import difflib

from subnet_ft.errors import SubnetError

QUESTIONS: dict[str, str] = {
    "sparsity": "How many weights does each algorithm leave unchanged?",
    "overlap": "Do runs with another seed, other data or another algorithm change the same weights?",
    "causes": "What decides how many weights a run changes?",
    "which_mask": "Which masks recover the full run, and does it matter which weights they hold?",
    "early_mask": "How early does a run show which weights it will change, and is training those enough?",
}
"""Name to question."""


def study_name(text: str) -> str:
    """Return the name that `text` means; hyphens are as good as underscores.

    Raises:
        SubnetError: There is no such study.
    """
    name = text.replace("-", "_")
    if name in QUESTIONS:
        return name
    close = difflib.get_close_matches(name, QUESTIONS, n=1)
    hint = f"; did you mean `{close[0]}`?" if close else "."
    raise SubnetError(f"`{text}` is no study{hint} Studies: {', '.join(QUESTIONS)}.")
