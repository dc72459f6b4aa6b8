"""One piece of evidence as a stage."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from subnet_ft.digests import json_sha256
from subnet_ft.evidence.json_schema import json_schema
from subnet_ft.evidence.plain import from_plain
from subnet_ft.stages import read_json, run_stage, write_json

logger = logging.getLogger(__name__)

FOLDER = "evidence"
FOUND = "found.json"

T = TypeVar("T")


@dataclass(frozen=True)
class EvidenceFolder:
    """Where the evidence of a run lies.

    Args:
        folder: The run's folder.
        overwrite: Passed on to the stages, all of which are cheap.
    """

    folder: Path
    overwrite: bool

    def once(self, name: str, kind: type[T], inputs: dict[str, Any], work: Callable[[], T], *, version: int) -> T:
        """Do `work` unless its stage is finished with the same inputs, and return what it found.

        Args:
            name: Of the stage.
            kind: The dataclass that `work` returns.
            inputs: Everything that the result depends on, as JSON values.
            work: Finds it.
            version: Of how it is found. Whoever changes what is computed from the same inputs raises it, so that what
                an earlier release found is not shown as if it were ours; a changed dataclass is noticed without it.
        """
        stage = self.folder / FOLDER / name

        def do(folder: Path) -> dict[str, Any]:
            logger.info("evidence: %s", name)
            write_json(folder / FOUND, asdict(work()))  # type: ignore[call-overload]  # every kind is a dataclass
            return {}

        # Another version of subnet-ft may have found other things under the same inputs.
        inputs = {**inputs, "schema": json_sha256([json_schema(kind, identifier=name)]), "version": version}
        run_stage(stage, inputs, do, overwrite=self.overwrite, cheap=True, products=[stage / FOUND])
        return from_plain(kind, read_json(stage / FOUND))
