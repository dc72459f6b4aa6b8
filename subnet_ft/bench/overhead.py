"""What `restrict` adds to a training step besides the optimizer's own update."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from subnet_ft.bench.memory import DENSITY, dpo_trainer, random_mask
from subnet_ft.optim import MaskedBase

_WARM_UP = 2


def measure_overhead(base: Path, *, density: float = DENSITY, repeats: int = 7) -> dict[str, Any]:
    """Train `base` for some DPO steps with TRL, restricted and audited at every step, and return a row of the bench.

    Inside each step, the time spent in our code is taken on the spot: the hooks that compact gradients, both norms'
    work, and what `step` does around its update. That is the overhead; the update itself is what any optimizer has.

    Args:
        base: Folder of a causal language model.
        density: Of the uniform random mask.
        repeats: Timed steps; two more warm up.

    Returns:
        A row with `median_ms` (overhead per step), `step_ms` (the whole training step, without the audit), `update_ms`,
        `overhead_share` (of the training step) and `audit_ms` (one audit of the frozen weights).
    """
    from subnet_ft.checkpoints.models import load_model
    from subnet_ft.training import FrozenWeightAudit, restrict

    model, tokenizer = load_model(base, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        trainer = dpo_trainer(model, tokenizer, Path(folder), steps=repeats + _WARM_UP)
        restrict(trainer, random_mask(model, density))
        clock = _Clock()
        build = trainer.create_optimizer

        def create_optimizer(*args: Any) -> Any:
            optimizer = build(*args)
            clock.watch(trainer.masked_optimizer)
            return optimizer

        trainer.create_optimizer = create_optimizer
        for name in ("_clip_grad_norm", "_get_grad_norm"):
            setattr(trainer, name, clock.timed(getattr(trainer, name)))
        audit = FrozenWeightAudit(1)
        trainer.add_callback(clock)  # before the audit, whose time is its own
        trainer.add_callback(audit)
        trainer.train()
    steps = clock.steps[_WARM_UP:]
    overhead, update, whole = (statistics.median(step[index] for step in steps) for index in range(3))
    return {
        "op": "restrict_overhead",
        "method": "compaction, norms and bookkeeping in a DPO step",
        "density": density,
        "median_ms": 1000 * overhead,
        "bytes_per_parameter": None,
        "update_ms": 1000 * update,
        "step_ms": 1000 * whole,
        "overhead_share": overhead / whole,
        "audit_ms": 1000 * audit.seconds / audit.num_audits,
    }


class _Clock(TrainerCallback):
    """Seconds per step of our code, of the update in it, and of everything."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, float]] = []
        self._depth = 0
        self._ours = self._update = self._began = 0.0

    def watch(self, optimizer: MaskedBase) -> None:
        """Time what an optimizer does: its hooks, its step, and the update within."""
        inner: Any = optimizer
        inner._gradients.add = self.timed(inner._gradients.add)
        inner.step = self.timed(inner.step)
        update = inner._update

        def timed_update(*args: Any) -> None:
            start = time.perf_counter()
            update(*args)
            self._update += time.perf_counter() - start

        inner._update = timed_update

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time counts as ours, once where such functions call each other."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self._ours += time.perf_counter() - start

        return run

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the step."""
        self._ours = self._update = 0.0
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what the step took."""
        self.steps.append((self._ours - self._update, self._update, time.perf_counter() - self._began))
