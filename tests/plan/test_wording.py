from __future__ import annotations

import json
import re

from plan.recipes import loader

from subnet_ft.plan import advise, lines_for_terminal, make_plan, plan_to_dict
from subnet_ft.plan.request import Request


def test_lines_for_terminal_mark_what_is_counted_and_what_is_estimated() -> None:
    plan = make_plan(loader("tiny/grpo"), Request(prompt_tokens=30))
    text = "\n".join(lines_for_terminal(plan, {}))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "21,248 weights in bfloat16, one GPU" in " ".join(text.split())
    for row in plan.rows:
        assert row.memory is not None
    marks = {line.split()[0]: line.split()[-1] for line in text.splitlines() if line.endswith((" exact", " estimate"))}
    assert marks["weights"] == marks["moments"] == marks["mask"] == "exact"
    assert marks["activations"] == marks["logits"] == "estimate"
    assert "- Density 0.2:" in text
    assert "fits" not in text


def test_lines_for_terminal_say_what_fits_what_is_refused_and_what_fsdp2_does_not_save() -> None:
    plan = make_plan(loader("tiny/dpo"), Request(gpus=4, memory=10**9))
    text = " ".join("\n".join(lines_for_terminal(plan, {})).split())
    assert re.search(r"full run, DDP: [\d.]+ MB of 150 MB per rank: fits", text)
    assert "lora, FSDP2: refused, because adapters are not trained under FSDP2" in text
    assert "FSDP2 saves state, not traffic" in text
    assert "dense gradients would be" in text


def test_plan_to_dict_is_json_with_all_that_the_text_says() -> None:
    request = Request(memory=int(0.804e9 / 0.95), prompt_tokens=30)
    load = loader("tiny/grpo")
    plan = make_plan(load, request)
    advice = {row: advise(load, (), request, row) for row in plan.rows if row.fits is False}
    found = json.loads(json.dumps(plan_to_dict(plan, advice)))
    row = next(row for row in found["rows"] if row["method"] == "full")
    assert row["persistent_bytes"] == sum(part["bytes"] for part in row["persistent"].values())
    assert row["peak_bytes"] == row["persistent_bytes"] + row["phases"][row["peak_phase"]]["bytes"]
    assert row["fits"] is False
    assert row["advice"]
    assert {"version", "model", "density_from", "reserve", "step", "assumptions"} <= found.keys()
