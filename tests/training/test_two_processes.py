"""A restricted trainer under DDP, two gloo processes: one checkpoint for both, completions of each, the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from launching import torchrun
from packaging.version import Version

from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.evidence.dynamics import read_dynamics
from subnet_ft.training.saving import MANIFEST

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="transformers before 5.18 cannot resume several processes on the CPU: it loads to `cpu:0`, unknown to torch",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What either process wrote."""
    folder = tmp_path_factory.mktemp("two")
    save_tiny("llama", folder / "base")
    torchrun(Path(__file__).with_name("two_processes_worker.py"), folder, processes=2)
    dynamics = read_dynamics(folder / "observed")
    return [
        {
            **json.loads((folder / f"result-{rank}.json").read_text()),
            "dynamics": dynamics.steps,
            "lost": dynamics.missing,
        }
        for rank in (0, 1)
    ]


def test_restrict_resumes_to_the_same_bits_under_ddp(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["completions"] != ranks[1]["completions"], "each process samples its own completions"
    for result in ranks:
        assert result["steps"] == 3
        assert result["compact"]
        assert result["differs"] == []
        assert result["off_mask"] == []
        assert result["moved"] > 0.5 * result["trainable"]
        assert {"subnet_rollouts_0.pt", "subnet_rollouts_1.pt", "rng_state_0.pth", "rng_state_1.pth"} <= {
            *result["files"]
        }


def test_both_processes_have_the_same_bits_after_every_step_while_the_mask_changes(ranks: list[dict[str, Any]]) -> None:
    """Two micro-batches to a step, each clipped and audited; resumed while a tensor stands still."""
    assert ranks[0]["changing"] == ranks[1]["changing"]
    assert ranks[0]["norms"] == ranks[1]["norms"]
    for result in ranks:
        assert len(set(result["changing"])) == len(result["changing"]) == 6
        first, second, third, fourth, fifth, last = result["leaving"]
        assert second == third == fourth
        assert len({first, second, fifth, last}) == 4
        assert min(result["norms"]) > 0.1, "every step was clipped"
        assert result["resumed"] == result["changing"][3:]


def test_nan_in_one_process_leaves_the_step_out_in_both(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["spoiled"] == ranks[1]["spoiled"]
    for result in ranks:
        assert result["skipped"] == 1
        assert result["spoiled"][2] == result["spoiled"][1]
        assert len(set(result["spoiled"])) == 5


def test_save_only_model_saves_the_model_of_both_processes(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        for step in (3, 6):
            needed = {"model.safetensors", "trainer_state.json", MANIFEST}
            assert {f"checkpoint-{step}/{name}" for name in needed} <= set(result["alone"])
            assert f"checkpoint-{step}/optimizer.pt" not in result["alone"]


def test_dynamics_of_two_processes_are_written_once_and_change_no_bit(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["observed"] == result["quiet"] == ranks[0]["observed"]
        assert (result["dynamics"], result["lost"]) == ([2, 4, 6], "")


def test_a_checkpoint_that_holds_a_delta_resumes_to_the_same_bits_under_ddp(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["sparse"] == ["model.delta.safetensors"]
        assert result["in_deltas"] == result["quiet"]
        assert result["from_delta"] == result["quiet"][3:]
