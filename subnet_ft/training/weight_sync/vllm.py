"""Values-only updates of a vLLM server that TRL's trainers generate with.

Run against a stand-in for vLLM on the CPU, and against no vLLM and no GPU.

Control goes through vLLM's `/collective_rpc`, which its development mode opens, as TRL needs anyway. The payload goes
through the group that TRL's client has opened to the workers for its own, dense sync.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}' \\
        --worker-extension-cls subnet_ft.training.weight_sync.vllm.ValuesWorker
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.errors import WeightSyncError
from subnet_ft.training.weight_sync.channels import answer, answered
from subnet_ft.training.weight_sync.message import Acknowledgement, Opening, ValuesUpdate
from subnet_ft.training.weight_sync.receiver import ValuesReceiver


class VLLMChannel:
    """The way to the workers of a server, through the client of a TRL trainer.

    Args:
        client: `trainer.vllm_generation.vllm_client`, with its communicator open.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self.num_bytes = 0
        """Bytes of messages sent so far, counted once however many workers receive them."""

    def open(self, opening: Opening) -> Acknowledgement:
        """Bring the mask over; the workers read their base from disk and check it."""
        payload = torch.frombuffer(bytearray(opening.to_bytes()), dtype=torch.uint8)
        return self._send("subnet_open", payload, {})

    def update(self, update: ValuesUpdate) -> Acknowledgement:
        """Bring values over."""
        start, payload = update.pack()
        text = base64.b64encode(start).decode()
        self.num_bytes += len(text)
        return self._send("subnet_update", payload, {"start": text})

    def _send(self, method: str, payload: torch.Tensor, fields: dict[str, str]) -> Acknowledgement:
        group = self._client.communicator
        # A broadcast that nobody receives would wait for ever.
        self._call("subnet_ready", {})
        wanted = {"num_bytes": str(payload.numel()), **fields}
        with ThreadPoolExecutor(max_workers=1) as executor:
            calling = executor.submit(self._call, method, wanted)
            group.broadcast(payload.to(getattr(group, "device", payload.device)), src=0)
            answers = calling.result()
        self.num_bytes += payload.numel()
        acknowledged = {answered(fields) for fields in answers}
        if len(acknowledged) != 1:
            raise WeightSyncError(f"The workers of the server disagree: {sorted(map(str, acknowledged))}.")
        return acknowledged.pop()

    def _call(self, method: str, keywords: dict[str, str]) -> list[Any]:
        response = self._client.session.post(
            f"{self._client.base_url}/collective_rpc", json={"method": method, "kwargs": keywords}
        )
        if response.status_code != 200:
            raise WeightSyncError(
                f"The server at {self._client.base_url} was asked to call `{method}` of its workers and answers "
                f"{response.status_code}: {response.text[:200]}. Was it started with `VLLM_SERVER_DEV_MODE=1` and "
                f"`--worker-extension-cls {__name__}.ValuesWorker`?"
            )
        results: list[Any] = response.json()["results"]
        return results


class ValuesWorker:
    """A worker extension for vLLM: holds the base in memory of the host, and hands changed tensors to `load_weights`.

    vLLM makes this class a base of its worker, which has `device`, `model_runner`, `vllm_config` and
    `weight_transfer_engine`. Arguments are text, because vLLM passes nothing else on.
    """

    device: torch.device
    model_runner: Any
    vllm_config: Any
    weight_transfer_engine: Any
    _receiver: ValuesReceiver | None = None

    def subnet_ready(self) -> dict[str, str]:
        """Say that updates can be taken."""
        return {}

    def subnet_open(self, num_bytes: str) -> dict[str, Any]:
        """Take the mask; the base is read from where the engine was loaded from."""
        payload = self._received(num_bytes)
        return answer(lambda: self._open(Opening.from_bytes(payload.cpu().numpy().tobytes())))

    def subnet_update(self, num_bytes: str, start: str) -> dict[str, Any]:
        """Take values."""
        payload = self._received(num_bytes)

        def take() -> Acknowledgement:
            if self._receiver is None:
                raise WeightSyncError("The worker was not opened, so it has no mask. Send the opening first.")
            return self._receiver.update(ValuesUpdate.unpack(base64.b64decode(start), payload))

        return answer(take)

    def _received(self, num_bytes: str) -> torch.Tensor:
        payload = torch.empty(int(num_bytes), dtype=torch.uint8, device=self.device)
        self.weight_transfer_engine.model_update_group.broadcast(payload, src=0)
        return payload

    def _open(self, opening: Opening) -> Acknowledgement:
        if self._receiver is None:
            model = self.vllm_config.model_config
            load: Callable[..., object] = self.model_runner.model.load_weights
            known = opening.base.dtypes
            stored = open_checkpoint(model.model, revision=model.revision).tensors()
            # Names that the trainer does not have keep their dtype, and the receiver refuses them by name. A copy,
            # because what is read may be mapped from its file.
            tensors = {
                name: tensor.to(getattr(torch, known[name]) if name in known else tensor.dtype, copy=True)
                for name, tensor in stored
            }
            receiver = ValuesReceiver(tensors, load=load)
            acknowledgement = receiver.open(opening)
            self._receiver = receiver
            return acknowledgement
        return self._receiver.open(opening)
