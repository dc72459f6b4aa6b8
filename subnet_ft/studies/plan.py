"""What a study will run: its cells, and the recipes that they are derived from."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subnet_ft.errors import RecipeError, SubnetError
from subnet_ft.pipeline import load_checked_recipe
from subnet_ft.recipe import Recipe, RepeatsSpec, SourceSpec
from subnet_ft.recipe.algorithms import ALGORITHMS, trains_reward_model
from subnet_ft.recipe.loading import find_recipe
from subnet_ft.stages import FINISHED
from subnet_ft.training import config_fields

logger = logging.getLogger(__name__)

AS_WRITTEN = "as_written"
"""Name of the cell that is the recipe's own full run."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study.

    Args:
        name: Unique in the study, and the name of its folder.
        label: What the page calls it.
        recipe: What it trains by; its `output` is the folder of its stages.
        group: What is varied in it.
        settings: In what it departs from the study's recipe.
        versus: Name of the cell that it is compared with.
        seed: Another seed of training on the recipe's own data.
        measure_data: Measure how likely the base is to write what the run learns from.
        mask: For a run under a mask of the study's recipe: how the mask is made.
    """

    name: str
    label: str
    recipe: Recipe
    group: str = ""
    settings: tuple[str, ...] = ()
    versus: str | None = AS_WRITTEN
    seed: int | None = None
    measure_data: bool = False
    mask: MaskPlan | None = None

    @property
    def stage(self) -> str:
        """Name of its training stage in the folder of its recipe; those of a run are shared with `subnet-ft run`."""
        if self.mask is None:
            return "full" if self.seed is None else f"seed-{self.seed}/full"
        if self.mask.source is None and self.mask.density is None:
            return f"control-{self.mask.control}" if self.mask.control else "subnet"
        return f"studies/masks/{self.name}"

    @property
    def is_done(self) -> bool:
        """Whether a run of this cell is finished, whatever its inputs were."""
        return (Path(self.recipe.output) / self.stage / FINISHED).is_file()

    @property
    def num_steps(self) -> int:
        """Optimizer steps that it takes, those of its mask included; 0 if the recipe counts in epochs."""
        steps = self.recipe.training.get("max_steps", -1)
        made = self.mask.source.steps if self.mask is not None and self.mask.source is not None else None
        return (steps if isinstance(steps, int) and steps > 0 else 0) + (made or 0)


@dataclass(frozen=True, kw_only=True)
class MaskPlan:
    """How a mask is made.

    Args:
        source: A source that the recipe could name, too; `None` for the final mask or one of its size.
        control: A control of the final mask; `None` for the final mask itself.
        density: Share of all weights to which the final mask is thinned first, at random; `None` keeps it whole.
    """

    source: SourceSpec | None = None
    control: str | None = None
    density: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells of a study.

    Args:
        study: Its name.
        recipe: What it starts from.
        cells: In the order in which they are run.
        notes: What is not studied, and why, one sentence each.
        impossible: Names of the cells that such a note speaks of, which may be asked for all the same.
    """

    study: str
    recipe: Recipe
    cells: list[Cell]
    notes: list[str] = field(default_factory=list)
    impossible: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the study writes."""
        return Path(self.recipe.output) / "studies" / self.study

    def only(self, names: Sequence[str]) -> Plan:
        """Return the plan of these cells, of those that they are compared with, and of the recipe's own run.

        Raises:
            SubnetError: A name is not one of the study's, or none of them can be.
        """
        from subnet_ft.recipe.parsing import did_you_mean

        known = {cell.name: cell for cell in self.cells}
        if names and set(names) <= set(self.impossible):
            raise SubnetError(" ".join(self.notes))
        names = [name for name in names if name not in self.impossible]
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known) or f"; cells: {', '.join(known)}"
                raise SubnetError(f"`{name}` is no cell of the study `{self.study}`{hint.rstrip('.')}.")
        wanted = {self.cells[0].name}
        for name in names:
            needed: str | None = name
            while needed is not None:
                wanted.add(needed)
                needed = known[needed].versus
        left_out = [cell.name for cell in self.cells if cell.name not in wanted]
        notes = [*self.notes, *([f"The cells {', '.join(left_out)}: they were not asked for."] if left_out else [])]
        return dataclasses.replace(self, cells=[cell for cell in self.cells if cell.name in wanted], notes=notes)


class Recipes:
    """The recipe of a study and what is derived from it; everything is checked before anything is trained.

    Args:
        path: A file, or the name of a shipped recipe.
        overrides: `key=value`, for every cell.
        study: Name of the study.
        among_others: The study also runs other recipes of the folder. An override then reaches those in which it has a
            meaning: a setting of one algorithm's config has none for another.

    Raises:
        RecipeError: The recipe has problems.
    """

    def __init__(self, path: str, overrides: Sequence[str], study: str, *, among_others: bool = False) -> None:
        self.path, self.study = path, study
        self.given = list(overrides)
        self.overrides = list(overrides)
        if among_others:
            written = load_checked_recipe(path)
            self.overrides = [text for text in overrides if _has_meaning(text, written)]
        # A study says itself what is repeated.
        self.own = dataclasses.replace(load_checked_recipe(path, self.overrides), repeats=RepeatsSpec())

    def derived(self, name: str, *changes: str) -> Recipe:
        """Return the recipe with further overrides, whose stages go to the folder of the cell `name`."""
        return self._loaded(self.path, [*self.overrides, *changes], name)

    def as_shipped(self, path: str, name: str, *changes: str) -> Recipe:
        """Return another recipe without the study's overrides, in the folder of the cell `name`."""
        return self._loaded(path, list(changes), name)

    def with_algorithm(self, algorithm: str, name: str, *changes: str) -> Recipe:
        """Return the recipe with another algorithm, the shared settings of the trainer, and no teacher."""
        from transformers import TrainingArguments

        common = {entry.name for entry in dataclasses.fields(TrainingArguments)}
        fields = config_fields()[algorithm]
        training = {
            key: value
            for key, value in self.own.training.items()
            if key in fields and (key in common or key.startswith("activation_checkpointing"))
        }
        return self.derived(
            name,
            f"algorithm={algorithm}",
            f"training={json.dumps(training)}",
            f"evaluation.max_new_tokens={self.own.evaluation.max_new_tokens}",
            "methods={}",
            "baselines=[]",
            "teacher=null",
            "task.rationales=null",
            'subnet.source={"kind": "extract"}',
            *changes,
        )

    def siblings(self) -> Iterator[tuple[str, Recipe | str]]:
        """Yield the name of every other recipe in the folder, with itself or why it cannot be compared.

        Raises:
            RecipeError: An override has no meaning in any recipe, or a recipe has problems with those that have one.
        """
        own_path = find_recipe(self.path)
        without_meaning = set(self.given) - set(self.overrides)
        for path in sorted(own_path.parent.glob("*.yaml")):
            if path.resolve() == own_path.resolve():
                continue
            try:
                written = load_checked_recipe(path)
            except RecipeError as error:
                yield path.stem, f"it cannot run here: {error.problems[0]}"
                continue
            reason = self._incomparable(written)
            if reason:
                yield path.stem, reason
                continue
            overrides = [text for text in self.given if _has_meaning(text, written)]
            without_meaning -= set(overrides)
            yield path.stem, self._loaded(str(path), overrides, path.stem)
        if without_meaning:
            load_checked_recipe(self.path, sorted(without_meaning))  # says what is wrong with them

    def sibling(self, stem: str, name: str, *changes: str) -> Recipe:
        """Return another recipe of the folder with further overrides, in the folder of the cell `name`."""
        path = find_recipe(self.path).with_name(f"{stem}.yaml")
        overrides = [text for text in self.given if _has_meaning(text, load_checked_recipe(path))]
        return self._loaded(str(path), [*overrides, *changes], name)

    def _incomparable(self, other: Recipe) -> str | None:
        written = load_checked_recipe(self.path)
        if other.model != written.model:
            return f"its base is {other.model.name} in {other.model.dtype}"
        if trains_reward_model(other.algorithm) != trains_reward_model(self.own.algorithm):
            return "one of the two trains a reward model"
        if other.teacher is not None and not _is_at_hand(other.teacher.name):
            return f"its teacher `{other.teacher.name}` is not there"
        return None

    def _loaded(self, path: str, overrides: Sequence[str], name: str) -> Recipe:
        output = Path(self.own.output) / "studies" / self.study / name
        recipe = load_checked_recipe(path, [*overrides, f"output={json.dumps(str(output))}"])
        return dataclasses.replace(recipe, repeats=RepeatsSpec())


def own_cell(recipe: Recipe) -> Cell:
    """Return the cell of the recipe's own full run, which it shares with `subnet-ft run`."""
    return Cell(name=AS_WRITTEN, label="as written", recipe=recipe, versus=None)


def max_steps(recipe: Recipe, study: str) -> int:
    """Return the recipe's number of steps.

    Raises:
        SubnetError: It counts in epochs.
    """
    steps = recipe.training.get("max_steps", -1)
    if not isinstance(steps, int) or steps < 2:
        raise SubnetError(
            f"The study `{study}` needs a recipe that says how many steps it takes, at least 2: set "
            f"`training.max_steps`, got {steps}."
        )
    return steps


def need_extracted(recipe: Recipe, study: str) -> None:
    """Refuse a recipe whose mask is not what its full run changed.

    Raises:
        SubnetError: `subnet.source.kind` is another one.
    """
    kind = recipe.subnet.source.kind
    if kind != "extract":
        raise SubnetError(
            f"The study `{study}` compares with the mask of the full run, and the recipe's `subnet.source.kind` is "
            f"`{kind}`. Add `subnet.source={{kind: extract}}`."
        )


def _has_meaning(override: str, recipe: Recipe) -> bool:
    key = override.partition("=")[0].strip()
    section, _, name = key.partition(".")
    if section == "training" and name:
        return name in config_fields()[recipe.algorithm]
    optional = {"task.pairs": recipe.task.pairs, "task.rationales": recipe.task.rationales, "teacher": recipe.teacher}
    return all(value is not None for part, value in optional.items() if f"{key}.".startswith(f"{part}."))


def _is_at_hand(name: str) -> bool:
    return name.startswith(("tiny:", "package:")) or Path(name).exists() or not name.startswith(("runs/", "/", "."))


def config_default(recipe: Recipe, name: str) -> Any:
    """Return a setting of the algorithm's config: the recipe's, else the config's own default."""
    if name in recipe.training:
        return recipe.training[name]
    config = ALGORITHMS[recipe.algorithm].config_class
    found = next((entry.default for entry in dataclasses.fields(config) if entry.name == name), None)
    return None if found is dataclasses.MISSING else found
