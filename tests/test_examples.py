"""Every example runs offline and does what it says; the pages that show parts of them show what is there."""

from __future__ import annotations

import logging
import re
import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits, small_model

from subnet_ft import MaskedAdamW, MaskedSGD, SubnetMask
from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.masks import ModelRecord, Provenance, format_fingerprint
from subnet_kernels import fingerprint

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
TABLE = (EXAMPLES / "README.md").read_text(encoding="utf-8")

SCRIPTS = sorted(path.name for path in EXAMPLES.glob("[!_]*.py"))
# Read off the text, so that each trainer is a test of its own and nothing heavy is imported to list them.
TRAINERS = re.findall(r"^def (\w+)\(model: Any, tokenizer: Any\)", (EXAMPLES / "trl_trainers.py").read_text(), re.M)
COMMANDS = [name for name in SCRIPTS if name != "trl_trainers.py"] + [f"trl_trainers.py {name}" for name in TRAINERS]
OUTCOME = re.compile(r"^(.+): ([\d,]+) of ([\d,]+) trainable weights changed, 0 of the other ([\d,]+)$", re.M)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Run an example as `python examples/NAME ARGUMENTS` does, in this process."""
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def start(name: str, *arguments: str, run_name: str = "__main__") -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        return runpy.run_path(str(EXAMPLES / name), run_name=run_name)

    yield start
    sys.modules.pop("_shared", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("command", COMMANDS)
def test_example_trains_the_mask_and_nothing_else(command: str, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if command == "lightning_module.py":
        pytest.importorskip("lightning", reason="lightning is not installed")
    run(*command.split())
    outcomes = OUTCOME.findall(capsys.readouterr().out)
    assert outcomes
    for _, changed, trainable, others in outcomes:
        assert int(changed.replace(",", "")) > int(trainable.replace(",", "")) / 2
        assert int(others.replace(",", "")) > 10_000


def test_lightning_example_says_what_to_install(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(SystemExit, match=r"needs lightning: pip install 'subnet-ft\[examples\]'"):
        run("lightning_module.py")


def test_trl_example_has_every_stable_trainer_of_trl(run: Any) -> None:
    import trl

    stable = {name.removesuffix("Trainer").lower() for name in dir(trl) if name.endswith("Trainer")}
    trainers = run("trl_trainers.py", run_name="imported")["TRAINERS"]
    assert stable - set(trainers) == set()
    assert list(trainers) == TRAINERS


@pytest.mark.parametrize("what", ["outside", "nothing"])
def test_report_stops_at_a_run_that_broke_the_promise(what: str, run: Any) -> None:
    shared = run("_shared.py", run_name="imported")
    model = small_model(torch.bfloat16)
    mask, before = shared["random_mask"](model), shared["copy_weights"](model)
    if what == "outside":
        weight = model[0].weight.detach()
        with torch.no_grad():
            weight[mask["0.weight"]] += 1.0
            weight.view(torch.int16)[~mask["0.weight"]] ^= 1  # the last bit of every other weight
    with pytest.raises(SystemExit, match="weights outside the mask changed"):
        shared["report"]("A run", model, before, mask)


def test_plain_loop_ends_resumed_runs_with_the_same_bits(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run("plain_loop.py")
    assert capsys.readouterr().out.count("saved, resumed, and ended with the same bits") == 2


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Return the name of the example that a section links, and each python block of that section."""
    found = []
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        files = re.findall(r"\]\(\.\./examples/(\w+\.py)\)", section)
        for block in re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S):
            assert len(set(files)) == 1, section.splitlines()[0]
            found.append((files[0], block))
    return found


def missing_lines(block: str, name: str) -> list[str]:
    """Return the lines of a block that the example does not have, in that order; `...` stands for any lines."""
    source = iter([line.strip() for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()])
    wanted = [line.strip() for line in block.splitlines() if line.strip() and line.strip() != "..."]
    return [line for line in wanted if line not in source]


def test_page_shows_code_of_the_examples() -> None:
    blocks = code_blocks(PAGE)
    assert {name for name, _ in blocks} == set(SCRIPTS)
    assert {(name, line) for name, block in blocks for line in missing_lines(block, name)} == set()


def test_missing_lines_catches_a_line_that_differs() -> None:
    name, block = code_blocks(PAGE)[0]
    assert missing_lines(block.replace("restrict(", "restrain("), name)


def test_table_names_every_example_and_shows_its_code() -> None:
    rows = re.findall(r"^\| \[`(\w+\.py)`\]\(\1\) \|[^|]*\|(.*)\|$", TABLE, flags=re.M)
    assert sorted(name for name, _ in rows) == SCRIPTS
    for name, cell in rows:
        for code in re.findall(r"`([^`]+)`", cell):
            assert code in (EXAMPLES / name).read_text(encoding="utf-8"), (name, code)


def test_accelerates_own_clipping_sees_no_compact_gradient() -> None:
    """The trap that the page names; the call it recommends is the one in the example."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = small_model(torch.float32)
    optimizer = MaskedSGD(model.named_parameters(), random_mask(model, 0.3), lr=0.1, max_grad_norm=None)
    model, prepared = accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.ones(2, 13)).square().sum())
    assert float(accelerator.clip_grad_norm_(model.parameters(), 1.0)) == 0.0
    assert not hasattr(prepared, "clip_grad_norm_")
    assert float(prepared.optimizer.clip_grad_norm_(1.0)) > 0.0


def test_accelerates_saved_state_continues_with_the_same_bits(run: Any, tmp_path: Path) -> None:
    from accelerate import Accelerator

    def train(steps: range, *, resume: bool = False, save: bool = False) -> list[torch.Tensor]:
        accelerator = Accelerator(cpu=True)
        model = small_model(torch.bfloat16)
        optimizer = MaskedAdamW(model.named_parameters(), random_mask(model, 0.3), lr=1e-2, max_grad_norm=1.0)
        model, optimizer = accelerator.prepare(model, optimizer)
        if resume:
            accelerator.load_state(str(tmp_path))
        for step in steps:
            accelerator.backward(model(torch.full((2, 13), step + 1.0, dtype=torch.bfloat16)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        if save:
            accelerator.save_state(str(tmp_path))
        return [weight.detach().clone() for weight in model.parameters()]

    whole = train(range(4))
    train(range(2), save=True)
    assert all(same_bits(a, b) for a, b in zip(train(range(2, 4), resume=True), whole, strict=True))


def test_lightning_example_resumes_on_a_mask_that_names_its_base(run: Any, tmp_path: Path) -> None:
    """Lightning loads the weights of a checkpoint before it asks for the optimizer."""
    pytest.importorskip("lightning", reason="lightning is not installed")
    example = run("lightning_module.py", run_name="imported")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    base = tiny_model("llama")
    tensors = {name: weight.detach() for name, weight in base.named_parameters()}
    record = ModelRecord("base", fingerprints={n: format_fingerprint(fingerprint(w)) for n, w in tensors.items()})
    mask = SubnetMask(random_mask(base, 0.3).tensors, Provenance(base=record))
    rows = torch.utils.data.DataLoader(torch.arange(64).view(8, 8), batch_size=2)

    def train(epochs: int, resume: Path | None = None) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")  # advice about worker processes
            trainer = example["lightning"].Trainer(
                max_epochs=epochs,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(example["Policy"](tiny_model("llama").train(), mask), rows, ckpt_path=resume)
        return trainer

    whole = train(2)
    train(1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = train(2, tmp_path / "half.ckpt")
    pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(same_bits(a.detach(), b.detach()) for a, b in pairs)


@pytest.mark.parametrize("who", ["example", "lightning", "manual"])
def test_lightnings_own_clipping_sees_no_compact_gradient(who: str, run: Any) -> None:
    """The trap that the page names: without the example's method, `gradient_clip_val` changes nothing."""
    pytest.importorskip("lightning", reason="lightning is not installed")
    example = run("lightning_module.py", run_name="imported")
    lightning = example["lightning"]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Policy(example["Policy"]):
        automatic_optimization = who != "manual"

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss = self.model(batch).square().sum()
            if who == "manual":
                optimizer = self.optimizers()
                self.manual_backward(loss)
                optimizer.clip_grad_norm_(limit or float("inf"))
                optimizer.step()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return MaskedSGD(self.model.named_parameters(), self.mask, lr=1.0, max_grad_norm=None)

        if who == "lightning":
            configure_gradient_clipping = lightning.LightningModule.configure_gradient_clipping

    moved = []
    for limit in (None, 1e-3):
        model = small_model(torch.float32)
        start = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")  # advice about worker processes
            trainer = lightning.Trainer(
                max_steps=1,
                gradient_clip_val=None if who == "manual" else limit,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(Policy(model, random_mask(model, 0.3)), torch.utils.data.DataLoader(torch.ones(2, 13)))
        moved.append(float((torch.nn.utils.parameters_to_vector(model.parameters()).detach() - start).norm()))
    assert moved[0] > 0.1
    assert moved[1] == (moved[0] if who == "lightning" else pytest.approx(1e-3, rel=1e-2))
