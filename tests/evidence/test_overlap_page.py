"""The page, the lines and the JSON object of overlaps."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers import random_bits
from memory_checkpoint import MemoryCheckpoint

from subnet_ft.evidence.overlap import MaskOverlap, overlap_matrix
from subnet_ft.evidence.overlap_page import lines_for_terminal, summary_for_cli, write_overlaps
from subnet_ft.evidence.report import overlap_plots as plots
from subnet_ft.masks import SubnetMask

NAMES = ("grpo", "a<b>&c", "a-very-long-name-of-a-mask", "empty")


def overlaps(names: tuple[str, ...] = NAMES, *, has_base: bool = True) -> list[MaskOverlap]:
    base = {"layer.weight": (0.02 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0))).bfloat16()}
    small = base["layer.weight"].abs() < 0.02
    masks = {
        name: SubnetMask.from_dense(
            {"layer.weight": small & random_bits(2000, 0.0 if name == "empty" else 0.3 + 0.1 * seed, seed).view(40, 50)}
        )
        for seed, name in enumerate(names, 1)
    }
    return overlap_matrix(masks, MemoryCheckpoint("base", base) if has_base else None)


class Elements(HTMLParser):
    """Collects start tags, and complains about what is never closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("names", [NAMES, NAMES[:2]])
def test_write_overlaps_writes_a_page_that_needs_nothing_else(
    names: tuple[str, ...], has_base: bool, tmp_path: Path
) -> None:
    found = overlaps(names, has_base=has_base)
    files = write_overlaps(found, tmp_path / "new", version="9.9")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["overlap.html", "overlap.json", "overlap.md"]
    page = files["html"].read_text()
    elements = Elements()
    elements.feed(page)
    assert elements.open == []
    assert elements.tags.count("svg") == 4  # two drawings, each for a page and for a phone
    assert "script" not in elements.tags
    assert not re.search(r"(?:src|href)=|url\(|@import", page)
    assert "a<b>&c" not in page
    assert "a&lt;b&gt;&amp;c" in page
    assert ("The base was not given" in page) is not has_base
    assert ("Tensor by tensor" in page) is (len(names) == 2)
    assert json.loads(files["json"].read_text()) == summary_for_cli(found, "9.9")
    text = files["md"].read_text()
    assert text.count("\n| ") == 1 + 1 + len(found)
    assert r"a\<b\>&c" in text


def test_summary_for_cli_has_the_keys_that_scripts_rely_on() -> None:
    keys = {"o1", "o2", "jaccard", "uniform_o1", "uniform_o2", "magnitude_o1", "magnitude_o2", "lift", "version"}
    two = overlaps(NAMES[:2])
    summary = summary_for_cli(two, "9.9")
    assert keys <= set(summary)
    assert keys - {"version"} <= set(summary["tensors"]["layer.weight"])
    assert (summary["first"], summary["second"], summary["o1"]) == (*NAMES[:2], two[0].overall.o1)
    many = summary_for_cli(overlaps(), "9.9")
    assert set(many) == {"version", "pairs"}
    assert len(many["pairs"]) == 6
    assert keys - {"version"} <= set(many["pairs"][0])


def test_lines_for_terminal_has_one_line_per_pair_and_says_what_is_missing() -> None:
    found = overlaps()
    lines = lines_for_terminal(found)
    assert len(lines) == 1 + len(found)
    first = found[0].overall
    assert f"{first.o1 * 100:.1f} / {first.o2 * 100:.1f}" in lines[1]
    assert f"{first.magnitude_o1 * 100:.1f} / {first.magnitude_o2 * 100:.1f}" in lines[1]
    assert "not measured" in lines_for_terminal(overlaps(NAMES[:2], has_base=False))[1]


@pytest.mark.parametrize("width", [720, 340])
def test_matrix_plot_shows_both_directions_of_every_pair(width: int) -> None:
    found = overlaps()
    drawing = plots.matrix_plot(found, width)
    first = found[0].overall
    for share, null, row, column in (
        (first.o1, first.magnitude_o1, "grpo", "a&lt;b&gt;&amp;c"),
        (first.o2, first.magnitude_o2, "a&lt;b&gt;&amp;c", "grpo"),
    ):
        tip = f"{share * 100:.1f} % of {row} lies in {column}; magnitude-matched null {null * 100:.1f} %"
        assert drawing.count(f"<title>{tip}<") == 1
    assert drawing.count('class="cell"') == 4 * 3
    opacities = [float(text) for text in re.findall(r'fill-opacity="([\d.]+)"', drawing)]
    assert max(opacities) <= 0.5
    assert plots.matrix_plot([], width) is None


@pytest.mark.parametrize("width", [720, 340])
def test_nulls_plot_puts_a_ring_for_every_null_beside_each_dot(width: int) -> None:
    found = overlaps()
    drawing = plots.nulls_plot(found, width)
    drawn = [pair for pair in found if pair.overall.o1 is not None]
    assert drawing.count('class="dot m-subnet"') == len(drawn) == 6
    assert drawing.count('class="ring m-base"') == drawing.count('class="ring m-control-1"') == 6
    assert "ring m-control-1" not in plots.nulls_plot(overlaps(has_base=False), width)
    assert plots.nulls_plot(overlaps(("empty", "grpo")), width) is None
