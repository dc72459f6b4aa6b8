"""Digests change with what they stand for, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.digests import checkpoint_sha256, json_sha256, rewards_sha256


def test_checkpoint_sha256_sees_weights_and_tokenizer_but_not_what_lies_beside(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    start = checkpoint_sha256(folder)
    (folder / "mask.subnet.safetensors").write_bytes(b"x")
    (folder / "log.json").write_text("[]")
    (folder / "dynamics.json").write_text("{}")
    assert checkpoint_sha256(folder) == start
    found = {start}
    for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"):
        path = folder / name
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        found.add(checkpoint_sha256(folder))
        path.write_bytes(before)
    assert len(found) == 5
    assert checkpoint_sha256(folder) == start


def test_checkpoint_sha256_reads_every_shard(tmp_path: Path) -> None:
    from subnet_ft.checkpoints.tiny import tiny_model

    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    start = checkpoint_sha256(tmp_path)
    shards[-1].write_bytes(shards[-1].read_bytes() + b" ")
    assert checkpoint_sha256(tmp_path) != start


@pytest.mark.parametrize("where", [".", "sharded"])
def test_checkpoint_sha256_reads_every_part(where: str, tmp_path: Path) -> None:
    (tmp_path / where).mkdir(exist_ok=True)
    parts = [tmp_path / where / f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)]
    for part in parts:
        part.write_bytes(b"weights")
    start = checkpoint_sha256(tmp_path)
    parts[-1].write_bytes(b"others")
    assert checkpoint_sha256(tmp_path) != start


def test_json_sha256_depends_on_order_and_values() -> None:
    assert json_sha256([1, {"a": 1, "b": 2}]) == json_sha256([1, {"b": 2, "a": 1}])
    assert len({json_sha256([1, 2]), json_sha256([2, 1]), json_sha256([12])}) == 3


def test_rewards_sha256_digests_the_users_own_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_mine.py").write_text("def f(**kwargs): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(rewards_sha256(["correct", "rewards_of_mine:f"])) == ["rewards_of_mine:f"]
