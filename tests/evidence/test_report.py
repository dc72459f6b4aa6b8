import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from subnet_ft.errors import TaskError
from subnet_ft.evidence.agreement import Agreement
from subnet_ft.evidence.report import (
    Report,
    RunEvidence,
    build_report,
    lines_for_terminal,
    summary_for_cli,
    write_report,
)
from subnet_ft.evidence.report.html import render_html
from subnet_ft.evidence.report.markdown import render_markdown
from subnet_ft.evidence.report.tables import tests_table as three_methods
from subnet_ft.evidence.retention import Retention
from subnet_ft.evidence.weights import WeightComparison
from subnet_ft.masks import ModelRecord, Provenance, SubnetMask

N = 400
EVIL = "<script>alert('x')</script><img src=\"https://example.com/a.png\" onerror=alert(1)> `|*`"
ALWAYS = ["not-measured", "conditions"]
SECTIONS = ["accuracy", "weights", "subnetwork", "training", "cost", "samples", *ALWAYS]


def records(accuracy: float, *, swapped: int = 0, completion: str = "4", prompt: str = "2 + 2 =") -> list[dict]:
    """The first prompts solved; `swapped` solved ones traded for unsolved ones, so that accuracy stays."""
    count = round(accuracy * N)
    solved = np.arange(N) < count
    solved[count - swapped : count] = False
    solved[count : count + swapped] = True
    return [
        {
            "prompt": f"{prompt} {index}",
            "completion": completion,
            "answer": "4",
            "score": float(ok),
            "correct": bool(ok),
        }
        for index, ok in enumerate(solved)
    ]


def log(metric: str = "reward", last: float = 0.5) -> list[dict]:
    steps = [
        {"step": step, "epoch": step / 20, "loss": 0.1, metric: last * step / 20, "grad_norm": float("nan")}
        for step in range(1, 21)
    ]
    return [*steps, {"step": 20, "train_runtime": 3.0, "train_loss": 0.1}]


def weights(inside: float, overall: float, *, off_mask: int = 0) -> WeightComparison:
    keys = ["0", "1e-06", "1e-05", "0.0001"]
    return WeightComparison(
        off_mask_changed=off_mask,
        off_mask_tensors=["model.norm.weight"] if off_mask else [],
        mask_changed_share=0.625,
        in_mask_identical=dict.fromkeys(keys, inside),
        identical=dict.fromkeys(keys, overall),
        base_identical=dict.fromkeys(keys, 0.827),
        base_in_mask_identical=dict.fromkeys(keys, 0.0),
        relative_distance=0.51,
        num_parameters=1000,
        num_in_mask=173,
    )


def small_mask() -> SubnetMask:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (10, 4),
        "model.layers.0.mlp.up_proj.weight": (8, 4),
        "model.layers.1.mlp.up_proj.weight": (8, 4),
        "model.norm.weight": (4,),
    }
    return SubnetMask.from_dense(
        {name: torch.rand(shape, generator=generator) < 0.3 for name, shape in shapes.items()},
        Provenance(
            base=ModelRecord("the-base"),
            tuned=ModelRecord("runs/x/full"),
            criterion="exact",
            tolerance=0.0,
            source={"kind": "extract"},
            density_by_tolerance={"0": 0.3, "1e-05": 0.2, "0.0001": 0.1},
        ),
    )


def whole_report(**changes) -> Report:
    memory = {"weights": 2_000, "gradients": 2_000, "moments": 9_000, "peak_rss": 99_000}
    arguments = {
        "version": "0.1.0",
        "base": RunEvidence("base", records(0.30), seconds={"evaluate": 3.0}),
        "full": RunEvidence("full", records(0.55), log(), {"train": 300.0, "evaluate": 20.0}, memory),
        "subnet": RunEvidence(
            "subnet",
            records(0.55),
            log(last=0.48),
            {"train": 310.0, "evaluate": 20.0},
            {**memory, "mask": 40},
            weights(0.529, 0.918),
        ),
        "controls": [
            RunEvidence("control-uniform", records(0.40), log(last=0.3), weights=weights(0.074, 0.835)),
            RunEvidence(
                "control-magnitude_matched", records(0.55, swapped=6), log(last=0.4), weights=weights(0.219, 0.86)
            ),
        ],
        "mask": small_mask(),
        "mask_seconds": 2.0,
        "margin": 0.04,
        "recipe": {"algorithm": "grpo", "model": {"name": "a-model"}, "task": {"name": "a-task"}},
        "environment": {"torch": "2.13"},
        "seeds": [7],
    }
    return build_report(**{**arguments, **changes})


def bare_report() -> Report:
    return build_report(
        version="0.1.0",
        base=RunEvidence("base"),
        full=RunEvidence("full"),
        subnet=RunEvidence("subnet", weights=weights(0.5, 0.9)),
    )


class Page(HTMLParser):
    """Collects a page's tags and text; raises on tags that do not nest."""

    VOID = frozenset({"meta", "line", "rect", "circle", "path", "br"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID or tag in ("rect", "circle"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def sections(self) -> list[str]:
        return [attributes["id"] for tag, attributes in self.tags if tag == "section"]


@pytest.mark.parametrize(
    ("report", "sections"),
    [(whole_report(), SECTIONS), (bare_report(), ["weights", *ALWAYS])],
    ids=["whole", "bare"],
)
def test_render_html_is_self_contained_and_has_the_sections_there_is_evidence_for(report, sections):
    source = render_html(report)
    page = Page(source)
    assert page.sections() == sections
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.tags:
        assert not {"src", "xlink:href", "srcset", "data", "action"} & set(attributes)
        assert attributes.get("href", "#")[1:] in ["", *page.sections()]
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?:", source)
    assert "prefers-color-scheme: dark" in source


def test_render_html_draws_every_figure():
    page = Page(render_html(whole_report()))
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    figures = {
        "Accuracy of every model with its interval",
        "Paired difference of every run to the full run, in points",
        "Subnetwork minus every other run, in points",
        "Distance of every run to the full run",
        "Peak memory of every run, alone and the first time",
        "Share of weights equal to the full run's",
        "Density of the mask by layer and matrix kind",
        "Density by tolerance",
        "reward of every run by step",
        "Memory by component",
        "Time by stage",
    }
    assert set(labels) == figures
    assert all(labels.count(label) == 2 for label in figures)


def test_render_html_draws_loss_and_preference_accuracy_without_a_reward():
    runs = {name: RunEvidence(name, records(0.5), log("rewards/accuracies")) for name in ("full", "subnet")}
    page = Page(render_html(whole_report(controls=[], **runs)))
    text = page.text
    assert "In what share of pairs is the chosen answer preferred?" in text
    assert "Did the loss fall alike?" in text
    reward_only = Page(render_html(whole_report()))
    assert "Did the loss fall alike?" not in reward_only.text


def test_reports_escape_what_models_and_files_say():
    evil = RunEvidence("subnet", records(0.55, completion=EVIL, prompt=EVIL), log(), {EVIL: 1.0}, {EVIL: 5})
    others = {name: RunEvidence(name, records(0.4, prompt=EVIL)) for name in ("base", "full")}
    report = whole_report(
        subnet=evil, controls=[], recipe={"algorithm": EVIL}, environment={EVIL: EVIL}, not_measured=[EVIL], **others
    )
    source = render_html(report)
    page = Page(source)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "<script" not in source
    assert EVIL in page.text
    markdown = render_markdown(report)
    outside_code = re.sub(r"(`+)text\n.*?\n\1|(`+) .*? \2", "", markdown, flags=re.DOTALL)
    assert "<script" not in outside_code.replace("\\<", "")
    assert "<script" in markdown


def test_render_markdown_fences_prompts_that_hold_fences():
    entries = records(0.5, prompt="```python\nprint(1)\n```")
    runs = {name: RunEvidence(name, entries) for name in ("base", "full", "subnet")}
    assert "````text\n```python\nprint(1)\n``` 0\n````" in render_markdown(whole_report(controls=[], **runs))


@pytest.mark.parametrize(("accuracy", "verdict"), [(0.55, "recovered"), (0.35, "not_recovered"), (0.51, "undecided")])
def test_render_markdown_states_the_verdict_in_its_first_line(accuracy, verdict):
    report = whole_report(subnet=RunEvidence("subnet", records(accuracy), weights=weights(0.5, 0.9)))
    assert report.verdict == verdict
    assert render_markdown(report).splitlines()[0] == f"# Verdict: {verdict.replace('_', ' ')}"
    assert lines_for_terminal(report)[0] == f"Verdict: {verdict.replace('_', ' ')}"


def test_reports_do_not_call_a_run_recovered_that_does_nothing():
    runs = {name: RunEvidence(name, records(share)) for name, share in (("base", 0.50), ("full", 0.52))}
    report = whole_report(**runs, subnet=RunEvidence("subnet", records(0.50)), controls=[])
    assert report.verdict == "undecided"
    text = render_markdown(report)
    assert "It is not settled whether the subnetwork recovered what the full run gained." in text
    assert "the base model itself lies within it" in text
    assert "for lying within the margin to count, by more than the margin" in text


def test_reports_say_first_when_the_mask_was_broken():
    report = whole_report(subnet=RunEvidence("subnet", records(0.55), weights=weights(0.5, 0.9, off_mask=3)))
    assert render_markdown(report).splitlines()[0] == "# Verdict: recovered, but the mask was broken"
    assert "3 weights outside the mask changed" in render_markdown(report)
    page = render_html(report)
    assert "Training only the subnetwork reached" not in page
    assert '<h1 class="broken">' in page
    assert summary_for_cli(report)["off_mask_changed"] == 3


def test_reports_say_when_a_control_broke_its_mask():
    control = RunEvidence("control-uniform", records(0.40), weights=weights(0.1, 0.9, off_mask=5))
    text = render_markdown(whole_report(controls=[control]))
    assert text.splitlines()[0] == "# Verdict: recovered"
    assert "It changed 5 weights outside its mask" in text
    assert "It changed" not in render_markdown(whole_report())


def test_write_report_round_trips_through_json(tmp_path):
    report = whole_report()
    paths = write_report(report, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json", "report.md"]
    loaded = json.loads(paths["json"].read_text())
    assert Report.from_dict(loaded) == report
    assert loaded["curves"]["full"][0] == {"step": 1, "epoch": 0.05, "loss": 0.1, "reward": 0.025}
    assert len(loaded["curves"]["full"]) == 20


def test_write_report_replaces_nothing_when_one_form_fails(tmp_path, monkeypatch):
    write_report(bare_report(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(report):
        raise RuntimeError("no page")

    monkeypatch.setattr("subnet_ft.evidence.report.write.render_html", fail)
    with pytest.raises(RuntimeError, match="no page"):
        write_report(whole_report(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_build_report_states_what_no_run_measured():
    text = " ".join(bare_report().not_measured)
    for words in ("Accuracy of base, full, subnet", "Variation between seeds", "The floor", "A control", "KL", "GPU"):
        assert words in text
    whole = " ".join(whole_report(seeds=[1, 2], environment={"gpu": "H200"}, not_measured=["Extra."]).not_measured)
    assert "Variation between seeds" not in whole
    assert "GPU" not in whole
    assert "A control" not in whole
    assert whole.endswith("Extra.")


def test_build_report_puts_the_control_that_speaks_most_against_the_subnetwork_first():
    report = whole_report()
    assert report.controls == ["control-magnitude_matched", "control-uniform"]
    assert report.above_control["control-uniform"].answer == "yes"
    summary = summary_for_cli(report)
    assert summary["control"] == "control-magnitude_matched"
    assert summary["control_verdict"] == report.control_verdicts["control-magnitude_matched"].name == "recovered"
    assert summary["above_control"] == "no"
    assert "but it is not shown to be above the magnitude-matched control" in render_markdown(report)


def test_build_report_names_the_runs_that_a_mask_cost():
    text = render_markdown(whole_report())
    assert "The first subnetwork run cost both: 10 min 12 s of training and 99 kB of the process at its peak." in text
    assert "| subnetwork | full run | 10 min 12 s | 5 min 10 s | 99 kB | 99 kB | 13 kB | 120.74 |" in text


def test_build_report_gives_in_mask_identity_beside_the_base_models():
    text = render_markdown(whole_report())
    assert "Of the weights whose bits the full run changed, 52.9 % equal the full run's bit for bit" in text
    assert "| subnetwork, weights the full run changed | 52.9 % |" in text
    assert "91.8 % against the base model's own 82.7 %" in text
    assert "| magnitude-matched control | 62.5 % | 0 | 0.51 |" in text


def test_build_report_refuses_answers_to_different_prompts():
    with pytest.raises(TaskError, match="Prompt 0 of `subnet`"):
        whole_report(subnet=RunEvidence("subnet", records(0.5, prompt="3 + 3 =")))
    with pytest.raises(TaskError, match="answered 399 prompts and `base` 400"):
        whole_report(subnet=RunEvidence("subnet", records(0.5)[1:]))


def test_build_report_refuses_two_models_of_one_name():
    with pytest.raises(ValueError, match="own name"):
        whole_report(subnet=RunEvidence("full", records(0.5)))


def test_build_report_reads_conversations_as_text():
    chat = [{"role": "user", "content": "2 + 2?"}]
    entries = [{**record, "prompt": chat} for record in records(0.5)]
    report = build_report(
        version="0",
        base=RunEvidence("base", entries),
        full=RunEvidence("full", entries),
        subnet=RunEvidence("subnet", entries),
    )
    assert report.verdict == "nothing_to_recover"
    assert report.samples[0].prompt == "user: 2 + 2?"
    assert len(report.samples) == 5


def test_summary_for_cli_has_the_keys_that_scripts_rely_on():
    keys = {
        "version",
        "verdict",
        "off_mask_changed",
        "in_mask_identical",
        "identical",
        "base_identical",
        "relative_distance",
        "accuracy",
        "control_verdict",
        "above_control",
    }
    for report in (whole_report(), bare_report()):
        summary = summary_for_cli(report)
        assert keys <= set(summary)
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary_for_cli(whole_report())["accuracy"]["full"] == 0.55


def test_lines_for_terminal_aligns_its_tables():
    lines = lines_for_terminal(whole_report())
    rows = [line for line in lines if re.match(r"  (base model|full run|subnetwork|uniform control) .*/", line)]
    assert len(rows) == 4
    assert len({row.index("/") for row in rows}) == 1
    assert max(map(len, lines)) <= 120


def test_reports_say_when_a_random_mask_recovers_as_well():
    parts = {
        "base": RunEvidence("base", records=records(0.2)),
        "full": RunEvidence("full", records=records(0.6)),
        "subnet": RunEvidence("subnet", records=records(0.6)),
    }
    too = "accuracy alone does not show"
    for accuracy, said in ((0.6, True), (0.3, False)):
        control = RunEvidence("control-uniform", records=records(accuracy))
        report = build_report(version="1", **parts, controls=[control], margin=0.05)
        assert report.verdict == "recovered"
        assert (too in render_markdown(report)) is said
        assert (too in " ".join(" ".join(lines_for_terminal(report)).split())) is said


def test_build_report_speaks_of_pairs_where_reward_models_are_judged() -> None:
    def pairs(accuracy: float) -> list[dict]:
        return [{**record, "chosen_reward": 1.0, "rejected_reward": 0.0} for record in records(accuracy)]

    runs = {name: RunEvidence(name, records=pairs(share)) for name, share in (("base", 0.5), ("full", 0.8))}
    report = build_report(version="0", **runs, subnet=RunEvidence("subnet", records=pairs(0.77)))
    assert report.judged_on == "pairs"
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))).judged_on == "pairs"
    runs = {name: RunEvidence(name, records=pairs(0.8), log_history=log("accuracy")) for name in ("base", "full")}
    trained = build_report(version="0", **runs, subnet=RunEvidence("subnet", records=pairs(0.8)))
    assert "In what share of pairs does the chosen completion get more reward?" in render_html(trained)
    for page in (render_markdown(report), render_html(report), "\n".join(lines_for_terminal(report))):
        assert "pairs" in page
        assert "prompts" not in page
        assert "reedy" not in page
    assert "about " in report.verdict_reason
    assert " pairs would decide it" in report.verdict_reason


def test_build_report_speaks_of_prompts_where_answers_are_judged() -> None:
    runs = {name: RunEvidence(name, records=records(share)) for name, share in (("base", 0.5), ("full", 0.8))}
    report = build_report(version="0", **runs, subnet=RunEvidence("subnet", records=records(0.77)))
    assert report.judged_on == "prompts"
    for page in (render_markdown(report), render_html(report)):
        assert "held-out pairs" not in page
        assert "held-out prompts" in page


def test_build_report_has_mcnemar_and_a_bootstrap_beside_every_difference():
    report = whole_report()
    gain = report.difference("full", "base")
    assert gain.mcnemar_p == pytest.approx(2 * 0.5**100 - 0.5**100)  # 100 prompts, all one way, by the mid-p rule
    assert gain.bootstrap_low == pytest.approx(gain.low, abs=0.01)
    assert gain.bootstrap_high == pytest.approx(gain.high, abs=0.01)
    table = three_methods(report)
    assert table.header[2:] == ["Tango, 95 %", "bootstrap, 95 %", "McNemar, mid-p"]
    assert table.rows[0][0] == "full run minus base model"
    assert table.rows[0][4] == f"{gain.mcnemar_p:.2g}"
    assert "McNemar, mid-p" in render_markdown(report)


def test_report_says_how_much_nearer_the_subnetwork_is_prompt_by_prompt():
    def found(*kl: float) -> Agreement:
        mean = sum(kl) / 20
        return Agreement(mean, mean, mean, 0.9, 20, 0.8, 0.7, 0.9, 4, 0.95, list(kl), [5] * 4)

    control = "control-magnitude_matched"
    agreement = {"subnet": found(0.1, 0.2, 0.1, 0.4), control: found(0.3, 0.4, 0.3, 0.6)}
    texts = {
        name: Retention({}, kl, kl, kl, 10, 0.95, [5 * kl] * 2, [5] * 2)
        for name, kl in (("subnet", 0.02), (control, 0.05))
    }
    page = render_markdown(whole_report(agreement=agreement, retention=texts)).replace("\u2212", "-")
    assert "-0.0400 [-0.0400, -0.0400]" in page  # always 0.2 nearer, over 5 tokens
    assert "-0.0300 [-0.0300, -0.0300]" in page
