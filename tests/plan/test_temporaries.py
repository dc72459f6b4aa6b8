from __future__ import annotations

import pytest
import torch

from subnet_ft.bench.tracker import StorageTracker
from subnet_ft.checkpoints.tiny import FAMILIES, tiny_model
from subnet_ft.plan.shapes import read_shapes
from subnet_ft.plan.temporaries import ACTIVATIONS, owner_of, prefill, training_pass
from subnet_ft.plan.trained import adapted, fully, of_density

SEQUENCES, LENGTH = 3, 40


@pytest.mark.parametrize("family", FAMILIES)
def test_training_pass_equals_what_a_real_pass_allocates(family: str) -> None:
    model = tiny_model(family).train()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    decoder = model.base_model
    tracker = StorageTracker(owner_of({tuple(p.shape) for p in model.parameters()}))
    mask = torch.ones(SEQUENCES, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    ids = torch.ones(SEQUENCES, LENGTH, dtype=torch.long)
    with tracker:
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        saved = tracker.live[ACTIVATIONS]
        torch.autograd.backward(hidden, torch.ones_like(hidden))
    planned = training_pass(
        fully(read_shapes(f"tiny:{family}", dtype="bfloat16")), SEQUENCES, LENGTH, activation_checkpointing=False
    )
    # Experts group tokens by where they go, which a plan cannot know.
    assert planned.saved == pytest.approx(saved, rel=0.02)
    assert planned.peak == pytest.approx(tracker.peaks()[0].highest[ACTIVATIONS], rel=0.05)


def test_activation_checkpointing_keeps_the_input_of_every_layer_and_one_layer_at_a_time() -> None:
    trained = fully(read_shapes("tiny:llama", dtype="bfloat16"))
    kept, again = (training_pass(trained, 4, 64, activation_checkpointing=on) for on in (False, True))
    assert again.saved < 0.3 * kept.saved
    assert again.saved < again.peak < kept.peak


def test_training_pass_grows_with_tokens_and_not_with_the_density() -> None:
    shapes = read_shapes("tiny:llama", dtype="bfloat16")
    small, large = (training_pass(fully(shapes), n, 32, activation_checkpointing=False).saved for n in (2, 4))
    assert large == pytest.approx(2 * small, rel=0.01)
    sparse = training_pass(of_density(shapes, 0.1), 4, 32, activation_checkpointing=False)
    assert sparse.saved == large


def test_training_pass_through_an_adapter_keeps_what_the_adapter_computes() -> None:
    shapes = read_shapes("tiny:llama", dtype="bfloat16")
    base, lora = (
        training_pass(trained, 4, 32, activation_checkpointing=False)
        for trained in (fully(shapes), adapted(shapes, "lora", {}))
    )
    assert lora.saved > base.saved
    assert lora.gradient < base.gradient


def test_prefill_keeps_keys_and_values_of_every_layer() -> None:
    planned = prefill(fully(read_shapes("tiny:llama", dtype="bfloat16")), 4, 10)
    assert planned.cache == 2 * 2 * 4 * 10 * 2 * 8 * 2  # both, layers, sequences, tokens, heads, width, bytes
    assert planned.peak > planned.cache
