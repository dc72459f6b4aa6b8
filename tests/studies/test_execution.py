"""Studies as they run: every cell once, resumed where they stopped, every figure that of its own run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from study_runs import SHORT, study_of

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.errors import NonFiniteGradientError
from subnet_ft.evidence.overlap import mask_overlap
from subnet_ft.masks import SubnetMask, extract
from subnet_ft.pipeline import Pipeline, load_checked_recipe
from subnet_ft.studies.execution import Study
from subnet_ft.studies.plan import Plan
from subnet_ft.studies.plans import plan_study
from subnet_ft.studies.schema import StudyReport
from subnet_ft.training import train

CAUSES = ["seed", "kl_on", "data_reworded", "steps_quarter", "sgd_1x", "float32"]
MASKS = ["final", "magnitude_matched", "inverted", "predicted", "early", "final_0.01", "uniform_0.001"]


@pytest.fixture(scope="module")
def causes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyReport]:
    folder = tmp_path_factory.mktemp("causes") / "run"
    return folder, study_of("causes", folder, only=CAUSES).run()


@pytest.fixture(scope="module")
def which(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyReport]:
    folder = tmp_path_factory.mktemp("which") / "run"
    return folder, study_of("which_mask", folder, only=MASKS).run()


def test_study_measures_every_cell_by_its_own_run(causes: tuple[Path, StudyReport]) -> None:
    folder, report = causes
    by_name = {cell.name: cell for cell in report.cells}
    assert set(by_name) == {"as_written", "data_own_samples", *CAUSES}
    assert by_name["steps_quarter"].num_steps == 2
    assert {by_name[name].num_steps for name in ("as_written", "kl_on", "data_reworded")} == {8}
    places = {
        "as_written": folder / "full",
        "seed": folder / "seed-1" / "full",
        "kl_on": folder / "studies" / "causes" / "kl_on" / "full",
    }
    for name, place in places.items():
        assert by_name[name].changed == extract("tiny:llama", place).provenance.density_by_tolerance
    # SGD at AdamW's rate moves next to nothing, float32 everything that has a gradient.
    assert by_name["sgd_1x"].changed["0"] < 0.1 < 0.9 < by_name["float32"].changed["0"]
    assert by_name["as_written"].reward is not None
    assert by_name["data_reworded"].reward is None
    assert by_name["data_reworded"].data_loss != by_name["data_own_samples"].data_loss
    assert (by_name["seed"].seed, by_name["kl_on"].seed) == (1, 0)


def test_study_pairs_a_cell_with_the_one_it_is_compared_with(causes: tuple[Path, StudyReport]) -> None:
    folder, report = causes
    cell = report.cell("kl_on")
    assert cell is not None
    assert cell.difference is not None
    assert (cell.difference.first, cell.difference.second) == ("kl_on", "as_written")
    ours, theirs = (
        json.loads(path.read_text())
        for path in (
            folder / "studies/causes/kl_on/evaluation/full/records.json",
            folder / "evaluation/full/records.json",
        )
    )
    expected = sum(a["correct"] - b["correct"] for a, b in zip(ours, theirs, strict=True)) / len(ours)
    assert cell.difference.difference == pytest.approx(expected)
    far = report.cell("data_reworded")
    assert far is not None
    assert far.difference is not None
    assert far.difference.second == "data_own_samples"


def test_study_does_nothing_twice(causes: tuple[Path, StudyReport], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, report = causes

    def fail(*args: Any, **keywords: Any) -> Any:
        raise AssertionError("a finished cell was repeated")

    for name in ("pipeline.train", "pipeline.judge", "studies.measures.extract", "studies.measures.completion_loss"):
        monkeypatch.setattr(f"subnet_ft.{name}", fail)
    assert study_of("causes", folder, only=CAUSES).run() == report


def test_study_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def counted(*args: Any, folder: Path, **keywords: Any) -> Any:
        trained.append(folder.relative_to(tmp_path).as_posix())
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(*args, folder=folder, **keywords)

    monkeypatch.setattr("subnet_ft.pipeline.train", counted)
    only = ["seed", "kl_on", "clipping_off"]
    with pytest.raises(KeyboardInterrupt):
        study_of("causes", tmp_path, only=only).run()
    assert trained == ["full", "seed-1/full", "studies/causes/kl_on/full"]
    report = study_of("causes", tmp_path, only=only).run()
    assert trained[3:] == ["studies/causes/kl_on/full", "studies/causes/clipping_off/full"]
    assert [cell.name for cell in report.cells] == ["as_written", *only]


def test_study_shares_the_full_run_with_a_run(
    causes: tuple[Path, StudyReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = causes
    trained: list[str] = []
    monkeypatch.setattr("subnet_ft.pipeline.train", lambda *_, folder, **__: trained.append(folder.name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Pipeline(load_checked_recipe("tiny/grpo", [*SHORT, f"output={folder}"])).run()
    assert trained == ["subnet"]


def test_study_records_a_cell_that_diverges_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(*args: Any, folder: Path, **keywords: Any) -> Any:
        if "kl_on" in folder.as_posix():
            raise NonFiniteGradientError("step 3: NaN")
        return train(*args, folder=folder, **keywords)

    monkeypatch.setattr("subnet_ft.pipeline.train", diverging)
    report = study_of("causes", tmp_path, only=["kl_on", "clipping_off"]).run()
    cell = report.cell("kl_on")
    assert cell is not None
    assert (cell.failure, cell.accuracy, cell.changed) == ("it diverged: step 3: NaN", None, {})
    assert report.cell("clipping_off") is not None
    assert any("`KL on`: it diverged" in gap for gap in report.not_measured)


def test_which_mask_trains_each_mask_and_puts_it_beside_the_final_one(which: tuple[Path, StudyReport]) -> None:
    folder, report = which
    final = SubnetMask.load(folder / "mask.subnet.safetensors")
    by_name = {cell.name: cell for cell in report.cells}
    assert by_name["as_written"].mask is None
    for name in ("final", "magnitude_matched", "inverted", "predicted", "final_0.01", "uniform_0.001"):
        cell = by_name[name]
        assert cell.mask is not None
        assert cell.num_trainable == cell.mask.num_trainable
        assert 0 < cell.mask.changed_share <= 1  # type: ignore[operator]
        assert cell.difference is not None
        assert cell.difference.second == "as_written"
    masks = {name: cell.mask for name, cell in by_name.items() if cell.mask is not None}
    assert (masks["final"].recall, masks["final"].precision) == (1.0, 1.0)
    assert masks["inverted"].recall == 0.0
    for name in ("magnitude_matched", "inverted"):
        assert masks[name].num_trainable == final.num_trainable
    predicted = SubnetMask.load(folder / "studies/masks/predicted-mask.subnet.safetensors")
    assert masks["predicted"].recall == pytest.approx((final & predicted).num_trainable / final.num_trainable)
    assert masks["predicted"].density == pytest.approx(final.density, rel=0.01)


def test_which_mask_thins_the_final_mask_and_controls_of_it(which: tuple[Path, StudyReport]) -> None:
    _, report = which
    thinned, control = (report.cell(name) for name in ("final_0.01", "uniform_0.001"))
    assert thinned is not None
    assert control is not None
    assert thinned.mask is not None
    assert control.mask is not None
    assert thinned.mask.precision == 1.0
    # Kept at random, so within four standard deviations of 1 % and 0.1 % of 21,248 weights.
    assert thinned.mask.num_trainable == pytest.approx(212, abs=4 * 212**0.5)
    assert control.mask.num_trainable == pytest.approx(21, abs=4 * 21**0.5)


def test_early_mask_says_how_much_of_the_final_mask_is_known(tmp_path: Path) -> None:
    report = study_of("early_mask", tmp_path, "subnet.source.tolerance=0.002").run()
    early = {cell.mask.step: cell.mask for cell in report.cells if cell.mask is not None and cell.mask.step}
    assert sorted(early) == [1, 2, 4]
    final = SubnetMask.load(tmp_path / "mask.subnet.safetensors")
    known = extract("tiny:llama", tmp_path / "probe-4", criterion="absolute", tolerance=0.002)
    assert early[4].recall == pytest.approx((known & final).num_trainable / final.num_trainable)
    assert early[4].precision == pytest.approx((known & final).num_trainable / known.num_trainable)
    null = mask_overlap(final, known, base=open_checkpoint("tiny:llama")).overall.magnitude_o1
    assert early[4].magnitude_recall == pytest.approx(null)
    # One step of 1e-3 stays below the tolerance: that is a result, not an error.
    first = report.cell("step_1")
    assert first is not None
    assert (first.num_steps, first.accuracy, early[1].density) == (0, None, 0.0)
    assert first.failure == "its mask is empty: nothing had changed by then"


def test_overlap_compares_masks_by_the_criterion_of_the_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    plan = plan_study("overlap", "tiny/grpo", [*SHORT, f"output={folder}", "task.pairs.num_prompts=100"])
    report = Study(plan.only(["seed", "seed_and_data", "dpo"])).run()
    assert [(pair.first, pair.second) for pair in report.overlaps][:3] == [
        ("as_written", "seed"), ("as_written", "seed_and_data"), ("as_written", "dpo"),
    ]  # fmt: skip
    first, second = (
        extract("tiny:llama", folder / place, criterion="absolute", tolerance=0.004)
        for place in ("full", "studies/overlap/dpo/full")
    )
    pair = report.overlaps[2].overall
    assert pair.o1 == pytest.approx((first & second).num_trainable / first.num_trainable)
    assert pair.uniform_o1 == pytest.approx(second.density)
    assert pair.magnitude_o1 is not None
    # The same held-out prompts are paired, those of other data are not.
    paired = {cell.name: cell.difference is not None for cell in report.cells}
    assert paired == {"as_written": False, "seed": True, "seed_and_data": False, "dpo": True}


def test_sparsity_runs_every_recipe_with_its_own_settings(tmp_path: Path) -> None:
    plan: Plan = plan_study("sparsity", "tiny/grpo", ["training.max_steps=2", f"output={tmp_path}"])
    report = Study(plan.only(["sft"])).run()
    own, sft = report.cells
    assert (own.algorithm, sft.algorithm) == ("grpo", "sft")
    assert sft.traits is not None
    assert not sft.traits.on_policy
    assert sft.changed == extract("tiny:llama", tmp_path / "studies/sparsity/sft/full").provenance.density_by_tolerance


def test_study_whose_own_full_run_diverges_says_so(tmp_path: Path) -> None:
    study = study_of("which_mask", tmp_path, "training.learning_rate=1e30", only=["uniform"])
    with pytest.raises(NonFiniteGradientError, match="own full run diverged, and the study `which_mask` compares"):
        study.run()
