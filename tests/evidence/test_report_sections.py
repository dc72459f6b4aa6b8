"""Sections of a report: what is there with all evidence, what is missing without some, and the forms they take."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from report_evidence import FIGURES, full_report, made_up_mask

from subnet_ft.evidence.report import Report, RunEvidence, build_report, lines_for_terminal, summary_for_cli
from subnet_ft.evidence.report.html import render_html
from subnet_ft.evidence.report.markdown import render_markdown
from subnet_ft.evidence.report.sections import sections_of
from subnet_ft.evidence.report.wording import cost_sentence, label, percent, the
from subnet_ft.masks import Provenance

FULL = full_report()


def figures(report: Report) -> list[str]:
    return [figure.id for section in sections_of(report) for figure in section.figures]


def answers(report: Report) -> dict[str, str]:
    return {figure.id: figure.answer for section in sections_of(report) for figure in section.figures}


def with_mask(source: dict[str, Any], *, recipe_kind: str = "extract", **changes: Any) -> Report:
    """Rebuild the report with a mask of another origin."""
    mask = made_up_mask()
    origin = Provenance(base=mask.provenance.base, source=source)
    return full_report(
        mask=type(mask)(mask.tensors, origin), recipe={"subnet": {"source": {"kind": recipe_kind}}}, **changes
    )


def test_sections_of_a_report_with_all_evidence_has_every_figure() -> None:
    assert figures(FULL) == FIGURES
    for section in sections_of(FULL):
        for figure in section.figures:
            assert figure.question.endswith("?")
            assert figure.answer.endswith(".")
            assert figure.draw is not None or figure.panels


@pytest.mark.parametrize(
    ("missing", "section", "said"),
    [
        ({"overlaps": ()}, "overlap", "What the mask shares with others"),
        ({"structure": None}, "structure", "clusters in rows, columns or heads"),
        ({"spectra": None}, "spectra", "no matrix was decomposed"),
        ({"dynamics": {}}, "dynamics", "no snapshots were taken"),
        ({"agreement": {}}, "agreement", "output distributions (KL)"),
        ({"retention": {}}, "retention", "What the models keep of the base"),
        ({"floor": None}, "floor", "The floor: how far two full runs"),
        ({"scatter": None}, "scatter", "Weight by weight"),
        ({"seeds_summary": (), "seeds": [0]}, "seeds", "Variation between seeds: every run has seed 0"),
        ({"seeds_summary": ()}, "seeds", "anything but the full run: every verdict is that of seed 0"),
        ({"mask": None}, "subnetwork", "The mask: none was given"),
    ],
)
def test_sections_of_a_report_without_a_piece_leave_it_out_and_say_so(
    missing: dict[str, Any], section: str, said: str
) -> None:
    report = full_report(**missing)
    found = [entry.id for entry in sections_of(report)]
    assert found == [entry.id for entry in sections_of(FULL) if entry.id != section]
    assert said in " ".join(report.not_measured)
    assert said not in " ".join(FULL.not_measured)
    page = render_html(report)
    assert f'<section id="{section}">' not in page
    assert f'href="#{section}"' not in page
    assert said in page


def test_render_markdown_has_every_question_with_its_answer_and_numbers() -> None:
    text = render_markdown(FULL)
    assert text.splitlines()[0] == "# Verdict: undecided"
    for section in sections_of(FULL):
        assert f"\n## {section.title}\n" in text
        for figure in section.figures:
            assert f"**{figure.question}**" in text
    assert "| 99 % energy |" in text
    assert "| LoRA | " in text
    assert len(text) < 40_000


def test_lines_for_terminal_has_the_answers() -> None:
    lines = lines_for_terminal(FULL)
    text = " ".join(" ".join(lines).split())
    assert lines[0] == "Verdict: undecided"
    for start in ("Several seeds. Over 3 seeds the subnetwork is", "The floor. Two full runs with seeds 0 and 1."):
        assert start in text
    assert FULL.seeds_summary[0].reason in answers(FULL)["seeds-differences"]
    for figure in (
        "seeds-differences",
        "overlap-nulls",
        "spectra-energy",
        "dynamics-mask",
        "retention-text",
        "structure-spread",
    ):
        assert answers(FULL)[figure] in text
    assert max(map(len, lines)) <= 120


def test_summary_for_cli_has_the_figures_of_further_evidence() -> None:
    summary = json.loads(json.dumps(summary_for_cli(FULL), allow_nan=False))
    assert summary["seeds"] == {"subnet": "recovered", "control-uniform": "not_recovered"}
    assert summary["kl_to_full"]["subnet"] == pytest.approx(0.0448)
    assert summary["same_completion"]["base"] == 0.30
    assert summary["retention"]["base"]["kl_to_base"] is None
    assert set(summary["retention"]["lora"]["accuracy"]) == {
        "reasoning_gym/simple_equations",
        "reasoning_gym/letter_counting",
    }
    assert summary["floor"]["relative_distance"] == pytest.approx(0.7)
    assert summary["costs"]["subnet"]["needs"] == "full"
    assert summary["costs"]["lora"]["needs"] is None


def test_answers_have_the_numbers_of_the_evidence() -> None:
    found = answers(FULL)
    assert "17.4 % of their weights at a tolerance of 0 and in 5.0 % at 0.0001" in found["mask-tolerance"]
    assert "99.8 % in the subnetwork" in found["scatter-changes"]
    assert "rows 3.4 (magnitude-matched control 2.2)" in found["structure-spread"]
    assert "takes 68.0 % of the singular values (control 83.0 %)" in found["spectra-energy"]
    assert "Half of the full run’s final mask had changed by step 20 of 40" in found["dynamics-mask"]
    assert "35.0 % of the second one’s have its bits" in found["floor-shared"]
    assert "a full run with another seed ended at 0.70" in found["weights-distance"]
    # Another run's mask is told of before a control, which lies at its null by construction.
    assert found["overlap-nulls"].startswith(
        "71.0 % of the mask of the subnetwork lies in that of the subnetwork, seed 1"
    )


def test_every_form_of_a_report_has_a_line_on_the_delta_where_there_is_one() -> None:
    line = (
        "Delta: the subnetwork as a patch of its base takes 62.7 MB, 23.3 % of the dense checkpoint (269 MB), with a "
        "value for 17.4 % of the weights."
    )
    assert sections_of(FULL)[-1].notes == [line]
    assert line in render_markdown(FULL)
    assert line.replace(" %", "\u00a0%") in render_html(FULL)
    older = {key: value for key, value in FULL.to_dict().items() if key != "delta"}
    without = Report.from_dict(older)
    assert without.delta is None
    for text in (render_markdown(without), render_html(without)):
        assert "Delta:" not in text


def test_cost_sentence_says_from_which_run_on_memory_is_saved() -> None:
    assert "Memory is saved from the second run on: 4.9 GB became 4.4 GB." in str(cost_sentence(FULL))
    probe = RunEvidence("probe", seconds={"train": 8.0}, memory={"weights": 10, "peak_rss": 4_800_000_000})
    early = str(cost_sentence(with_mask({"kind": "early", "step": 3}, recipe_kind="early", probe=probe)))
    assert "made from a few steps of the full run’s method" in early
    assert "2 min 01 s of training and 4.8 GB of the process at its peak" in early
    assert "from the second run on" in early
    low = str(cost_sentence(with_mask({"kind": "low_magnitude"}, recipe_kind="low_magnitude")))
    assert low.startswith("The mask was made from the base alone")
    assert "Memory is saved from the first run on" in low
    borrowed = with_mask({"kind": "extract"}, recipe_kind="file")
    assert "came from elsewhere" in str(cost_sentence(borrowed))
    assert "What the mask cost: it came from elsewhere." in borrowed.not_measured


def test_cost_sentence_claims_no_saving_that_was_not_measured() -> None:
    costs = [replace(cost, peak_bytes=4_900_000_000) if cost.run == "subnet" else cost for cost in FULL.costs]
    assert "no memory was saved" in str(cost_sentence(replace(FULL, costs=costs)))
    unknown = with_mask({"kind": "early"}, recipe_kind="early")
    assert "the first time this is no saving" in str(cost_sentence(unknown))
    assert "Memory is saved" not in str(cost_sentence(unknown))
    assert "What the first steps cost from which the mask was made." in unknown.not_measured


def with_ranks(own: float, control: float | None) -> Report:
    spectra = FULL.spectra
    assert spectra is not None
    matrices = [
        replace(
            entry,
            rank_share=own,
            control=None if control is None or entry.control is None else replace(entry.control, rank_share=control),
        )
        for entry in spectra.matrices
    ]
    return full_report(spectra=replace(spectra, matrices=matrices))


@pytest.mark.parametrize(
    ("own", "control", "said"),
    [
        (0.997, 0.996, "(control 99.6 %), so it is what as many changes in other places give, too. 99 %"),
        (0.3, 0.99, "(control 99.0 %), so it is lower than as many changes in other places give. 99 %"),
        (0.9, 0.5, "(control 50.0 %), so it is higher than as many changes in other places give. 99 %"),
        (0.9, None, "(control not measured). 99 %"),
    ],
)
def test_spectra_say_of_the_rank_what_the_control_shows(own: float, control: float | None, said: str) -> None:
    assert said in answers(with_ranks(own, control))["spectra-energy"]


def test_spectra_name_what_was_left_out_and_why() -> None:
    spectra = FULL.spectra
    assert spectra is not None
    skipped = {"conv.weight": "has 4 axes", **{f"nan.{place}": "holds NaN or infinite weights" for place in range(6)}}
    first, *others = spectra.matrices
    still = replace(first, profile=[])
    report = full_report(spectra=replace(spectra, matrices=[still, *others], skipped=skipped, sampled=False))
    (section,) = (entry for entry in sections_of(report) if entry.id == "spectra")
    assert "of every matrix but those named below" in section.figures[0].caption
    assert section.notes == [
        "Left out: `conv.weight` (has 4 axes); `nan.0`, `nan.1`, `nan.2`, `nan.3` and 2 more (holds NaN or infinite "
        "weights).",
        f"Left out, as nothing in them changed: `{first.name}`.",
    ]
    assert "has 4 axes" in render_markdown(report)
    (whole,) = (entry for entry in sections_of(FULL) if entry.id == "spectra")
    assert whole.notes == []


def test_build_report_says_when_no_matrix_could_be_decomposed() -> None:
    spectra = FULL.spectra
    assert spectra is not None
    report = full_report(spectra=replace(spectra, matrices=[], skipped={"conv.weight": "has 4 axes"}))
    assert "The rank of the update: not decomposed were `conv.weight` (has 4 axes)." in report.not_measured
    assert "spectra" not in [section.id for section in sections_of(report)]
    still = replace(spectra, matrices=[replace(entry, profile=[]) for entry in spectra.matrices])
    assert "The rank of the update: it changed none." in full_report(spectra=still).not_measured
    structure = FULL.structure
    assert structure is not None
    flat = full_report(structure=replace(structure, by_kind={}))
    assert "Whether the mask clusters in rows, columns or heads: it has no matrix." in flat.not_measured


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (-0.5, "-50.0 %"),
        (-1.0, "-100 %"),
        (-0.00004, "> -0.1 %"),
        (-0.99996, "< -99.9 %"),
        (0.00004, "< 0.1 %"),
        (0.99996, "> 99.9 %"),
        (1.5, "150.0 %"),
        (0.0, "0 %"),
        (None, "not measured"),
    ],
)
def test_percent_keeps_what_lies_below_zero(share: float | None, said: str) -> None:
    assert percent(share) == said


def test_overlap_says_which_masks_share_less_than_the_null() -> None:
    first, *others = FULL.overlaps
    below = replace(first, overall=replace(first.overall, excess=-0.5))
    report = full_report(overlaps=[below, *others])
    assert "share less than that null: an excess of -50.0 %" in answers(report)["overlap-matrix"]
    assert "share less" not in answers(FULL)["overlap-matrix"]
    assert "| -50.0 % |" in render_markdown(report)


def test_dynamics_of_a_first_snapshot_without_changes_are_measured() -> None:
    found = FULL.dynamics["full"]
    rest = len(found.steps) - 1
    unchanged = replace(found, recall=[0.0, *found.recall[1:]], coverage=[None, *found.coverage[1:]])
    answer = answers(full_report(dynamics={"full": unchanged}))["dynamics-mask"]
    assert answer.endswith("At the first snapshot, step 4, nothing had changed yet.")
    empty = replace(found, recall=[None] * (rest + 1), coverage=[0.0] * rest + [None])
    report = full_report(dynamics={"full": empty})
    assert answers(report)["dynamics-mask"].startswith("At the end no weight of the full run differs, so it has no")
    (figure,) = (
        figure for section in sections_of(report) for figure in section.figures if figure.id == "dynamics-mask"
    )
    assert figure.table is not None
    assert not [cell for row in figure.table.rows for cell in row if cell == "not measured"]
    assert render_html(report)


def test_outputs_of_one_text_have_no_interval() -> None:
    agree = {name: replace(entry, kl_low=None, kl_high=None) for name, entry in FULL.agreement.items()}
    keep = {name: replace(entry, kl_low=None, kl_high=None) for name, entry in FULL.retention.items()}
    report = full_report(agreement=agree, retention=keep)
    found = {figure.id: figure for section in sections_of(report) for figure in section.figures}
    for figure, over in ((found["agreement-distribution"], "prompts"), (found["retention-text"], "paragraphs")):
        assert f"there is no interval over {over}, as there was only one" in figure.caption
        assert "[no interval]" in str(figure.table)
        assert figure.draw is not None
        assert figure.draw(720.0)
    assert (
        "bootstrap over paragraphs" in {f.id: f for s in sections_of(FULL) for f in s.figures}["retention-text"].caption
    )


def on_device(name: str, size: int | None) -> RunEvidence:
    memory = {"weights": 10, **({} if size is None else {"peak_device": size})}
    return RunEvidence(name, seconds={"train": 100.0}, memory=memory)


def test_cost_says_whose_peaks_it_shows() -> None:
    device = full_report(full=on_device("full", 9_000_000), subnet=on_device("subnet", 7_000_000), controls=[])
    assert "9 MB of the device at its peak" in str(cost_sentence(device))
    assert "Peak memory by one measure" in " ".join(device.not_measured), "LoRA's is of the process"
    (figure,) = (figure for section in sections_of(device) for figure in section.figures if figure.id == "cost-way")
    assert "on the device" in figure.caption
    assert "in the table only" in figure.caption
    assert figure.draw is not None
    assert figure.table is not None
    assert "LoRA" not in str(figure.draw(720.0))
    assert [row[5] for row in figure.table.rows] == [
        "9 MB of the device",
        "7 MB of the device",
        "4.31 GB of the process",
    ]


def test_cost_sentence_compares_no_peak_of_the_device_with_one_of_the_process() -> None:
    mixed = full_report(subnet=on_device("subnet", 7_000_000))
    assert "Memory is saved" not in str(cost_sentence(mixed))
    assert "of the device, the full run’s of the process" in str(cost_sentence(mixed))


def test_build_report_says_of_which_runs_no_peak_was_measured() -> None:
    report = full_report(subnet=on_device("subnet", None), full=on_device("full", None))
    assert "Peak memory of full, subnet in training." in report.not_measured
    assert not [line for line in FULL.not_measured if line.startswith("Peak memory")]


def test_build_report_takes_the_last_part_of_a_resumed_run_for_no_whole_time() -> None:
    report = full_report(full=RunEvidence("full", seconds={"train": 3.0}, resumed_from="checkpoint-20"))
    costs = {cost.run: cost for cost in report.costs}
    assert costs["full"].train_seconds is costs["subnet"].first_seconds is None
    assert costs["subnet"].train_seconds == pytest.approx(112.7)
    probe = RunEvidence("probe", seconds={"train": 8.0}, resumed_from="checkpoint-1")
    early = with_mask({"kind": "early", "step": 3}, recipe_kind="early", probe=probe)
    assert "this is no saving" in str(cost_sentence(early))
    (figure,) = (figure for section in sections_of(report) for figure in section.figures if figure.id == "cost-time")
    assert "from there on only: full run." in figure.caption


def test_build_report_counts_the_cost_of_every_run_with_what_it_needs() -> None:
    costs = {cost.run: cost for cost in FULL.costs}
    assert list(costs) == ["full", "subnet", "control-uniform", "control-magnitude_matched", "lora"]
    assert [cost.needs for cost in costs.values()] == [None, "full", "full", "full", None]
    assert costs["subnet"].first_seconds == pytest.approx(112.7 + 112.7 + 0.3)
    assert costs["full"].bytes_per_weight == pytest.approx(18.1, abs=0.1)


def test_build_report_compares_what_models_keep_prompt_by_prompt() -> None:
    pairs = {(gap.first, gap.second) for gap in FULL.retention_differences}
    assert {("subnet", "base"), ("subnet", "full"), ("subnet", "lora"), ("full", "base")} <= pairs
    assert ("full", "lora") not in pairs


def test_label_says_what_people_call_models() -> None:
    names = {"base": "base model", "lora": "LoRA", "seed-1/subnet": "subnetwork, seed 1"}
    assert {name: label(FULL, name) for name in names} == names
    assert label(FULL, "control-magnitude_matched") == "magnitude-matched control"
    assert label(FULL, "control-low_magnitude") == "low-magnitude control"
    assert (the(FULL, "full"), the(FULL, "lora")) == ("the full run", "LoRA")


def test_render_html_says_in_every_drawing_what_it_shows() -> None:
    page = render_html(FULL)
    drawings = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 2 * (len(FIGURES) - 1) + 3
    for drawing in drawings:
        title = re.search(r'aria-label="([^"]+)"><title>([^<]+)</title><desc>([^<]+)</desc>', drawing)
        assert title is not None
        assert title[1] == title[2]
    assert "subnetwork: 56.5 %, 51.6 to 61.3 %" in drawings[0]


def test_sections_of_a_report_without_anything_are_none() -> None:
    runs = {name: RunEvidence(name) for name in ("base", "full", "subnet")}
    report = build_report(version="0", **runs)
    assert sections_of(report) == []
    assert len(report.not_measured) > 12
    assert "nothing_to_recover" not in render_html(report)
