"""The three files of a study: every number where it belongs, every plot there, and nothing of a recipe as markup."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from study_runs import cell, mask, pair, report

from subnet_ft.studies.schema import CellResult, StudyReport, Traits
from subnet_ft.studies.tables import main_table, overlap_table, settings_table, tolerance_table
from subnet_ft.studies.wording import answers, gaps
from subnet_ft.studies.write import lines_for_terminal, render_html, render_markdown, summary_for_cli, write_study

EVIL = "<script>alert('x')</script> `|*`"


def with_words(result: StudyReport) -> StudyReport:
    return replace(result, answers=answers(result), not_measured=gaps(result))


def traits(*, on_policy: bool) -> Traits:
    return Traits(on_policy=on_policy, kl=False, online=on_policy, learns_from="prompts")


def masked(name: str, share: float, density: float, **fields: object) -> CellResult:
    group = f"at {density:g}" if "_0." in name else "x"
    return cell(name, share, versus=0.53, group=group, mask=mask(density, **fields))


OWN = cell("as_written", 0.53, changed=0.17)
RESULTS = {
    "causes": with_words(
        report(
            "causes", OWN, cell("seed", 0.52, versus=0.53, changed=0.18),
            cell("no_masters", 0.4, versus=0.53, changed=0.05, group="masters"),
        )
    ),
    "sparsity": with_words(
        report(
            "sparsity", replace(OWN, traits=traits(on_policy=True)),
            cell("dpo", 0.4, changed=0.05, traits=traits(on_policy=False)),
        )
    ),
    "overlap": with_words(
        report("overlap", OWN, cell("seed", 0.5, changed=0.2), overlaps=[pair("seed", magnitude_lift=1.2)])
    ),
    "which_mask": with_words(
        report(
            "which_mask", OWN, masked("final", 0.55, 0.17), masked("uniform", 0.5, 0.17, recall=0.17),
            masked("principal", 0.3, 0.17, verdict="not_recovered"), masked("final_0.01", 0.4, 0.01),
            masked("uniform_0.01", 0.3, 0.01), masked("final_0.001", 0.3, 0.001),
        )
    ),
    "early_mask": with_words(
        report(
            "early_mask", OWN, masked("step_1", 0.3, 0.02, step=1), masked("step_20", 0.5, 0.15, step=20),
            masked("final", 0.55, 0.17),
        )
    ),
}  # fmt: skip
PLOTS = {
    "causes": ["Share of the weights that every run changed", "Share of changed weights by tolerance"],
    "sparsity": ["Share of the weights that every run changed"],
    "overlap": [
        "Overlap of every two masks", "o1 of every pair beside its nulls",
        "Share of the weights that every run changed",
    ],
    "which_mask": [
        "Paired difference of every run, in points", "Accuracy against the density of the mask",
        "Accuracy against the share of the final mask that a mask holds",
    ],
    "early_mask": ["Recall and precision of the mask by step", "Paired difference of every run, in points"],
}  # fmt: skip


@pytest.mark.parametrize("study", RESULTS)
def test_page_has_the_plots_that_answer_the_question(study: str) -> None:
    page = render_html(RESULTS[study])
    for title in [*PLOTS[study], "Accuracy of every run with its interval"]:
        assert page.count(f'aria-label="{title}"') == 2, title  # one for a page, one for a phone
    assert RESULTS[study].question in page
    assert all(part not in page for part in ("http://", "https://", "<script", "<img", "<link"))
    for other, titles in PLOTS.items():
        if other != study:
            assert all(title not in page for title in set(titles) - set(PLOTS[study]))


@pytest.mark.parametrize("study", RESULTS)
def test_pages_are_well_formed_and_say_the_answers(study: str) -> None:
    result = RESULTS[study]

    class Parser(HTMLParser):
        stack: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "line", "rect", "circle", "path"):
                self.stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("line", "rect", "circle", "path"):
                assert self.stack.pop() == tag
            elif self.stack[-1] == tag:
                self.stack.pop()

    parser = Parser()
    parser.stack = []
    parser.feed(render_html(result))
    assert parser.stack == []
    markdown = render_markdown(result)
    assert markdown.startswith(f"# {result.question}\n")
    assert "## What this study does not show" in markdown
    assert len(result.answers) >= 1
    terminal = "\n".join(lines_for_terminal(result))
    assert result.answers[0].split(",")[0][:40] in terminal


def test_json_keys_and_the_reader_of_the_file(tmp_path: Path) -> None:
    result = RESULTS["which_mask"]
    files = write_study(result, tmp_path / "studies" / "which_mask")
    assert {path.name for path in files.values()} == {"study.json", "study.md", "study.html"}
    assert StudyReport.from_dict(json.loads(files["json"].read_text())) == result
    overlap = RESULTS["overlap"]
    assert StudyReport.from_dict(json.loads(json.dumps(overlap.to_dict()))) == overlap
    printed = summary_for_cli(result)
    assert {"version", "study", "question", "answers", "num_prompts", "base_accuracy", "cells", "overlaps"} <= set(
        printed
    )
    final = printed["cells"][1]
    assert (final["name"], final["density"], final["verdict"]) == ("final", 0.17, "recovered")
    assert final["difference_low"] < final["difference"] < final["difference_high"]
    assert summary_for_cli(overlap)["overlaps"][0]["magnitude_o1"] == pytest.approx(0.5)


def test_what_a_recipe_says_is_never_markup() -> None:
    result = replace(
        RESULTS["causes"],
        title=EVIL,
        recipe={"model": {"name": EVIL}},
        cells=[replace(found, label=EVIL, settings=[EVIL]) for found in RESULTS["causes"].cells],
        not_measured=[EVIL],
        answers=[EVIL],
    )
    page, markdown = render_html(result), render_markdown(result)
    assert "<script" not in page
    assert "<script" not in markdown.replace("\\<script", "")


def test_main_table_of_masks_has_what_they_are_judged_by() -> None:
    table = main_table(RESULTS["which_mask"])
    row = dict(zip(table.header, table.rows[3], strict=True))
    assert row["mask"] == "principal"
    assert (row["density"], row["of the final mask"], row["in the final mask"]) == ("17.00 %", "20.0 %", "30.0 %")
    assert (row["verdict"], row["of it changed"], row["distance to the full run"]) == (
        "not recovered",
        "90.0 %",
        "0.400",
    )
    assert table.rows[0][0] == "full run"


def test_main_table_of_sparsity_is_that_of_the_paper() -> None:
    table = main_table(RESULTS["sparsity"])
    row = dict(zip(table.header, table.rows[1], strict=True))
    assert (row["unchanged, exactly"], row["at 1e-8"], row["at 1e-5"]) == ("95.0 %", "95.0 %", "97.5 %")
    assert (row["on-policy"], row["KL"], row["online"], row["learns from"]) == ("no", "no", "no", "prompts")


def test_main_table_of_causes_shows_what_was_not_measured_as_such() -> None:
    result = report("causes", OWN, cell("sgd", None, failure="it diverged", data_loss=0.5))
    table = main_table(result)
    assert table.rows[1] == ["sgd", "\u2013", "\u2013", "\u2013", "\u2013", "\u2013", "0.50"]
    # A run that was judged on other prompts has an accuracy, and no difference.
    assert main_table(report("overlap", OWN, cell("data", 0.4))).rows[1][4] == "\u2013"


def test_other_tables() -> None:
    overlaps = overlap_table(RESULTS["overlap"])
    assert overlaps is not None
    assert overlaps.rows == [
        ["as written / seed", "60.0 %", "60.0 %", "40.0 % / 40.0 %", "50.0 % / 50.0 %", "1.50", "1.20"]
    ]
    curve = tolerance_table(RESULTS["causes"])
    assert curve is not None
    assert curve.rows[0] == ["as written", "17.00 %", "17.00 %", "8.50 %"]
    assert tolerance_table(RESULTS["which_mask"]) is not None  # the full run's own
    assert settings_table(RESULTS["causes"]).rows[0][-1] == "as written"


def test_recall_stands_beside_the_magnitude_matched_null() -> None:
    early = report("early_mask", OWN, masked("step_1", 0.3, 0.02, step=1, magnitude_recall=0.123))
    table = main_table(early)
    assert dict(zip(table.header, table.rows[1], strict=True))["matched on magnitude"] == "12.3 %"
    page = render_html(early)
    assert "step 1, recall matched on magnitude: 12.3" in page
    assert "recall of a mask matched on magnitude" in page
    assert summary_for_cli(early)["cells"][1]["magnitude_recall"] == 0.123
