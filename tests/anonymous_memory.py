"""Peak anonymous memory of a piece of work in a fresh process; pages mapped from files do not count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

# Models load what they need of transformers lazily, so it is imported before anything is measured.
_PEAK = """
import json, sys, threading, time
import torch
from transformers import LlamaForCausalLM

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))

class Peak:
    def __enter__(self):
        self.before = self.peak = anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.start = time.perf_counter()
        self.thread.start()
        return self

    def sample(self):
        while not self.done.wait(0.001):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *error):
        self.seconds = time.perf_counter() - self.start
        self.done.set()
        self.thread.join()
        self.megabytes = self.peak - self.before
"""


def measure(work: str, *arguments: str) -> dict[str, Any]:
    """Run statements in a fresh process on one thread and return the JSON object that they print last.

    They find `json`, `sys`, `torch` and `Peak`: after `with Peak() as peak: ...`, `peak.megabytes` is the most that the
    block held beyond what was there before, in MiB, and `peak.seconds` the time it took.

    Args:
        work: The statements.
        arguments: `sys.argv[1:]` of the process.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        # glibc gives freed blocks back at once, so that the peak is what is held and not what it keeps for later.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    }
    command = [sys.executable, "-c", f"{_PEAK}\n{work}", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    printed: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return printed
