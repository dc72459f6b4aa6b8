"""Evidence from outputs: agreement with the full run, and what models keep of the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from subnet_ft.digests import json_sha256
from subnet_ft.evidence.agreement import Agreement, agreement
from subnet_ft.evidence.retention import Retention, read_paragraphs, retention
from subnet_ft.evidence_stages.stage import EvidenceFolder
from subnet_ft.inputs import RunInputs
from subnet_ft.methods.saved import load_trained
from subnet_ft.stages import TrainedStage
from subnet_ft.trained_runs import TrainedRuns


class OutputEvidence:
    """Asks the models of a run.

    Args:
        inputs: The recipe with its base.
        runs: What was trained.
        folder: Where the evidence lies.
        progress: Show progress bars on stderr.
    """

    def __init__(self, inputs: RunInputs, runs: TrainedRuns, folder: EvidenceFolder, *, progress: bool) -> None:
        self.inputs = inputs
        self.runs = runs
        self.folder = folder
        self.progress = progress

    def agreement(self, records: Mapping[str, list[dict[str, Any]] | None]) -> dict[str, Agreement]:
        """Compare the outputs of base, subnetwork, controls and baselines with the full run's.

        Args:
            records: What every model answered to the held-out prompts, by name.
        """
        recipe, full = self.inputs.recipe, records.get("full")
        count = recipe.evaluation.agreement_prompts
        if not full or not count or self.inputs.has_new_head:
            return {}
        found = {}
        for name, run in self._others.items():
            own = records.get(name)
            if own:
                found[name] = self._agreement(name, run, full[:count], own[:count])
        return found

    def _agreement(
        self, name: str, run: TrainedStage | None, full: list[dict[str, Any]], own: list[dict[str, Any]]
    ) -> Agreement:
        recipe = self.inputs.recipe

        def work() -> Agreement:
            reference, tokenizer = self._loaded(self.runs.full)
            return agreement(
                reference,
                self._loaded(run)[0],
                tokenizer,
                [record["prompt"] for record in full],
                [record["completion"] for record in full],
                [record["completion"] for record in own],
                task=self.inputs.data.evaluation,
                confidence=recipe.evaluation.confidence,
                seed=recipe.seed,
                progress=self.progress,
            )

        inputs = {
            "full": self.runs.full.results["sha256"],
            "model": self._sha256(run),
            "load": self.inputs.of_loading(),
            "task": asdict(recipe.evaluation.task or recipe.task),  # how an answer is found in a completion
            "completions": json_sha256([[record["prompt"], record["completion"]] for record in [*full, *own]]),
            "confidence": recipe.evaluation.confidence,
            "seed": recipe.seed,
        }
        return self.folder.once(f"agreement/{name}", Agreement, inputs, work, version=1)

    def retention(self) -> dict[str, Retention]:
        """Judge base, full run, subnetwork, controls and baselines on what was not trained; empty if not asked for."""
        recipe, spec = self.inputs.recipe, self.inputs.recipe.evaluation.retention
        if spec is None:
            return {}
        tasks = self.inputs.retention_tasks
        paragraphs = read_paragraphs(spec.text)

        def judged(run: TrainedStage | None) -> Retention:
            base, tokenizer = self._loaded(None)
            return retention(
                base,
                None if run is None else self._loaded(run)[0],
                tokenizer,
                tasks,
                paragraphs,
                max_new_tokens=spec.max_new_tokens,
                max_tokens=spec.max_tokens,
                batch_size=recipe.evaluation.batch_size,
                confidence=recipe.evaluation.confidence,
                seed=recipe.seed,
                progress=self.progress,
            )

        inputs = {
            "base": self.inputs.base_sha256,
            "load": self.inputs.of_loading(),
            "spec": asdict(spec),
            "prompts": {
                name: json_sha256([example.prompt, example.answer] for example in task.evaluation)
                for name, task in tasks.items()
            },
            "text": json_sha256(paragraphs),
            "batch_size": recipe.evaluation.batch_size,
            "confidence": recipe.evaluation.confidence,
            "seed": recipe.seed,
        }
        runs = {"full": self.runs.full, **self._others}
        return {
            name: self.folder.once(
                f"retention/{name}", Retention, {**inputs, "model": self._sha256(run)}, partial(judged, run), version=1
            )
            for name, run in runs.items()
        }

    @property
    def _others(self) -> dict[str, TrainedStage | None]:
        """The models that are put beside the full run, by name; the base is `None`."""
        return {"base": None, "subnet": self.runs.subnet, **self.runs.controls, **self.runs.baselines}

    def _sha256(self, run: TrainedStage | None) -> str:
        return self.inputs.base_sha256 if run is None else str(run.results["sha256"])

    def _loaded(self, run: TrainedStage | None) -> tuple[Any, Any]:
        base = self.inputs.base.folder
        return load_trained(base if run is None else run.folder, base, **self.inputs.of_loading())
