"""What other tools pickled is refused with the command that merges it; where that can run here, it does."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import same_bits

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.errors import CheckpointError


def said(folder: Path) -> str:
    """Return why a folder is refused."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert sorted(folder.parent.rglob("*")) == before
    return str(caught.value)


def command(message: str) -> list[str]:
    """Return the words of the command in a message."""
    found = re.search(r"merge [^`]*`([^`]+)`", message)
    assert found is not None, message
    return shlex.split(found[1])


def test_what_fsdp_pickled_opens_after_the_command_of_the_message(saved: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "a run" / "checkpoint-3"
    shutil.copytree(saved / "trainer" / "checkpoint-3", checkpoint)
    message = said(checkpoint)
    assert "pickled by torch.distributed.checkpoint in `pytorch_model_fsdp_0`" in message
    assert "copy the base's config.json and tokenizer files beside it" in message
    program, *arguments = command(message)
    assert program == "accelerate"
    subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *arguments], check=True, capture_output=True
    )
    merged = Path(arguments[-1])
    assert merged == checkpoint.with_name("checkpoint-3-merged")
    assert "has weights, but no config.json that says of which model. Copy config.json" in said(merged)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(saved / "llama" / "whole" / name, merged)
    expected = dict(open_checkpoint(saved / "llama" / "whole").tensors())
    assert all(same_bits(tensor, expected[name]) for name, tensor in open_checkpoint(merged).tensors())


def test_the_folder_of_the_weights_itself_and_the_run_around_it_are_known_too(saved: Path) -> None:
    checkpoint = saved / "trainer" / "checkpoint-3"
    weights = checkpoint / "pytorch_model_fsdp_0"
    for folder, merged in ((weights, f"{weights}-merged"), (saved / "trainer", f"{checkpoint}-merged")):
        assert command(said(folder)) == ["accelerate", "merge-weights", str(weights), merged]


def test_the_code_of_the_page_merges_what_holds_an_optimizer_too(saved: Path, tmp_path: Path) -> None:
    folder = saved / "with optimizer"
    assert command(said(folder))[2] == str(folder)
    page = (Path(__file__).parents[2] / "docs" / "many_gpus.md").read_text()
    code = page.partition("## Deltas from sharded checkpoints")[2].partition("```python\n")[2].partition("```")[0]
    for word, path in {"BASE": saved / "llama" / "whole", "FOLDER": folder, "MERGED": tmp_path}.items():
        assert f'"{word}"' in code
        code = code.replace(f'"{word}"', repr(str(path)))
    with pytest.warns(UserWarning, match=r"torch\.distributed is disabled, unavailable or uninitialized"):
        exec(code, {})
    expected = dict(open_checkpoint(saved / "llama" / "whole").tensors())
    assert all(same_bits(tensor, expected[name]) for name, tensor in open_checkpoint(tmp_path).tensors())


@pytest.mark.parametrize("has_config", [True, False], ids=["config", "no config"])
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ["zero_to_fp32.py", "latest", "global_step5/mp_rank_00_model_states.pt"],
            ["python", "{}/zero_to_fp32.py", "{}", "{}-merged", "--safe_serialization"],
        ),
        (
            ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt", "optim_world_size_2_rank_0.pt"],
            ["python", "-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", "{}", "--target_dir",
             "{}-merged"],
        ),
    ],
    ids=["DeepSpeed", "verl"],
)  # fmt: skip
def test_parts_of_other_tools_are_refused_with_their_own_command(
    files: list[str], expected: list[str], has_config: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "a checkpoint"
    for name in [*files, *(["config.json"] if has_config else [])]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"model_type": "llama"}')
    message = said(folder)
    assert command(message) == [word.format(folder) for word in expected]
    assert "unpickling runs code" in message


def test_the_step_of_a_deepspeed_run_names_the_script_around_it(tmp_path: Path) -> None:
    step = tmp_path / "run" / "global_step5"
    step.mkdir(parents=True)
    (step / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    assert command(said(step))[1:3] == [str(tmp_path / "run" / "zero_to_fp32.py"), str(tmp_path / "run")]


@pytest.mark.parametrize("file", ["latest_checkpointed_iteration.txt", "mp_rank_00/model_optim_rng.pt", "common.pt"])
def test_a_megatron_checkpoint_is_no_plain_distributed_one(file: str, tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000010"
    for name in (file, ".metadata", "__0_0.distcp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    message = said(folder)
    assert "is a Megatron checkpoint" in message
    assert f'export_ckpt("{folder}", "{folder}-merged")' in message


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("pytorch_model.bin", "load it with transformers and save it"),
        ("pytorch_model_fsdp.bin", r"load it with transformers \(under the name `pytorch_model\.bin`\)"),
    ],
)
def test_a_pickled_model_is_refused(name: str, hint: str, tmp_path: Path) -> None:
    for file in ("optimizer.pt", "scheduler.pt", name):
        (tmp_path / file).touch()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=hint):
        open_checkpoint(tmp_path)


def test_the_folder_of_our_own_parts_says_where_its_config_is(saved: Path) -> None:
    checkpoint = saved / "masked" / "checkpoint-2"
    with pytest.raises(CheckpointError, match=re.escape(f"Name that one, `{checkpoint}`")):
        open_checkpoint(checkpoint / "sharded")


def test_parts_without_a_config_say_how_to_add_one(saved: Path, tmp_path: Path) -> None:
    for file in (saved / "llama" / "bare").glob("shard-*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(CheckpointError, match=r"`model\.config\.save_pretrained\("):
        open_checkpoint(tmp_path)
