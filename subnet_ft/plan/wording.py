"""A plan as text for a terminal, and as an object for scripts."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from subnet_ft import __version__
from subnet_ft.plan.advice import Advice
from subnet_ft.plan.build import CLASSICAL, RESERVED_BYTES, RESERVED_SHARE, Plan, Row
from subnet_ft.plan.rank import Part
from subnet_ft.plan.units import size_text

_WIDTH = 100
_NAMES = {"subnet": "subnetwork", CLASSICAL: "torch's AdamW, bf16 state, no masters", "full": "full run"}
_LAUNCHES = {"none": "one process", "ddp": "DDP", "fsdp2": "FSDP2", "fsdp2_offload": "FSDP2, offloaded to the CPU"}
_FSDP_SENTENCE = (
    "FSDP2 saves state, not traffic: it gathers the weights for every forward and backward pass and reduces dense "
    "gradients; DDP reduces the trained values only."
)


def lines_for_terminal(plan: Plan, advice: Mapping[Row, tuple[Advice, ...]]) -> list[str]:
    """Return the plan as lines.

    Args:
        plan: The plan.
        advice: What to change, for rows that do not fit.
    """
    lines = _head(plan)
    for row in plan.rows:
        lines += ["", *_row_lines(plan, row, advice.get(row, ()))]
    if any(row.sharding.startswith("fsdp2") and row.memory is not None for row in plan.rows):
        lines += ["", *_wrapped(_FSDP_SENTENCE)]
    if plan.assumptions:
        lines += ["", "Assumed:", *(line for text in plan.assumptions for line in _wrapped(text, mark="- "))]
    return lines


def plan_to_dict(plan: Plan, advice: Mapping[Row, tuple[Advice, ...]]) -> dict[str, Any]:
    """Return the plan as one object; docs/plan.md says what its keys are. All sizes are bytes of one rank."""
    setting = plan.setting
    generation = setting.generation
    return {
        "version": __version__,
        "algorithm": plan.recipe.algorithm,
        "model": plan.recipe.model.name,
        "num_parameters": plan.rows[0].num_parameters,
        "density": plan.density,
        "density_from": plan.density_from,
        "gpus": plan.request.gpus,
        "device": plan.request.device,
        "memory": plan.request.memory,
        "reserve": None if plan.request.memory is None else RESERVED_BYTES + int(plan.request.memory * RESERVED_SHARE),
        "step": {
            "sequences": setting.sequences,
            "tokens": setting.length,
            "micro_batches": setting.micro_batches,
            "activation_checkpointing": setting.activation_checkpointing,
            "completions_at_a_time": None if generation is None else generation.sequences,
        },
        "assumptions": list(plan.assumptions),
        "rows": [_row_to_dict(row, advice.get(row, ())) for row in plan.rows],
    }


def _row_to_dict(row: Row, advice: tuple[Advice, ...]) -> dict[str, Any]:
    common: dict[str, Any] = {"method": row.method, "sharding": row.sharding, "refused": row.refused}
    if row.memory is None or row.traffic is None:
        return common
    memory, traffic = row.memory, row.traffic
    return {
        **common,
        "num_trainable": row.num_trainable,
        "persistent": _parts(memory.persistent),
        "host": _parts(memory.host),
        "phases": {phase.name: {"bytes": phase.nbytes, "parts": _parts(phase.parts)} for phase in memory.phases},
        "persistent_bytes": memory.persistent_bytes,
        "peak_phase": memory.largest.name,
        "peak_bytes": memory.total,
        "fits": row.fits,
        "traffic": {
            "gradients": traffic.gradients,
            "weights": traffic.weights,
            "generation": traffic.generation,
            "host": traffic.host,
            "dense_gradients": traffic.dense_gradients,
            "total": traffic.total,
        },
        "advice": [
            {"change": one.change, "reason": one.reason, "peak_bytes": one.total, "saves": one.saved, "fits": one.fits}
            for one in advice
        ],
    }


def _parts(parts: tuple[Part, ...]) -> dict[str, dict[str, Any]]:
    return {part.name: {"bytes": part.nbytes, "exact": part.is_exact} for part in parts}


def _head(plan: Plan) -> list[str]:
    setting, generation = plan.setting, plan.setting.generation
    dtype = str(plan.shapes.dtype).removeprefix("torch.")
    weights = plan.rows[0].num_parameters or sum(row.num_parameters for row in plan.rows[:1])
    checkpointing = "on" if setting.activation_checkpointing else "off"
    where = f"{plan.request.gpus} GPUs" if plan.request.gpus > 1 else "one GPU"
    text = (
        f"{plan.recipe.algorithm} on {plan.recipe.model.name}: {weights:,} weights in {dtype}, {where}. A micro-batch "
        f"is {setting.sequences} sequences of up to {setting.length:,} tokens, a step {setting.micro_batches} of them; "
        f"activation checkpointing is {checkpointing}."
    )
    if generation is not None and generation.engine == "trainer":
        text += f" {generation.sequences} completions are sampled at a time."
    return _wrapped(text, indent="")


def _row_lines(plan: Plan, row: Row, advice: tuple[Advice, ...]) -> list[str]:
    name = _NAMES.get(row.method, row.method)
    if row.method == "subnet":
        name += f", density {plan.density:.3g}"
    title = f"{name}, {_LAUNCHES[row.sharding]}"
    if row.memory is None or row.traffic is None:
        return [f"{title}: refused, because {row.refused}."]
    memory, phase = row.memory, row.memory.largest
    verdict = "" if row.fits is None else f": {'fits' if row.fits else 'does not fit'}"
    of = "" if row.budget is None else f" of {size_text(row.budget)}"
    lines = [f"{title}: {size_text(memory.total)}{of} per rank{verdict}"]
    lines += [_part_line(part) for part in memory.persistent]
    lines += [f"  at the peak ({phase.name}):", *(_part_line(part, "    ") for part in phase.parts if part.nbytes)]
    others = [f"{other.name} {size_text(other.nbytes)}" for other in memory.phases if other is not phase]
    if others:
        lines.append(f"  other parts of a step add less: {', '.join(others)}")
    if memory.host:
        host = sum(part.nbytes for part in memory.host)
        lines += [f"  in the memory of the CPU, per rank: {size_text(host)}"]
        lines += [_part_line(part, "    ") for part in memory.host]
    lines += _traffic_lines(row)
    lines += _advice_lines(advice, row)
    return lines


def _part_line(part: Part, indent: str = "  ") -> str:
    kind = "exact" if part.is_exact else "estimate"
    return f"{indent}{part.name:<{26 - len(indent)}} {size_text(part.nbytes):>9}  {kind}"


def _traffic_lines(row: Row) -> list[str]:
    traffic = row.traffic
    assert traffic is not None
    if row.gpus == 1:
        return []
    what = {"gradients": traffic.gradients, "weights": traffic.weights, "weights, to sample": traffic.generation}
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in what.items() if size)
    lines = [f"  sent per optimizer step: {size_text(traffic.total)} ({parts})"]
    if row.sharding == "ddp" and traffic.gradients != traffic.dense_gradients:
        lines.append(f"    dense gradients would be {size_text(traffic.dense_gradients)}")
    if traffic.host:
        lines.append(f"    and between CPU and GPU {size_text(traffic.host)}")
    return lines


def _advice_lines(advice: tuple[Advice, ...], row: Row) -> list[str]:
    if row.fits is not False or row.method == CLASSICAL:
        return []
    if not advice:
        return ["  nothing that was tried makes it smaller"]
    lines = ["  what would change that, each planned:"]
    for one in advice:
        verdict = "fits" if one.fits else "still does not fit"
        lines.append(f"    {one.change}")
        lines += _wrapped(f"{size_text(one.total)}, {verdict}. {one.reason}", indent="      ")
    return lines


def _wrapped(text: str, *, indent: str = "", mark: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent + mark,
        subsequent_indent=indent + " " * len(mark),
        break_long_words=False,
        break_on_hyphens=False,
    )
