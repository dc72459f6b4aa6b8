"""How long a recipe's prompts are, where they and the tokenizer are at hand without the Hub and without weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subnet_ft.checkpoints import tiny
from subnet_ft.checkpoints.gguf import PACKAGE_PREFIX, locate_gguf
from subnet_ft.checkpoints.resolve import TINY_PREFIX
from subnet_ft.errors import MissingDependencyError
from subnet_ft.tasks import load_task

if TYPE_CHECKING:
    from subnet_ft.recipe import Recipe

LOOKED_AT = 500
"""Training prompts that are counted; the longest of all may be a few tokens longer."""


def longest_prompt(recipe: Recipe, *, with_answer: bool = False) -> int | None:
    """Count the tokens of the longest of the first training prompts; `None` where they are not at hand.

    They are for procedural tasks, whose prompts are made, and for models whose tokenizer is a local file.

    Args:
        recipe: The recipe.
        with_answer: Count the reference answer behind it, too, and the token that ends it.
    """
    if recipe.task.name == "dataset":
        return None
    tokenizer = _tokenizer(recipe.model.name)
    if tokenizer is None:
        return None
    try:
        task = load_task(recipe.task, seed=recipe.seed)
    except MissingDependencyError:
        return None
    return max(
        len(_ids(tokenizer, example.prompt)) + (len(_ids(tokenizer, example.answer)) + 1 if with_answer else 0)
        for example in task.train[:LOOKED_AT]
    )


def _ids(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@functools.lru_cache(maxsize=4)
def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    if name.startswith(TINY_PREFIX):
        return tiny.tiny_tokenizer()
    if name.startswith(PACKAGE_PREFIX) or name.endswith(".gguf"):
        file = locate_gguf(name)
        return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    folder = Path(name).expanduser()
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(str(folder))
