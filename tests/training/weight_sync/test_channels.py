"""Ways to a receiver in another process: bytes over HTTP, and broadcasts in a process group."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from helpers import same_bits
from training.weight_sync.small_syncs import Pair, tensors_of

from subnet_ft.errors import WeightSyncError
from subnet_ft.training.weight_sync import HTTPChannel, ValuesReceiver, respond
from subnet_ft.training.weight_sync.channels import answered


class Service:
    """A server that does nothing but answer a channel; what it answers can be replaced."""

    def __init__(self, receiver: ValuesReceiver) -> None:
        service = self
        self.content: bytes | None = None
        self.num_bytes = 0

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.num_bytes += len(body)
                found = respond(receiver, self.path, body)
                content = json.dumps(found).encode() if service.content is None else service.content
                self.send_response(404 if found is None else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                """Say nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/values"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.fixture
def service(pair: Pair) -> Iterator[Service]:
    found = Service(pair.receiver)
    yield found
    found.http.shutdown()
    found.http.server_close()


def test_http_brings_mask_and_values_over(pair: Pair, service: Service) -> None:
    channel = HTTPChannel(service.url + "/")
    pair.sender.version = None
    for step in range(2):
        pair.train(step)
        pair.sender.push(channel)
        policy = tensors_of(pair.model)
        assert all(same_bits(tensor, policy[name]) for name, tensor in pair.receiver.tensors.items())
    assert pair.sender.version == 2
    assert channel.num_bytes == service.num_bytes > 0


def test_http_says_why_the_receiver_refused(pair: Pair, service: Service) -> None:
    channel = HTTPChannel(service.url)
    pair.train()
    late = pair.sender.update()
    pair.sender.push(channel)
    with pytest.raises(WeightSyncError, match="The receiver refused: Version 1, which follows 0, does not follow"):
        channel.update(late)
    assert pair.receiver.version == 2


def test_http_without_an_answer_leaves_the_sender_where_it_was(pair: Pair, service: Service) -> None:
    pair.train()
    with pytest.raises(WeightSyncError, match="/update` gave no answer"):
        pair.sender.push(HTTPChannel("http://127.0.0.1:9"))
    with pytest.raises(WeightSyncError, match="gave no answer: HTTP Error 404"):
        HTTPChannel(service.url)._post("elsewhere", b"")
    service.content = b"<html>"
    with pytest.raises(WeightSyncError, match="answered no JSON: b'<html>'"):
        pair.sender.push(HTTPChannel(service.url))
    assert (pair.sender.version, pair.receiver.version) == (0, 2), "it arrived all the same"
    service.content = None
    pair.sender.push(HTTPChannel(service.url))
    assert pair.sender.version == pair.receiver.version == 3


def test_respond_knows_its_paths_only(pair: Pair) -> None:
    assert respond(pair.receiver, "/v1/completions", b"") is None
    refused = respond(pair.receiver, "/values/update", b"")
    assert refused is not None
    assert "cut off" in refused["error"]


def test_answered_refuses_what_is_no_answer() -> None:
    with pytest.raises(WeightSyncError, match="answered \\[\\], expected an acknowledgement"):
        answered([])


def test_group_brings_mask_and_values_over(ranks: list[dict[str, Any]]) -> None:
    sent, received = (rank["group"] for rank in ranks)
    assert sent["weights"] == received["weights"]
    assert len({*sent["weights"]}) == 3
    assert sent["versions"] == received["versions"] == [1, 2, 3]


def test_group_reports_a_refusal_and_goes_on(ranks: list[dict[str, Any]]) -> None:
    sent, received = (rank["group"] for rank in ranks)
    assert "The receiver refused: Version 1, which follows 0" in sent["refused"]
    assert received["handled"] == 5  # opening, three updates, and the one that was refused


def test_group_sends_two_bytes_per_trained_weight(ranks: list[dict[str, Any]]) -> None:
    sent = ranks[0]["group"]
    values = 2 * sent["num_trainable"]
    assert values < sent["update_bytes"] < values + 400 * sent["num_tensors"] + 1000
