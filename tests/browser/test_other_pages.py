"""The pages of comparisons, overlaps and studies, which share their drawings and their style with reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import study_runs
from browser_pages import Scheme, opened, problems, unfold
from playwright.sync_api import Browser
from report_evidence import made_up_overlaps, made_up_records

from subnet_ft.evidence.comparison import CopyEvidence, MethodEvidence, build_comparison, write_comparison
from subnet_ft.evidence.overlap_page import write_overlaps
from subnet_ft.studies.write import write_study

pytestmark = pytest.mark.browser


def comparison_page(folder: Path) -> Path:
    results = {
        "num_trainable": 23_392_471,
        "num_parameters": 134_515_008,
        "num_steps": 40,
        "train_seconds": 112.0,
        "step_seconds": 2.7,
        "resumed_from": None,
        "environment": {"gpu": None},
        "memory": {"weights": 269_000_000, "gradients": 93_600_000, "moments": 187_000_000, "peak_rss": 4_400_000_000},
    }
    names = {"full": "full", "subnet": "subnet", "trainable_tokens": "control-uniform", "lora": "lora"}
    methods = [
        MethodEvidence(
            method=method,
            trains="adapter" if method == "lora" else "mask",
            results=results,
            checkpoint_bytes=269_000_000,
            patch_bytes=64_000_000,
            training={"learning_rate": 2e-5},
            config={},
            records=made_up_records(name),
            copies=[CopyEvidence("int8", made_up_records(name), 140_000_000)],
        )
        for method, name in names.items()
    ]
    comparison = build_comparison(
        version="0.1.0",
        base_records=made_up_records("base"),
        methods=methods,
        confidence=0.95,
        recipe={"algorithm": "grpo", "task": {"name": "reasoning_gym/basic_arithmetic"}},
        seed=0,
    )
    return write_comparison(comparison, folder)["html"]


def overlap_page(folder: Path) -> Path:
    return write_overlaps(made_up_overlaps(), folder, version="0.1.0")["html"]


def study_page(folder: Path) -> Path:
    names = ["subnet", "control-uniform", "control-magnitude_matched", "seed-1/subnet"]
    cells = [
        study_runs.cell(name, 0.4 + 0.03 * number, versus=0.5, changed=0.2, mask=study_runs.mask(0.1 + 0.02 * number))
        for number, name in enumerate(names)
    ]
    written = study_runs.cell("as_written", 0.5, changed=0.17)
    report = study_runs.report("which_mask", written, *cells, overlaps=made_up_overlaps())
    return write_study(report, folder)["html"]


PAGES = {"comparison": comparison_page, "overlap": overlap_page, "study": study_page}


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1440, "light")])
def test_page_is_legible(
    chromium: Browser, screenshots: Path, tmp_path: Path, name: str, width: int, scheme: Scheme
) -> None:
    with opened(chromium, PAGES[name](tmp_path), width, scheme) as page:
        page.screenshot(path=screenshots / f"{name}-{width}-{scheme}.png", full_page=True)
        unfold(page)
        assert problems(page) == []
