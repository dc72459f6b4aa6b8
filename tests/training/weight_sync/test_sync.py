"""Restricted GRPO with TRL's vLLM modes, dense and values only, against a stand-in for vLLM; no vLLM runs here."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import random_mask, same_bits
from launching import torchrun
from training.every_trainer import base_model, build
from training.masked_runs import third_of, weights_of
from vllm_stand_in import install as stand_in
from vllm_stand_in.server import Server

from subnet_ft.errors import WeightSyncError
from subnet_ft.masks import SubnetMask
from subnet_ft.training import MaskSchedule, restrict
from subnet_ft.training.weight_sync import HTTPChannel, ValuesReceiver, sync_values_only
from subnet_ft.training.weight_sync.vllm import ValuesWorker

STEPS = 3


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers of the base; they end with the test."""
    servers: list[Server] = []

    def start(extension: type | None = None) -> Server:
        path = tmp_path / "base"
        base_model("GRPO").save_pretrained(path)
        servers.append(Server(str(path), extension))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def grpo(folder: Path, mode: str, server: Server | None = None, *, name: str = "GRPO", **options: Any) -> Any:
    """Build a restricted trainer, of GRPO if no other is named, that generates with the stand-in."""
    model = base_model(name)
    model.name_or_path = str(folder / "base")  # from where the engine loads in colocate mode; `build` saves it there
    where = {} if server is None else {"vllm_server_base_url": server.url, "vllm_group_port": free_port()}
    known = {"max_steps": STEPS, "use_vllm": True, "vllm_mode": mode, **where, **options}
    built = build(name, folder, model=model, **known)
    return restrict(built, third_of(model))


class Syncs:
    """Compares the engine with the policy after every sync."""

    def __init__(self, trainer: Any, engine: Any, mask: SubnetMask | None = None) -> None:
        self.start = weights_of(trainer.model)
        self.trainer, self.engine, self.mask = trainer, engine, mask or trainer.subnet_mask
        self.count = 0
        self._sync = trainer.vllm_generation.sync_weights
        trainer.vllm_generation.sync_weights = self

    def __call__(self) -> None:
        self._sync()
        self.count += 1
        policy, engine, mask = weights_of(self.trainer.model), self.engine.weights(), self.mask
        assert policy.keys() == engine.keys()
        for name, weights in policy.items():
            assert same_bits(engine[name], weights), f"sync {self.count}: {name}"
            assert same_bits(engine[name][~mask[name]], self.start[name][~mask[name]]), f"off the mask of {name}"


def check_run(trainer: Any, syncs: Syncs) -> None:
    """Assert that it trained, with compact gradients, and that the engine followed every step."""
    trainer.train()
    assert syncs.count == STEPS
    assert trainer.masked_optimizer.compact_grads
    moved = [name for name, p in weights_of(trainer.model).items() if not same_bits(p, syncs.start[name])]
    assert len(moved) > len(syncs.start) / 2


def test_grpo_in_server_mode_sends_every_weight(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve()
    trainer = grpo(tmp_path, "server", server)
    check_run(trainer, Syncs(trainer, server.engine))
    differences = [entry.get("sampling/sampling_logp_difference/mean", 1.0) for entry in trainer.state.log_history[:-1]]
    assert max(differences) < 0.05, "what the engine sampled with were the policy's weights"
    assert [path for path, *_ in server.requests].count("/update_weights") == STEPS
    sent = server.worker.weight_transfer_engine.model_update_group.num_bytes
    assert sent == STEPS * 2 * sum(p.numel() for p in trainer.model.parameters())


@pytest.mark.parametrize("sleeps", [False, True])
def test_grpo_in_colocate_mode_loads_every_weight(sleeps: bool, tmp_path: Path) -> None:
    trainer = grpo(tmp_path, "colocate", vllm_enable_sleep_mode=sleeps)
    llm = trainer.vllm_generation.llm
    check_run(trainer, Syncs(trainer, llm.model))
    assert llm.num_resets == STEPS
    assert len(llm.model.loaded) == STEPS * len(trainer.subnet_mask.names)


def test_sync_values_only_sends_values_to_a_server(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve(ValuesWorker)
    trainer = grpo(tmp_path, "server", server)
    syncs = Syncs(trainer, server.engine)
    sender = sync_values_only(trainer)
    check_run(trainer, syncs)
    assert sender.version == STEPS
    called = [path for path, *_ in server.requests]
    assert "/update_weights" not in called
    assert called.count("/reset_prefix_cache") == STEPS
    trained = [name for name, tensor in trainer.subnet_mask.tensors.items() if tensor.count]
    assert server.engine.loaded == [trained] * STEPS
    mask = trainer.subnet_mask
    payload = server.worker.weight_transfer_engine.model_update_group.num_bytes
    assert STEPS * 2 * mask.num_trainable < payload < STEPS * 2 * mask.num_trainable + mask.num_parameters / 8 + 20_000


@pytest.mark.parametrize("name", ["RLOO", "PPO", "PRIME", "Distillation"])
def test_sync_values_only_serves_every_trainer_that_generates(
    name: str, tmp_path: Path, serve: Callable[..., Server]
) -> None:
    server = serve(ValuesWorker)
    trainer = grpo(tmp_path, "server", server, name=name)
    syncs = Syncs(trainer, server.engine)
    sender = sync_values_only(trainer)
    check_run(trainer, syncs)
    assert sender.version == STEPS


def test_sync_values_only_takes_a_channel_of_its_own(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve()
    trainer = grpo(tmp_path, "server", server)
    syncs = Syncs(trainer, server.engine)
    sender = sync_values_only(trainer, HTTPChannel(f"{server.url}/values"))
    check_run(trainer, syncs)
    assert sender.version == server.receiver.version == STEPS
    assert server.worker.weight_transfer_engine.model_update_group.num_bytes == 0


@pytest.mark.parametrize("sleeps", [False, True])
@pytest.mark.parametrize("has_copy", [False, True])
def test_sync_values_only_loads_trained_tensors_in_colocate_mode(sleeps: bool, has_copy: bool, tmp_path: Path) -> None:
    trainer = grpo(tmp_path, "colocate", vllm_enable_sleep_mode=sleeps)
    llm = trainer.vllm_generation.llm
    receiver = ValuesReceiver(weights_of(trainer.model)) if has_copy else None
    syncs = Syncs(trainer, llm.model)
    sync_values_only(trainer, receiver)
    check_run(trainer, syncs)
    mask = trainer.subnet_mask
    loaded = [name for name in mask.names if sleeps or mask.tensors[name].count]
    assert llm.model.loaded == [[name] for name in loaded] * STEPS
    if receiver is not None:
        assert receiver.version == STEPS


def test_sync_values_only_starts_from_the_base_in_a_resumed_run(tmp_path: Path, serve: Callable[..., Server]) -> None:
    saves: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    server = serve(ValuesWorker)
    first = grpo(tmp_path, "server", server, max_steps=2, **saves)
    sync_values_only(first)
    first.train()
    # The engine still holds the weights of the first run's last sync; another opening takes them back.
    again = grpo(tmp_path, "server", server, **saves)
    syncs = Syncs(again, server.engine)
    sender = sync_values_only(again)
    again.train(resume_from_checkpoint=True)
    assert (syncs.count, sender.version) == (1, 1)


def test_sync_values_only_follows_a_schedule_under_the_union_of_its_masks(
    tmp_path: Path, serve: Callable[..., Server]
) -> None:
    server = serve()
    trainer = grpo(tmp_path, "server", server)
    other = random_mask(trainer.model, 0.3, seed=7)
    trainer.add_callback(MaskSchedule({1: other}))
    union = trainer.subnet_mask | other
    syncs = Syncs(trainer, server.engine, union)
    sync_values_only(trainer, HTTPChannel(f"{server.url}/values"), mask=union)
    check_run(trainer, syncs)


def test_sync_values_only_refuses_a_mask_that_changed(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve()
    trainer = grpo(tmp_path, "server", server)
    trainer.add_callback(MaskSchedule({1: random_mask(trainer.model, 0.3, seed=7)}))
    sender = sync_values_only(trainer, HTTPChannel(f"{server.url}/values"))
    with pytest.raises(WeightSyncError, match="its mask changed"):
        trainer.train()
    assert sender.version == server.receiver.version == 1


def test_sync_values_only_names_the_missing_worker_extension(tmp_path: Path, serve: Callable[..., Server]) -> None:
    trainer = grpo(tmp_path, "server", serve())
    sender = sync_values_only(trainer)
    with pytest.raises(WeightSyncError, match=r"`--worker-extension-cls subnet_ft\S+ValuesWorker`"):
        trainer.train()
    assert sender.version is None


def test_sync_values_only_ends_the_run_when_the_engine_refuses(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve(ValuesWorker)
    trainer = grpo(tmp_path, "server", server)
    sender = sync_values_only(trainer)
    trainer.vllm_generation.sync_weights()
    before = server.engine.weights()
    loads = server.engine.load_weights
    failures = iter([RuntimeError("out of memory")])

    def fails_once(weights: Any) -> Any:
        if failure := next(failures, None):
            raise failure
        return loads(weights)

    server.worker._receiver._load = fails_once
    with pytest.raises(WeightSyncError, match="could not load version 2: out of memory"):
        trainer.train()
    assert sender.version == 1
    assert all(same_bits(weights, before[name]) for name, weights in server.engine.weights().items())


def test_sync_values_only_refuses_trainers_that_it_cannot_serve(tmp_path: Path) -> None:
    model = base_model("GRPO")
    plain = build("GRPO", tmp_path / "plain", model=model)
    with pytest.raises(WeightSyncError, match="is not restricted"):
        sync_values_only(plain)
    with pytest.raises(WeightSyncError, match="generates without vLLM"):
        sync_values_only(restrict(plain, third_of(model)))
    with pytest.raises(WeightSyncError, match="a `ValuesReceiver`, not a HTTPChannel"):
        sync_values_only(grpo(tmp_path, "colocate"), HTTPChannel("http://127.0.0.1:1"))


def test_sync_values_only_under_ddp_ends_the_same_way_in_both_processes(tmp_path: Path) -> None:
    torchrun(Path(__file__).with_name("ddp_worker.py"), tmp_path, free_port(), processes=2)
    main, other = (json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in (0, 1))
    assert main["versions"] == other["versions"] == [1, 2, 3]
    assert main["same"] == [True] * STEPS
    assert main["digests"] == other["digests"]
    assert len(set(main["digests"])) == STEPS
    assert "does not follow version 103 of the receiver" in main["refused"]
    assert "did not take the weights of the main process" in other["refused"]
    assert main["version"] == other["version"] == 3
