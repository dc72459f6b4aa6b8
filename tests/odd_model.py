"""A small model whose rows no number of processes divides: tied weights, a norm, a branch, three rows for four."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from subnet_ft.masks import SubnetMask

VOCABULARY = 13


class OddModel(torch.nn.Module):
    """Predicts the next token; every build has the same weights."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = torch.nn.Embedding(VOCABULARY, 6)
        self.block = torch.nn.Linear(6, 7)
        self.narrow = torch.nn.Linear(7, 3)
        self.wide = torch.nn.Linear(3, 6)
        self.extra = torch.nn.Linear(6, 6, bias=False)
        self.head = torch.nn.Linear(6, VOCABULARY, bias=False)
        self.norm = torch.nn.LayerNorm(6, bias=False)
        self.head.weight = self.embedding.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor, *, branch: bool = True) -> torch.Tensor:
        """Return the loss () of token ids (B, T)."""
        hidden = self.embedding(tokens)
        hidden = hidden + self.wide(torch.tanh(self.narrow(torch.tanh(self.block(hidden)))))
        if branch:
            hidden = hidden + self.extra(hidden)
        logits = self.head(self.norm(hidden))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def batch(step: int) -> torch.Tensor:
    """Return the token ids (8, 5) of a step, of all processes together."""
    return torch.randint(0, VOCABULARY, (8, 5), generator=torch.Generator().manual_seed(step))


def odd_mask(seed: int = 1) -> SubnetMask:
    """Draw a third of the weights; nothing of one bias, and of the narrow layer only its last row."""
    generator = torch.Generator().manual_seed(seed)
    dense = {name: torch.rand(p.shape, generator=generator) < 0.4 for name, p in OddModel().named_parameters()}
    dense["block.bias"][:] = False
    dense["narrow.weight"][:-1] = False
    return SubnetMask.from_dense(dense)
