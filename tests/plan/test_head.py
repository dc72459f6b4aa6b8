from __future__ import annotations

import pytest
import torch

from subnet_ft.bench.tracker import StorageTracker
from subnet_ft.checkpoints.tiny import tiny_config
from subnet_ft.plan.head import COLUMNS_PER_TILE, TOKENS_PER_TILE, fused_head, no_head, whole_head
from subnet_ft.plan.shapes import read_shapes, shapes_of

SHAPES = read_shapes("tiny:llama", dtype="bfloat16")


def test_tiles_are_those_of_the_installed_trl() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    chunked = pytest.importorskip("trl.kernels.chunked_logprob", reason="TRL before 1.15 has no fused head")
    assert chunked.TOKEN_CHUNK_SIZE == TOKENS_PER_TILE
    assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == COLUMNS_PER_TILE


def test_fused_head_takes_what_trls_head_allocates_on_a_cpu() -> None:
    chunked = pytest.importorskip("trl.kernels.chunked_logprob", reason="TRL before 1.15 has no fused head")
    config = tiny_config("llama")
    config.vocab_size = COLUMNS_PER_TILE
    shapes = shapes_of(config, "large vocabulary", dtype="bfloat16")
    positions = 64
    hidden = torch.randn(positions, shapes.width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(shapes.vocabulary, shapes.width, dtype=torch.bfloat16, requires_grad=True)
    tracker = StorageTracker(lambda op, tensor: "head")
    with tracker:
        targets = torch.zeros(positions, dtype=torch.long)
        states = hidden.clone()  # the positions, as the trainer takes them out
        outputs = chunked.ChunkedLogProbFunction.apply(states, weight, None, targets, 1.0, COLUMNS_PER_TILE)
        outputs[0].sum().backward()
    planned = fused_head(shapes, positions, is_trained=True, device="cpu")
    assert planned.logits + planned.gradient == pytest.approx(tracker.peaks()[0].total, rel=0.05)


def test_fused_head_holds_a_tile_however_many_tokens() -> None:
    few, many = (fused_head(SHAPES, n * TOKENS_PER_TILE, is_trained=True, device="cuda").logits for n in (1, 10))
    tile = TOKENS_PER_TILE * COLUMNS_PER_TILE * 2
    assert few == tile + TOKENS_PER_TILE * SHAPES.width * 6
    assert many - few == 9 * TOKENS_PER_TILE * SHAPES.width * 6


def test_fused_head_takes_more_on_a_cpu_and_no_gradient_where_the_head_is_frozen() -> None:
    cpu, cuda = (fused_head(SHAPES, 100, is_trained=True, device=device) for device in ("cpu", "cuda"))
    assert cpu.logits > cuda.logits
    assert cpu.gradient == cuda.gradient == 4 * SHAPES.vocabulary * SHAPES.width
    frozen = fused_head(SHAPES, 100, is_trained=False, device="cpu")
    assert (frozen.logits, frozen.gradient, frozen.kept_gradient) == (cpu.logits, 0, 0)


def test_whole_head_grows_with_every_token() -> None:
    one, two = (whole_head(SHAPES, n, is_trained=True).logits for n in (100, 200))
    assert two == 2 * one == 200 * SHAPES.vocabulary * 2 * 3
    assert no_head().logits == 0
