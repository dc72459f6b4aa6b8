"""What the README shows must work: its commands, its recipe, its imports, its numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from delta_checkpoints import contents, save_pair
from helpers import same_bits
from transformers import AutoModelForCausalLM

import subnet_ft
from subnet_ft.cli import main
from subnet_ft.pipeline import load_checked_recipe

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"subnet-ft ([a-z]+(?: info)?)\b", README))))
def test_readme_names_commands_that_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    assert "usage: subnet-ft" in capsys.readouterr().out


def test_readme_shows_a_recipe_that_passes_every_check(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    path = tmp_path / "readme.yaml"
    path.write_text(text)
    assert load_checked_recipe(path).algorithm == "grpo"


def test_readme_imports_names_that_exist() -> None:
    for text in blocks("python"):
        (imported,) = re.findall(r"^from subnet_ft import (.*)$", text, flags=re.MULTILINE)
        assert set(imported.split(", ")) <= set(subnet_ft.__all__)
        compile(text, "README.md", "exec")


def test_readme_s_deltas_do_what_their_comments_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = (block for block in blocks("python") if "export_delta" in block)
    base, tuned = save_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    seen: list[torch.Tensor] = []
    prompts = {"input_ids": torch.ones(1, 3, dtype=torch.long), "max_new_tokens": 1}
    before = [parameter.clone() for parameter in model.parameters()]
    model.generate = lambda **_: seen.extend(parameter.clone() for parameter in model.parameters())
    names = {"model": model, "prompts": prompts}
    exec(text.replace("my/base", "base").replace("my/rl-tuned", "tuned").replace('"tuned")  #', '"new")  #'), names)
    assert contents(tmp_path / "new") == contents(tuned)
    after = AutoModelForCausalLM.from_pretrained(tuned).parameters()
    assert all(same_bits(mine, theirs) for mine, theirs in zip(seen, after, strict=True))
    assert all(same_bits(mine, theirs) for mine, theirs in zip(model.parameters(), before, strict=True))


def test_readme_table_agrees_with_the_output_it_shows() -> None:
    table, output = README[: README.index("make demo")], README[README.index("Verdict: ") :]
    for name, shown in (("base model", "base model"), ("full run", "full run"), (r"\*\*subnetwork\*\*", "subnetwork")):
        (row,) = re.findall(rf"^\| {name} \|.*$", table.partition("DPO")[0], flags=re.MULTILINE)
        accuracy = re.search(rf"^ +{shown} +\d+ / 1,000 +(\d+\.\d) %", output, flags=re.MULTILINE)
        assert accuracy is not None
        assert f"{accuracy[1]} %" in row
