"""Fingerprints of parameters that one process holds are those of the kernel; those of parts are in `test_shards.py`."""

from __future__ import annotations

import torch
from odd_model import OddModel, odd_mask

import subnet_kernels
from subnet_ft.optim.binding import Binding
from subnet_ft.optim.fingerprints import fingerprints
from subnet_kernels.reference.splitmix import signed


def test_fingerprints_are_those_of_the_kernel() -> None:
    model = OddModel()
    parameters = dict(model.named_parameters())
    found = fingerprints(parameters)
    assert found == {name: subnet_kernels.fingerprint(p.detach()) for name, p in parameters.items()}
    binding = Binding(parameters, odd_mask())
    outside = fingerprints(parameters, lambda name: binding.trained(parameters[name]))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter[odd_mask()[name]] += 1
    assert fingerprints(parameters, lambda name: binding.trained(parameters[name])) == outside
    assert fingerprints(parameters) != found


def test_sums_of_signed_halves_wrap_around_as_the_fingerprint_does() -> None:
    halves = (3, 2**63, 2**64 - 1, 2**63 + 5)
    total = torch.stack([torch.tensor(signed(half)) for half in halves]).sum()
    assert int(total) % 2**64 == sum(halves) % 2**64
