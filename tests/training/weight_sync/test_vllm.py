"""The way to a vLLM server through TRL's client, against a stand-in for both sides of it; no vLLM runs here."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits
from training.weight_sync.small_syncs import train
from transformers import AutoModelForCausalLM
from vllm_stand_in import install as stand_in
from vllm_stand_in.server import Server

from subnet_ft.checkpoints.tiny import tiny_config
from subnet_ft.errors import WeightSyncError
from subnet_ft.training.weight_sync import ValuesSender
from subnet_ft.training.weight_sync.vllm import ValuesWorker, VLLMChannel

SYNCS = 3


class Served:
    """A policy of a million weights, a server that started from it, and TRL's client with its group open."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        config = tiny_config("llama", hidden_size=256, intermediate_size=512, head_dim=64)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.model.save_pretrained(folder)
        self.server = Server(str(folder), ValuesWorker)
        client = importlib.import_module("trl.generation.vllm_client")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.client: Any = client.VLLMClient(base_url=self.server.url, group_port=port)
        self.client.init_communicator(device="cpu")
        self.mask = random_mask(self.model, 0.1)

    @property
    def wire_bytes(self) -> int:
        """Bytes of requests and answers so far, and of what went through the group."""
        return sum(sent + got for _, sent, got in self.server.requests) + self.client.communicator.num_bytes

    def check(self) -> None:
        """Assert that the engine has the policy's weights."""
        engine = self.server.engine.weights()
        assert all(same_bits(engine[name], p.detach()) for name, p in self.model.named_parameters())


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    stand_in.install(monkeypatch)
    found = Served(tmp_path / "base")
    yield found
    found.server.close()
    found.client.communicator.group.socket.close()


def test_a_sync_at_density_a_tenth_sends_a_tenth_of_the_dense_bytes(served: Served) -> None:
    count = served.mask.num_parameters
    assert count > 1_000_000
    before = served.wire_bytes
    served.client.update_model_params(served.model)
    dense = (served.wire_bytes - before) / count
    assert 2 < dense < 2.01

    sender, channel = ValuesSender(served.model, served.mask), VLLMChannel(served.client)
    before = served.wire_bytes
    sender.acknowledge(channel.open(sender.open()))
    assert 0.125 < (served.wire_bytes - before) / count < 0.145, "one bit per weight, once"
    before, counted = served.wire_bytes, channel.num_bytes
    for step in range(SYNCS):
        train(served.model, served.mask, step)
        sender.push(channel)
        served.check()
    values = (served.wire_bytes - before) / SYNCS / count
    assert 2 * served.mask.density < values < 0.22
    # What the channel counts is the messages; requests have their JSON around it.
    assert 0.98 < (channel.num_bytes - counted) / SYNCS / count / values <= 1


def test_the_worker_says_why_it_refuses(served: Served) -> None:
    sender, channel = ValuesSender(served.model, served.mask), VLLMChannel(served.client)
    opening = sender.open()
    sender.acknowledge(channel.open(opening))
    late = sender.update()
    sender.push(channel)
    with pytest.raises(WeightSyncError, match="The receiver refused: Version 1, which follows 0"):
        channel.update(late)
    served.server.worker._receiver = None
    with pytest.raises(WeightSyncError, match="The receiver refused: The worker was not opened"):
        sender.push(channel)


def test_the_worker_refuses_a_policy_of_another_base(served: Served) -> None:
    with torch.no_grad():
        served.model.get_parameter("model.norm.weight")[0] = 2
    sender, channel = ValuesSender(served.model, served.mask), VLLMChannel(served.client)
    with pytest.raises(WeightSyncError, match=r"weights of `model\.norm\.weight` are not those"):
        sender.push(channel)
    assert sender.version is None


def test_a_server_without_the_extension_is_named_before_anything_is_broadcast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: Served
) -> None:
    served.server.worker.subnet_ready = None
    sender, channel = ValuesSender(served.model, served.mask), VLLMChannel(served.client)
    with pytest.raises(WeightSyncError, match="Was it started with `VLLM_SERVER_DEV_MODE=1`"):
        sender.push(channel)
    assert served.client.communicator.num_bytes == 0
