"""A stand-in for `vllm serve`: the endpoints that TRL's client calls, with the same JSON, in a thread of this process.

Weights arrive over a socket of its own, which takes the place of NCCL. Beside vLLM's endpoints there are `/values/open`
and `/values/update`, as a server of one's own would have for `HTTPChannel`.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import torch
from vllm_stand_in.engine import EngineModel, SamplingParams

from subnet_ft.training.weight_sync import ValuesReceiver, respond


class SocketGroup:
    """A communicator of one trainer (rank 0) and one worker, with the methods of vLLM's that are called."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        self.group = SimpleNamespace(store=None, socket=connection)  # TRL drops both when it closes
        self._connection, self._rank = connection, rank
        self.num_bytes = 0
        self.seconds = 0.0

    def broadcast(self, tensor: torch.Tensor, src: int = 0, stream: Any = None) -> None:
        """Send, or fill, a tensor."""
        assert src == 0
        assert tensor.is_contiguous()
        view = memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())
        start = time.perf_counter()
        if self._rank == 0:
            self._connection.sendall(view)
        else:
            position = 0
            while position < len(view):
                read = self._connection.recv_into(view[position:])
                assert read, "the trainer has gone"
                position += read
        self.num_bytes += len(view)
        self.seconds += time.perf_counter() - start


def trainer_init(init_info: dict[str, Any]) -> SocketGroup:
    """Open the group as rank 0; stands for `vllm.distributed.weight_transfer.nccl_common.trainer_init`."""
    with socket.create_server((init_info["master_address"], init_info["master_port"])) as listener:
        listener.settimeout(30)
        connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return SocketGroup(connection, 0)


def worker_init(init_info: dict[str, Any]) -> SocketGroup:
    """Join the group as the worker."""
    address = (init_info["master_address"], init_info["master_port"])
    for _ in range(600):
        try:
            return SocketGroup(socket.create_connection(address, timeout=30), 1)
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise TimeoutError("the trainer did not open the group")


def packed_nccl_broadcast_producer(
    iterator: Iterator[tuple[str, torch.Tensor]],
    group: SocketGroup,
    src: int,
    post_iter_func: Callable[[tuple[str, torch.Tensor]], torch.Tensor],
) -> None:
    """Send tensors one after another; stands for the function of `vllm.distributed.weight_transfer.packed_tensor`."""
    for item in iterator:
        group.broadcast(post_iter_func(item).contiguous(), src=src)


class Worker:
    """The worker of the server; an extension class becomes one of its bases, as in vLLM."""

    def __init__(self, path: str) -> None:
        self.device = torch.device("cpu")
        self.model_runner = SimpleNamespace(model=EngineModel(path))
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(model=path, revision=None))
        self.weight_transfer_engine = SimpleNamespace(model_update_group=None)

    def receive_weights(self, update_info: dict[str, Any]) -> None:
        """Load the tensors that were announced, in their order."""
        keys = ("names", "dtype_names", "shapes")
        for name, dtype, shape in zip(*(update_info[key] for key in keys), strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.weight_transfer_engine.model_update_group.broadcast(tensor)
            self.model_runner.model.load_weights([(name, tensor)])


class Server:
    """Serves a model at `url` until it is closed.

    Args:
        path: Folder of the model.
        extension: Worker extension class, as `--worker-extension-cls` names one.
    """

    def __init__(self, path: str, extension: type | None = None) -> None:
        bases = (Worker,) if extension is None else (Worker, extension)
        self.worker: Any = type("ExtendedWorker", bases, {})(path)
        self.engine: EngineModel = self.worker.model_runner.model
        self.receiver = ValuesReceiver(self.engine.weights(), load=self.engine.load_weights)
        self.requests: list[tuple[str, int, int]] = []
        """Path, bytes of the body and bytes of the answer of every request."""
        self.is_updating = False
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        self._leave_group()

    def get(self, path: str) -> Any:
        """Answer a GET request."""
        return {
            "/health": {},
            "/v1/models": {"data": [{"id": "stand-in"}]},
            "/get_world_size": {"world_size": 1},
            "/server_info": {
                "vllm_config": {
                    "weight_transfer_config": {"backend": "nccl"},
                    "model_config": {"logprobs_mode": "processed_logprobs"},
                }
            },
        }.get(path)

    def post(self, path: str, body: bytes) -> Any:
        """Answer a POST request, one at a time; `None` where there is no such endpoint."""
        with self.lock:
            if path.startswith("/values/"):
                return respond(self.receiver, path, body)
            fields = json.loads(body) if body else {}
            if path == "/v1/completions":
                return {"choices": [choice for prompt in fields["prompt"] for choice in self._choices(prompt, fields)]}
            if path == "/init_weight_transfer_engine":
                self._leave_group()
                self.worker.weight_transfer_engine.model_update_group = worker_init(fields["init_info"])
            elif path in ("/start_weight_update", "/finish_weight_update"):
                assert self.is_updating == (path == "/finish_weight_update")
                self.is_updating = not self.is_updating
            elif path == "/update_weights":
                assert self.is_updating
                self.worker.receive_weights(fields["update_info"])
            elif path == "/collective_rpc":
                method = getattr(self.worker, fields["method"], None)
                if method is None:
                    raise ValueError(f"the worker has no method {fields['method']}")
                return {"results": [method(*fields.get("args", []), **fields.get("kwargs", {}))]}
            elif path == "/reset_prefix_cache":
                return {"success": True}
            else:
                return None
            return {}

    def _leave_group(self) -> None:
        if (group := self.worker.weight_transfer_engine.model_update_group) is not None:
            group.group.socket.close()

    def _choices(self, prompt: list[int], fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the completions of one prompt as the completions endpoint returns them."""
        for output in self.engine.generate(prompt, SamplingParams(**fields)).outputs:
            logprobs = [next(iter(step.values())).logprob for step in output.logprobs]
            names = [f"token_id:{token}" for token in output.token_ids]
            yield {
                "prompt_token_ids": prompt,
                "token_ids": output.token_ids,
                "logprobs": {"tokens": names, "token_logprobs": logprobs, "top_logprobs": [None] * len(names)},
            }


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # an answer of two writes would wait 40 ms for the client's acknowledgement

        def do_GET(self) -> None:
            self._answer(lambda path: server.get(path), 0)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(lambda path: server.post(path, body), len(body))

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

        def _answer(self, answer: Callable[[str], Any], size: int) -> None:
            path = self.path.partition("?")[0]
            try:
                status, found = 200, answer(path)
            except Exception as error:  # a code that TRL's client does not try again
                status, found = 400, {"error": f"{type(error).__name__}: {error}"}
            content = json.dumps(found).encode()
            server.requests.append((path, size, len(content)))
            self.send_response(404 if found is None else status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
