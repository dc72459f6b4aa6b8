"""The tables, the page and the JSON of a comparison: every number where it belongs, and none that flatters."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subnet_ft.errors import TaskError
from subnet_ft.evidence.comparison import (
    CopyEvidence,
    MethodComparison,
    MethodEvidence,
    build_comparison,
    lines_for_terminal,
    summary_for_cli,
    write_comparison,
)
from subnet_ft.evidence.comparison.tables import main_table, memory_table, quantized_table, settings_table
from subnet_ft.evidence.comparison.write import render_html, render_markdown
from subnet_ft.evidence.statistics import paired_difference, wilson_interval

N = 400
ENVIRONMENT = {"gpu": None, "torch_threads": 1, "memory": 64, "packages": {"torch": "2.13.0", "peft": "0.21.2"}}
EVIL = "<script>alert('x')</script> `|*`"


def records(accuracy: float, *, prompt: str = "2 + 2 =") -> list[dict[str, Any]]:
    return [{"prompt": f"{prompt} {index}", "correct": index < round(accuracy * N)} for index in range(N)]


def evidence(method: str, accuracy: float | None, **changes: Any) -> MethodEvidence:
    results = {
        "num_trainable": 100,
        "num_parameters": 1000,
        "num_steps": 40,
        "train_seconds": 120.0,
        "step_seconds": 2.5,
        "resumed_from": None,
        "memory": {"weights": 2000, "gradients": 400, "moments": 800, "peak_rss": 9_000_000},
        "environment": ENVIRONMENT,
    }
    fields: dict[str, Any] = {
        "trains": "mask",
        "checkpoint_bytes": 2000,
        "patch_bytes": 325,
        "training": {"learning_rate": 2e-5},
        "config": {},
        "records": None if accuracy is None else records(accuracy),
    }
    fields.update({key: value for key, value in changes.items() if key in fields or key == "copies"})
    results.update({key: value for key, value in changes.items() if key in results})
    return MethodEvidence(method=method, results=results, **fields)


def comparison(*methods: MethodEvidence, base: float | None = 0.24, **fields: Any) -> MethodComparison:
    known: dict[str, Any] = {
        "version": "0.0.0",
        "base_records": None if base is None else records(base),
        "confidence": 0.95,
        "recipe": {"algorithm": "grpo", "task": {"name": "sums"}, "model": {"name": "tiny:llama"}},
        "seed": 3,
    }
    return build_comparison(methods=methods, **{**known, **fields})


def three() -> MethodComparison:
    lora = evidence(
        "lora",
        0.4,
        trains="adapter",
        num_parameters=1050,
        num_trainable=50,
        memory={"weights": 2200, "moments": 400},
        checkpoint_bytes=120,
        patch_bytes=120,
        training={"learning_rate": 2e-4, "weight_decay": 0.1},
        config={"r": 8},
        copies=[CopyEvidence("int8", records(0.39), 1100)],
    )
    return comparison(evidence("full", 0.5, num_trainable=1000), evidence("subnet", 0.51), lora)


def row(table: Any, name: str) -> dict[str, str]:
    (found,) = [cells for cells in table.rows if cells[0] == name]
    return dict(zip(table.header, found, strict=True))


def test_build_comparison_gives_every_method_its_interval_and_its_paired_differences() -> None:
    result = three()
    lora = result.methods[2].accuracy
    assert lora is not None
    assert (lora.ci_low, lora.ci_high) == wilson_interval(160, N, 0.95)
    found = result.difference("lora", "full")
    assert found is not None
    expected = paired_difference(np.arange(N) < 160, np.arange(N) < 200, confidence=0.95)
    assert (found.difference, found.low, found.high) == (expected.difference, expected.low, expected.high)
    assert result.difference("full", "full") is None
    assert {(entry.first, entry.second) for entry in result.differences} == {
        ("full", "base"), ("subnet", "base"), ("subnet", "full"), ("lora", "base"), ("lora", "full"),
    }  # fmt: skip


def test_main_table_has_every_figure_in_its_column() -> None:
    table = main_table(three())
    found = row(table, "lora")
    assert found["accuracy [95 %]"] == "40.0 % [35.3, 44.9]"
    assert found["minus full run, points"].startswith("-10.0 [")
    assert found["minus base, points"].startswith("+16.0 [")
    assert (found["trainable weights"], found["share"]) == ("50", "4.76 %")
    # Per weight of the base, so that added weights do not make the figure smaller.
    assert (found["training memory"], found["bytes per weight"]) == ("2.6 kB", "2.60")
    assert (found["time per step"], found["checkpoint"], found["beside the base"]) == ("2.5 s", "120 B", "120 B")
    assert row(table, "full run")["minus full run, points"] == "–"
    assert [cells[0] for cells in table.rows] == ["base model", "full run", "subnetwork", "lora"]


def test_main_table_without_a_full_run_has_no_column_for_it() -> None:
    assert "minus full run, points" not in main_table(comparison(evidence("lora", 0.4))).header


def test_memory_table_keeps_totals_of_the_process_out_of_the_sum() -> None:
    table = memory_table(three())
    assert row(table, "full run")["together"] == "3.2 kB"
    assert row(table, "full run")["peak RSS"] == "9 MB"
    assert row(table, "lora")["gradients"] == "–"


def test_quantized_table_compares_a_copy_with_its_own_result() -> None:
    table = quantized_table(three())
    assert table is not None
    found = row(table, "lora, int8")
    assert found["minus the result itself, points"].startswith("-1.0 [")
    assert found["size"] == "1.1 kB"
    assert quantized_table(comparison(evidence("full", 0.5))) is None


def test_settings_table_names_what_a_method_changed() -> None:
    found = row(settings_table(three()), "lora")
    assert found["learning rate"] == "0.0002"
    assert found["other settings of its own"] == "weight_decay: 0.1, r: 8"


def test_build_comparison_refuses_different_prompts() -> None:
    with pytest.raises(TaskError, match="Prompt 0 of `lora`"):
        comparison(evidence("full", 0.5), evidence("lora", 0.5, records=records(0.5, prompt="9 + 9 =")))


def test_build_comparison_without_answers_says_so() -> None:
    result = comparison(evidence("full", None), base=None)
    assert result.num_prompts == 0
    assert result.not_measured[0] == "Accuracy of base, full."
    assert row(main_table(result), "full run")["accuracy [95 %]"] == "–"
    assert "No accuracy was measured." in render_html(result)


def test_comparison_says_what_it_does_not_show() -> None:
    text = "\n".join(comparison(evidence("subnet", 0.5, resumed_from="checkpoint-20")).not_measured)
    for part in ("seed 3", "best settings", "training time of subnet", "mask", "on a GPU"):
        assert part in text
    assert "on a GPU" not in "\n".join(comparison(evidence("full", 0.5, environment={"gpu": "H100"})).not_measured)


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        ({"gpu": "H100"}, "gpu", "gpu H100 (full) and none (subnet, lora)"),
        ({"torch_threads": 2}, "torch_threads", "torch_threads 2 (full) and 1 (subnet, lora)"),
        (
            {"packages": {"torch": "2.12.0", "peft": "0.21.2"}},
            "packages.torch",
            "packages.torch 2.12.0 (full) and 2.13.0 (subnet, lora)",
        ),
    ],
)
def test_comparison_puts_no_times_of_other_conditions_beside_each_other(
    change: dict[str, Any], key: str, words: str
) -> None:
    alike = [evidence("subnet", 0.5), evidence("lora", 0.4)]
    result = comparison(evidence("full", 0.5, environment={**ENVIRONMENT, **change}), *alike)
    assert result.methods[0].environment == {**ENVIRONMENT, **change}
    assert result.methods[1].environment == ENVIRONMENT
    assert result.environment == {name: value for name, value in ENVIRONMENT.items() if name not in change} | (
        {"packages": {"peft": "0.21.2"}} if "packages" in change else {}
    )
    assert list(result.differing_conditions) == list(summary_for_cli(result)["differing_conditions"]) == [key]
    (gap,) = [gap for gap in result.not_measured if "Times and peaks" in gap]
    assert gap == f"Times and peaks of memory beside each other, as the runs had other conditions: {words}."
    for name in ("full run", "subnetwork", "lora"):
        assert row(main_table(result), name)["time per step"] == "–"
        assert row(memory_table(result), name)["peak RSS"] == "–"
        assert row(memory_table(result), name)["weights"] != "–"
    assert "2.5 s" not in render_html(result) + render_markdown(result)


def test_comparison_keeps_times_where_only_what_does_not_matter_differs() -> None:
    result = comparison(evidence("full", 0.5, environment={**ENVIRONMENT, "memory": 32}), evidence("lora", 0.4))
    assert result.differing_conditions == {}
    assert "memory" not in result.environment
    assert row(main_table(result), "lora")["time per step"] == "2.5 s"
    assert row(memory_table(result), "lora")["peak RSS"] == "9 MB"


def test_comparison_of_reward_models_speaks_of_pairs() -> None:
    pairs = [{"prompt": str(index), "correct": True, "chosen_reward": 1.0} for index in range(N)]
    result = comparison(evidence("full", None, records=pairs), base_records=pairs)
    assert result.judged_on == "pairs"
    for page in (render_html(result), render_markdown(result)):
        assert f"{N} held-out pairs" in page
        assert "reedy answers" not in page


def test_comparison_json_reads_back(tmp_path: Path) -> None:
    result = three()
    files = write_comparison(result, tmp_path)
    assert MethodComparison.from_dict(json.loads(files["json"].read_text())) == result
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "comparison.html", "comparison.json", "comparison.md",
    ]  # fmt: skip


def test_summary_for_cli_has_the_figures_scripts_read() -> None:
    summary = summary_for_cli(three())
    assert summary["base_accuracy"] == 0.24
    assert summary["methods"][2] == {
        "method": "lora", "accuracy": 0.4, "ci_low": pytest.approx(0.353, abs=1e-3),
        "ci_high": pytest.approx(0.449, abs=1e-3), "num_trainable": 50, "num_parameters": 1050,
        "memory": {"weights": 2200, "moments": 400}, "persistent_bytes": 2600, "step_seconds": 2.5,
        "train_seconds": 120.0, "checkpoint_bytes": 120, "patch_bytes": 120, "learning_rate": 2e-4,
    }  # fmt: skip
    assert summary["quantized"][0]["quantization"] == "int8"


def test_lines_for_terminal_fit_a_wide_terminal() -> None:
    lines = lines_for_terminal(three())
    assert any(line.split()[0] == "lora" and "40.0 %" in line for line in lines if line.strip())
    assert max(map(len, lines)) <= 140


class Page(HTMLParser):
    """Collects what a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_render_html_is_self_contained_and_escapes_everything() -> None:
    result = comparison(evidence("full", 0.5, config={EVIL: EVIL}), recipe={"algorithm": EVIL, "task": {"name": EVIL}})
    page = Page()
    page.feed(render_html(result))
    assert not page.links
    assert "script" not in page.tags
    assert any(EVIL in text for text in page.texts)
    assert page.tags.count("svg") == 4  # two drawings, each for a page and for a phone
    assert r"\<script\>" in render_markdown(result)
