"""Ways to a receiver that is not in this process: bytes over HTTP, and broadcasts in a process group."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from subnet_ft.errors import WeightSyncError
from subnet_ft.training.weight_sync.message import Acknowledgement, Opening, ValuesUpdate

_CLOSE, _OPEN, _UPDATE = range(3)


class Receiver(Protocol):
    """What takes the messages; a `ValuesReceiver`."""

    def open(self, opening: Opening) -> Acknowledgement:
        """Take a mask."""

    def update(self, update: ValuesUpdate) -> Acknowledgement:
        """Apply values and verify them."""


def answer(take: Callable[[], Acknowledgement]) -> dict[str, Any]:
    """Call a receiver and put its acknowledgement, or the reason of a refusal under `error`, into fields of text."""
    try:
        return take().to_fields()
    except WeightSyncError as error:
        return {"error": str(error)}


def answered(fields: Any) -> Acknowledgement:
    """Read what `answer` returned.

    Raises:
        WeightSyncError: The receiver refused, or the fields are none of its.
    """
    if not isinstance(fields, dict):
        raise WeightSyncError(f"The receiver answered {fields!r}, expected an acknowledgement.")
    if "error" in fields:
        raise WeightSyncError(f"The receiver refused: {fields['error']}")
    return Acknowledgement.from_fields(fields)


def respond(receiver: Receiver, path: str, body: bytes) -> dict[str, Any] | None:
    """Answer an HTTP request of `HTTPChannel` in whatever server there is.

    Returns:
        The JSON object to answer with, or `None` where the path is not one of the channel's.
    """
    last = path.rpartition("/")[2]
    if last == "open":
        return answer(lambda: receiver.open(Opening.from_bytes(body)))
    if last == "update":
        return answer(lambda: receiver.update(ValuesUpdate.from_bytes(body)))
    return None


class HTTPChannel:
    """Posts messages as bytes to `URL/open` and `URL/update` of a server that calls `respond`.

    Args:
        url: Where, such as `http://10.0.0.2:8000/values`.
        timeout: Seconds to wait for an answer.
    """

    def __init__(self, url: str, *, timeout: float = 300.0) -> None:
        self._url = url.rstrip("/")
        self._timeout = timeout
        self.num_bytes = 0
        """Bytes of messages posted so far."""

    def open(self, opening: Opening) -> Acknowledgement:
        """Bring the mask over."""
        return self._post("open", opening.to_bytes())

    def update(self, update: ValuesUpdate) -> Acknowledgement:
        """Bring values over."""
        return self._post("update", update.to_bytes())

    def _post(self, path: str, body: bytes) -> Acknowledgement:
        request = urllib.request.Request(
            f"{self._url}/{path}", body, {"Content-Type": "application/octet-stream"}, method="POST"
        )
        self.num_bytes += len(body)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                content = response.read()
        except (OSError, urllib.error.URLError) as error:
            raise WeightSyncError(
                f"`{self._url}/{path}` gave no answer: {error}. What was sent may have arrived; the next update holds "
                "all values, so it makes no difference."
            ) from error
        try:
            return answered(json.loads(content))
        except ValueError as error:
            raise WeightSyncError(f"`{self._url}/{path}` answered no JSON: {content[:100]!r}") from error


class GroupChannel:
    """Broadcasts messages in a process group whose other processes call `receive`; all of them must take a message.

    Args:
        group: The group; `None` is the default one.
        src: Global rank of this process.
        device: Where messages lie while they are exchanged: one that the group's backend can send.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, src: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self._group, self._src, self._device = group, src, torch.device(device)
        self.num_bytes = 0
        """Bytes of messages broadcast so far, counted once however many receive."""

    def open(self, opening: Opening) -> Acknowledgement:
        """Bring the mask over."""
        payload = _as_tensor(opening.to_bytes(), self._device)
        return self._broadcast(_OPEN, b"", payload)

    def update(self, update: ValuesUpdate) -> Acknowledgement:
        """Bring values over; they go from their device to the group's without a detour."""
        return self._broadcast(_UPDATE, *update.pack())

    def close(self) -> None:
        """End the loops of the receivers."""
        dist.broadcast(torch.tensor([_CLOSE, 0, 0], device=self._device), self._src, group=self._group)

    def _broadcast(self, kind: int, header: bytes, payload: torch.Tensor) -> Acknowledgement:
        text = _as_tensor(header, self._device)
        head = torch.tensor([kind, text.numel(), payload.numel()], device=self._device)
        for part in (head, text, payload.to(self._device)):
            dist.broadcast(part, self._src, group=self._group)
            self.num_bytes += part.nbytes
        answers = [fields for fields in _exchanged(b"", self._group, self._device) if fields]
        acknowledged = {answered(json.loads(fields)) for fields in answers}
        if len(acknowledged) != 1:
            raise WeightSyncError(f"The receivers of the group disagree: {sorted(map(str, acknowledged))}.")
        return acknowledged.pop()


def receive(
    receiver: Receiver,
    group: dist.ProcessGroup | None = None,
    *,
    src: int = 0,
    device: torch.device | str = "cpu",
) -> bool:
    """Take one message of a `GroupChannel` and answer it.

    Args:
        receiver: Takes it; what it refuses is reported to the sender.
        group, src, device: As in the channel.

    Returns:
        Whether another message will follow.
    """
    where = torch.device(device)
    head = torch.zeros(3, dtype=torch.int64, device=where)
    dist.broadcast(head, src, group=group)
    kind, *sizes = head.tolist()
    if kind == _CLOSE:
        return False
    text, payload = (torch.empty(size, dtype=torch.uint8, device=where) for size in sizes)
    dist.broadcast(text, src, group=group)
    dist.broadcast(payload, src, group=group)

    def take() -> Acknowledgement:
        if kind == _OPEN:
            return receiver.open(Opening.from_bytes(_as_bytes(payload)))
        return receiver.update(ValuesUpdate.unpack(_as_bytes(text), payload))

    _exchanged(json.dumps(answer(take)).encode(), group, where)
    return True


def _exchanged(text: bytes, group: dist.ProcessGroup | None, device: torch.device) -> list[bytes]:
    """Return the texts of all processes of a group, in the order of its ranks."""
    own = _as_tensor(text, device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([own.numel()], device=device), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: own.numel()] = own
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded, group=group)
    return [_as_bytes(each[: int(length)]) for each, length in zip(texts, lengths, strict=True)]


def _as_tensor(content: bytes, device: torch.device) -> torch.Tensor:
    if not content:
        return torch.empty(0, dtype=torch.uint8, device=device)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)


def _as_bytes(tensor: torch.Tensor) -> bytes:
    content: bytes = tensor.cpu().numpy().tobytes()
    return content
