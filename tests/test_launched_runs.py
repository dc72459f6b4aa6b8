"""The commands under `accelerate launch`, two gloo processes: runs end to end, disagreements, kills and restarts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
from accelerated import TINY, end, launch, processes_of, start, wait_for
from packaging.version import Version
from safetensors.torch import load_file

from subnet_ft.cli import main
from subnet_ft.training.delta_checkpoints import DELTA
from subnet_ft.training.resume import newest_complete, read_manifest
from subnet_ft.training.saving import STAGING

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="transformers before 5.18 cannot resume several processes on the CPU: it loads to `cpu:0`, unknown to torch",
)

ENDS_WITHIN = 60.0
"""Seconds in which a launch ends after one of its processes was killed."""


def stage(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "stage.json").read_text())
    return found


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]


def test_run_under_accelerate_launch_equals_one_process_that_accumulates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    code, out, err = launch("run", *TINY, f"output={folder}", "--json")
    assert code == 0, err[-5000:]
    (line,) = out.splitlines()
    verdict = json.loads(line)
    assert verdict["off_mask_changed"] == 0
    assert verdict["output"] == str(folder)
    assert 0.5 < verdict["density"] < 1.0
    assert (folder / "report.html").is_file()
    report = json.loads((folder / "report.json").read_text())
    assert report["verdict"] == verdict["verdict"]
    assert report["environment"]["num_processes"] == 2
    names = ["full", "subnet", "control-uniform", "control-magnitude_matched"]
    before = {name: stage(folder / name) for name in names}
    for name, found in before.items():
        assert found["results"]["num_steps"] == 4
        assert found["inputs"]["training"]["gradient_accumulation_steps"] == 2
        assert [entry.name for entry in (folder / name).glob("*.safetensors")] == ["model.safetensors"]
    assert before["subnet"]["results"]["delta"]["bytes"] == (folder / "subnet.delta.safetensors").stat().st_size
    # The same steps on the same batches: nothing is left to do for one process.
    assert main(["run", *TINY, f"output={folder}", "training.gradient_accumulation_steps=2", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out) == verdict
    assert {name: stage(folder / name) for name in names} == before
    # And its own run, from nothing, reads the same rows for every step.
    alone = ["training.gradient_accumulation_steps=2", f"output={tmp_path / 'alone'}"]
    assert main(["train", *TINY, *alone, "method=full", "-q"]) == 0
    ours, theirs = (losses(where / "full") for where in (folder, tmp_path / "alone"))
    assert len(ours) == 4
    assert ours == pytest.approx(theirs, rel=1e-3), "other rows, or another average"


def test_processes_with_different_recipes_end_with_one_message(tmp_path: Path) -> None:
    code, out, err = launch(
        "run", *TINY, f"output={tmp_path / 'run'}", script="held_up.py", variables={"SEED_BY_RANK": "1"}
    )
    assert (code, out) == (1, "")
    assert err.count("do not have the same recipe: seed: 0 and 1.") == 2, err[-5000:]
    assert err.count("exitcode  : 2") == 2
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full run that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, _, err = launch("train", *TINY, f"output={folder / 'run'}", "method=full", "training.max_steps=6")
    assert code == 0, err[-5000:]
    return folder / "run" / "full"


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "rank", "step", "last"), [("step", 1, 3, 2), ("save", 0, 4, 2), ("save", 1, 4, 2)])
def test_a_killed_process_ends_the_launch_and_the_restart_resumes(
    phase: str, rank: int, step: int, last: int, undisturbed: Path, tmp_path: Path
) -> None:
    arguments = ("train", *TINY, f"output={tmp_path / 'run'}", "method=full", "training.max_steps=6")
    hold = {"HOLD": f"{phase}:{rank}:{step}:{tmp_path / 'held'}"}
    started = start(*arguments, script="held_up.py", variables=hold)
    wait_for(tmp_path / "held", started)
    members = processes_of(started)
    assert sorted(members) == [0, 1]
    killed = time.monotonic()
    members[rank].kill()
    code, out, _ = end(started, timeout=ENDS_WITHIN)
    print(f"\n{phase}, rank {rank}: ended {time.monotonic() - killed:.1f} s after the kill")
    assert (code, out) == (1, "")
    assert not any(process.is_running() for process in members.values())
    trainer = tmp_path / "run" / "full" / "trainer"
    for checkpoint in trainer.glob("checkpoint-*"):
        read_manifest(checkpoint)  # raises where a part of one is there
    newest = newest_complete(trainer)
    assert newest is not None
    assert newest.name == f"checkpoint-{last}"
    code, _, err = launch(*arguments)
    assert code == 0, err[-5000:]
    results = stage(tmp_path / "run" / "full")["results"]
    assert results["resumed_from"] == f"checkpoint-{last}"
    assert results["sha256"] == stage(undisturbed)["results"]["sha256"]


@pytest.mark.slow
def test_a_killed_launch_whose_checkpoints_hold_deltas_ends_with_the_bits_of_one_with_dense_ones(
    tmp_path: Path,
) -> None:
    method = ("method=subnet", "subnet.source={kind: low_magnitude, density: 0.3}", "training.max_steps=6")
    code, _, err = launch("train", *TINY, *method, f"output={tmp_path / 'dense'}")
    assert code == 0, err[-5000:]
    arguments = ("train", *TINY, *method, f"output={tmp_path / 'run'}", "subnet.save_only_delta=true")
    hold = {"HOLD": f"save:0:4:{tmp_path / 'held'}"}
    started = start(*arguments, script="held_up.py", variables=hold)
    wait_for(tmp_path / "held", started)
    processes_of(started)[0].kill()
    assert end(started, timeout=ENDS_WITHIN)[0] == 1
    trainer = tmp_path / "run" / "subnet" / "trainer"
    (whole,) = trainer.glob("checkpoint-*")
    assert [path.name for path in whole.glob("*.safetensors")] == [DELTA]
    assert list((trainer / STAGING / "checkpoint-4").glob(f"*{DELTA}*")), "it was not killed in the middle of a save"
    code, _, err = launch(*arguments)
    assert code == 0, err[-5000:]
    ours, theirs = (stage(tmp_path / run / "subnet")["results"] for run in ("run", "dense"))
    assert ours["resumed_from"] == "checkpoint-2"
    assert ours["sha256"] == theirs["sha256"]
    assert ours["delta"]["bytes"] == (tmp_path / "run" / "subnet.delta.safetensors").stat().st_size


@pytest.mark.slow
def test_fsdp2_refuses_delta_checkpoints_before_anything_is_trained(tmp_path: Path) -> None:
    arguments = ("run", *TINY, f"output={tmp_path / 'run'}", "subnet.save_only_delta=true")
    code, out, err = launch(*arguments, file="fsdp2.yaml", script="fsdp_on_cpu.py")
    assert (code, out) == (1, "")
    assert "`subnet.save_only_delta` reads whole weights in one process. Launch with recipes/accelerate/ddp.yaml" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_launchers_as_on_two_machines_train_together(tmp_path: Path) -> None:
    """Each has its own agent; only the address and the folder are common."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ("--num_machines", 2, "--num_processes", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    launches = [
        start(
            "train", *TINY, f"output={tmp_path / 'run'}", "method=full", "--json",
            options=(*common, "--machine_rank", rank),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    (first, out, err), (second, nothing, _) = (end(started) for started in launches)
    assert (first, second, nothing) == (0, 0, ""), err[-5000:]
    assert json.loads(out)["environment"]["num_processes"] == 2


@pytest.mark.slow
def test_compare_under_accelerate_launch_judges_each_method_once(tmp_path: Path) -> None:
    code, out, err = launch("compare", *TINY, f"output={tmp_path / 'run'}", "--methods", "full,subnet,lora", "--json")
    assert code == 0, err[-5000:]
    (line,) = out.splitlines()
    assert [row["method"] for row in json.loads(line)["methods"]] == ["full", "subnet", "lora"]
    assert (tmp_path / "run" / "comparison.html").is_file()


@pytest.mark.slow
def test_run_under_fsdp2_saves_ordinary_checkpoints_with_the_weights_of_ddp(undisturbed: Path, tmp_path: Path) -> None:
    """accelerate shards on CPUs with one method replaced (`fsdp_on_cpu.py`)."""
    arguments = (*TINY, f"output={tmp_path / 'run'}", "training.max_steps=6")
    code, out, err = launch("run", *arguments, "--json", file="fsdp2.yaml", script="fsdp_on_cpu.py")
    assert code == 0, err[-5000:]
    assert json.loads(out)["off_mask_changed"] == 0
    full = tmp_path / "run" / "full"
    assert losses(full) == pytest.approx(losses(undisturbed), rel=1e-2)
    ours, theirs = (load_file(where / "model.safetensors") for where in (full, undisturbed))
    assert ours.keys() == theirs.keys(), "a tied weight is saved twice, or a weight not at all"
    # Sharded gradients are added in bfloat16, others in float32.
    same = sum(int((ours[name] == theirs[name]).sum()) for name in ours)
    assert same > 0.9 * sum(weight.numel() for weight in theirs.values())
