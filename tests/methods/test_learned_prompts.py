"""Models with an adapter write what they say is likeliest, one token after the other, whatever the cache is called."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bits

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.methods.adapters import adapter_parameters, attach

CONFIGS = {
    "lora": {},
    "adapters": {},
    "adaption_prompt": {},
    "prompt_tuning": {"num_virtual_tokens": 5},
    "prefix_tuning": {"num_virtual_tokens": 5},
}
PROMPT = torch.arange(30, 42).view(1, 12)


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_writes_the_likeliest_tokens(name: str) -> None:
    model = attach(tiny_model("llama", dtype=torch.float32), tiny_tokenizer(), name, CONFIGS[name], seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model).values():
        parameter.data += torch.randn(parameter.shape, generator=generator)
    tokens = PROMPT
    with torch.no_grad():
        for _ in range(8):
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, -1]
            tokens = torch.cat([tokens, logits.argmax().view(1, 1)], dim=1)
        written = model.generate(
            input_ids=PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
        )
        with model.disable_adapter():
            base = model.generate(
                input_ids=PROMPT,
                attention_mask=torch.ones_like(PROMPT),
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
            )
    assert same_bits(written, tokens)
    assert not torch.equal(written, base)
