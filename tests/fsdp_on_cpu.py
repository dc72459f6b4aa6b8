"""`subnet-ft` with one method of accelerate replaced, so that it shards on CPUs as it does on GPUs.

accelerate 1.15 joins CPUs as MULTI_CPU, and makes FSDP of every other kind of process but that one.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def _prepare_backend(self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None) -> Any:
    return "gloo", DistributedType.MULTI_GPU


PartialState._prepare_backend = _prepare_backend
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

if __name__ == "__main__":
    from subnet_ft.cli import main

    sys.exit(main())
