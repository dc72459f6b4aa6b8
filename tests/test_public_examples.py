"""Public scripts with the lines that docs/integrations.md changes: they run, and train the mask and nothing else."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from subnet_ft import SubnetMask, extract
from subnet_ft.checkpoints.tiny import save_tiny, tiny_model

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "integrations.md").read_text(encoding="utf-8")
MOST_LINES = 3


class Diff(NamedTuple):
    """A diff of the page: a file, and hunks of lines whose first character is ` `, `-` or `+`."""

    path: str
    hunks: list[list[str]]

    @property
    def num_changed(self) -> int:
        """Lines that a user types or deletes; a line that replaces another counts once."""
        lines = [line[0] for hunk in self.hunks for line in hunk]
        return max(lines.count("+"), lines.count("-"))

    def applied(self, text: str) -> str:
        """Return `text` with the hunks applied; each must fit in exactly one place."""
        lines = text.splitlines()
        for hunk in self.hunks:
            old = [line[1:] for line in hunk if line[0] in " -"]
            places = [start for start in range(len(lines)) if lines[start : start + len(old)] == old]
            assert len(places) == 1, f"{self.path} has not exactly one place for {old}"
            lines[places[0] : places[0] + len(old)] = [line[1:] for line in hunk if line[0] in " +"]
        return "".join(f"{line}\n" for line in lines)

    def installed_text(self) -> str:
        """Return the text of the file in the installed package."""
        package, _, rest = self.path.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            pytest.skip(f"{package} is not installed")
        return (Path(spec.origin).parent / rest).read_text(encoding="utf-8")


def diffs(section: str) -> dict[str, Diff]:
    """Return the diffs under a heading of the page, by file."""
    (text,) = re.findall(rf"^#+ {section}\n(.*?)(?=^#|\Z)", PAGE, flags=re.M | re.S)
    found = {}
    for block in re.findall(r"^```diff\n(.*?)^```", text, flags=re.M | re.S):
        old, new, *lines = block.splitlines()
        path = old.removeprefix("--- ")
        assert new == f"+++ {path}"
        hunks: list[list[str]] = []
        for line in lines:
            if line.startswith("@@"):
                hunks.append([])
            else:
                hunks[-1].append(line)
        found[path] = Diff(path, hunks)
    return found


TESTED = diffs("Three public examples, at most three changed lines")
BY_HAND = diffs("Tried by hand")


def test_page_shows_three_public_examples_with_few_changed_lines() -> None:
    assert len(TESTED) == 3
    assert {
        path: diff.num_changed for path, diff in {**TESTED, **BY_HAND}.items() if diff.num_changed > MOST_LINES
    } == {}


def test_applied_refuses_a_hunk_that_does_not_fit_once() -> None:
    diff = Diff("a.py", [[" x = 1", "+y = 2"]])
    assert diff.applied("x = 1\n") == "x = 1\ny = 2\n"
    for text in ("x = 11\n", "  x = 1\n", "x = 1\nx = 1\n"):
        with pytest.raises(AssertionError, match="not exactly one place"):
            diff.applied(text)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a tiny base and the mask that `extract` finds between it and a tuned checkpoint."""
    folder = tmp_path_factory.mktemp("public")
    save_tiny("llama", folder / "base")
    tuned = tiny_model("llama")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight[torch.rand(weight.shape, generator=draw) < 0.2] *= 1.5
    tuned.save_pretrained(folder / "tuned")
    extract(folder / "base", folder / "tuned").save(folder / "run.subnet.safetensors")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, from which scripts may import, with a cache of its own."""
    import datasets.config

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # a script that inserts more changes the copy
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def count_changes(weights: dict[str, Any], base: dict[str, Any], mask: SubnetMask) -> tuple[int, int]:
    """Count the weights whose bits changed, on the mask and off it."""
    on = off = 0
    for name in mask.names:
        bits = torch.int16 if base[name].element_size() == 2 else torch.int32
        assert weights[name].dtype == base[name].dtype
        changed = weights[name].detach().view(bits) != base[name].view(bits)
        on += int((changed & mask[name]).sum())
        off += int((changed & ~mask[name]).sum())
    return on, off


SUMS = [(f"{a} + {b} = ", str(a + b), str(a + b + 1)) for a in range(10) for b in (3, 4)]
ROWS: dict[str, list[dict[str, str]]] = {
    "trl/scripts/dpo.py": [{"prompt": p, "chosen": right, "rejected": wrong} for p, right, wrong in SUMS],
    "trl/scripts/grpo.py": [{"prompt": p} for p, _, _ in SUMS],
}
ARGUMENTS = {
    "trl/scripts/dpo.py": "",
    "trl/scripts/grpo.py": "--reward_funcs digits_reward.digits --num_generations 4 --max_completion_length 8",
}
REWARD = "def digits(completions, **_):\n    return [float(sum(c.isdigit() for c in text)) for text in completions]\n"


@pytest.mark.parametrize("path", ROWS)
def test_script_of_trl_trains_the_mask_and_nothing_else(
    path: str, checkpoints: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = here / "script.py"
    script.write_text(TESTED[path].applied(TESTED[path].installed_text()), encoding="utf-8")
    (here / "run.subnet.safetensors").symlink_to(checkpoints / "run.subnet.safetensors")
    (here / "digits_reward.py").write_text(REWARD)
    (here / "data").mkdir()
    (here / "data" / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS[path]))
    arguments = (
        f"--model_name_or_path {checkpoints}/base --dtype bfloat16 --dataset_name data --output_dir out --max_steps 2 "
        "--learning_rate 1e-2 --weight_decay 0.1 --per_device_train_batch_size 4 --save_strategy no --report_to none "
        f"--use_cpu --bf16 false --dataloader_pin_memory false {ARGUMENTS[path]}"
    )
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments.split()])
    runpy.run_path(str(script), run_name="__main__")
    mask = SubnetMask.load(here / "run.subnet.safetensors")
    saved, base = (load_file(folder / "model.safetensors") for folder in (here / "out", checkpoints / "base"))
    on, off = count_changes(saved, base, mask)
    assert off == 0
    assert on > mask.num_trainable / 2


def test_demo_of_lightning_trains_the_mask_and_nothing_else(here: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    diff = TESTED["lightning/pytorch/demos/transformer.py"]
    (here / "demo.py").write_text(diff.applied(diff.installed_text()), encoding="utf-8")
    (here / "data").mkdir()
    (here / "data" / "wikitext-2.txt").write_text("".join(f"{prompt} {right}\n" for prompt, right, _ in SUMS * 3))
    module = runpy.run_path("demo.py")["LightningTransformer"](vocab_size=64)
    base = {name: weight.detach().clone() for name, weight in module.model.named_parameters()}
    draw = torch.Generator().manual_seed(0)
    mask = SubnetMask.from_dense({name: torch.rand(w.shape, generator=draw) < 0.2 for name, w in base.items()})
    mask.save("run.subnet.safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")  # advice about worker processes
        trainer = lightning.Trainer(
            max_steps=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module)
    on, off = count_changes(dict(module.model.named_parameters()), base, mask)
    assert off == 0
    assert on > mask.num_trainable / 2
