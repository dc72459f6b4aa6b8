"""Launch every op as on an H100, up to the driver, which only takes notes; prints them as JSON.

Tensors lie on the CPU and nothing is computed: this shows that arguments bind, specialise and compile as for a GPU,
which neither the interpreter nor compilation ahead of time does.
"""

from __future__ import annotations

import collections
import json
from typing import Any

import torch
import triton
from gpu_cases import WEIGHTS, adamw_update, sgd_update
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from subnet_kernels import gpu

launched: collections.Counter[str] = collections.Counter()
compiled: collections.Counter[str] = collections.Counter()


class Notes:
    """Stands where Triton starts a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name
        assert metadata.enable_fp_fusion is False
        assert metadata.num_warps == (1 if self.name.endswith("_slots") else 4), self.name
        compiled[self.name] += 1

    def __call__(self, *arguments: Any, **options: Any) -> None:
        launched[self.name] += 1


class Utils:
    def load_binary(self, *arguments: Any) -> tuple[str, str, int, int, int]:
        return "module", "function", 64, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}


class Driver(DriverBase):
    launcher_cls = Notes
    utils = Utils()

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    steps = [
        adamw_update(2500, density, weights, grad)
        for density in (0.3, 1.0)
        for weights, grad in zip(WEIGHTS, (None, torch.bfloat16, torch.float32, None, torch.float16), strict=True)
    ]
    for _ in range(3):
        gpu.masked_adamw(steps, grad_scale=torch.tensor(0.3), cache={})
    rules = ((0.0, False), (0.9, False), (0.9, True))
    descents = [
        sgd_update(2500, 0.3, "fp32", None, momentum=momentum, nesterov=nesterov) for momentum, nesterov in rules
    ]
    gpu.masked_sgd(descents, grad_scale=None, cache={})
    dense, mask = steps[0].param, steps[0].mask
    compact = torch.zeros(mask.count)
    for dtype in (torch.float32, torch.bfloat16):
        gpu.gather(dense.to(torch.bfloat16), mask, dtype=dtype)
    gpu.scatter(dense, mask, compact)
    gpu.swap(dense, mask, compact)
    for shift in range(2):  # another alignment compiles nothing anew
        moved = torch.zeros(2500 + shift)[shift:]
        for scale in (1.0, 0.5):
            gpu.compact(moved, mask, compact, accumulate=True, scale=scale)
    for size in (1, 16, 2049, 4096):
        for criterion in ("exact", "relative"):
            gpu.changed_bits(torch.zeros(size), torch.zeros(size), criterion=criterion, tolerance=1e-3)
        for offset in (0, 1, 16):
            gpu.fingerprint(torch.zeros(size), offset=offset, outside=None)
    gpu.fingerprint(dense, offset=2**33, outside=mask)
    print(json.dumps({"launched": launched, "compiled": compiled}))


if __name__ == "__main__":
    main()
