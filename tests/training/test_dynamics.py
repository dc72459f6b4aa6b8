"""Dynamics of a run against full copies of its weights and masters, through kills, and at bounded memory."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    FIRST_IS_BEST,
    FROZEN,
    SAVES,
    SubnetTrainer,
    cut_off,
    plain,
    restricted,
    usual_mask,
)
from training.masked_runs import Watch, same_state, same_weights, state_of, weights_of
from transformers import Trainer

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import TrainerError
from subnet_ft.evidence.dynamics import Dynamics, read_dynamics
from subnet_ft.masks import SubnetMask
from subnet_ft.training import TrainingDynamics
from subnet_ft.training.dynamics import DYNAMICS
from subnet_ft.training.run import full_mask
from subnet_ft.training.snapshots import SNAPSHOTS
from subnet_kernels import bits_view, join_master, round_to_weights

STEPS = 7
ACCUMULATED: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
KINDS: dict[str, dict[str, Any]] = {
    "masters": {},
    "remainders": {"subnet": {"master": "remainder"}},
    "full mask": {"mask": "full"},
    "full mask, remainders": {"mask": "full", "subnet": {"master": "remainder"}},
    "accumulation": ACCUMULATED,
    "dense gradients": {"subnet": {"compact_grads": False}},
    "SGD": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "float32, full mask": {"dtype": torch.float32, "mask": "full"},
}
LOST = ("num_updates", "changed_in_step", "lost_with_masters", "lost_without_masters")
Copies = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """Return what saves the tiny llama in a dtype, and gives its folder."""
    root = tmp_path_factory.mktemp("bases")

    def base(dtype: torch.dtype) -> Path:
        folder = root / str(dtype)
        if not folder.exists():
            tiny_model("llama").to(dtype).save_pretrained(folder)
        return folder

    return base


Bases = Callable[[torch.dtype], Path]


def run(
    folder: Path,
    bases: Bases,
    *,
    every: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    mask: Any = None,
    callback: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Build a restricted trainer with the callback, of seven steps at a rate at which weights come and go."""
    model = tiny_model("llama").to(dtype)
    trainer = restricted(
        folder,
        model=model,
        mask=full_mask(model) if mask == "full" else mask,
        **{"max_steps": STEPS, "learning_rate": 1e-3, "optim_args": None, **options},
    )
    trainer.add_callback(TrainingDynamics(bases(dtype), every, **(callback or {})))
    return trainer


def masters_of(trainer: Trainer) -> Copies:
    """Return copies of the float32 values of the trained weights."""
    weights, found = weights_of(trainer.model), {}
    state = state_of(trainer)
    for name, value in weights.items():
        stored = value[trainer.masked_optimizer.mask[name]]
        master = state.get(name, {}).get("master")
        if master is None:
            found[name] = stored.float()
        else:
            found[name] = join_master(stored, master) if master.dtype == torch.int16 else master
    return found


class FullCopies(Watch):
    """Keeps the weights and masters at the beginning and after every step: what the callback must do without."""

    def __init__(self, trainer: Any) -> None:
        self.weights: list[Copies] = []
        self.masters: list[Copies] = []
        super().__init__(end=lambda _: self.look(trainer))
        trainer.add_callback(self)
        trainer.add_callback(_AtStart(lambda: self.look(trainer)))

    def look(self, trainer: Any) -> None:
        self.weights.append(weights_of(trainer.model))
        self.masters.append(masters_of(trainer))


class _AtStart(Watch):
    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self.act = act

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.act()


def differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return bits_view(a.contiguous()) != bits_view(b.contiguous())


def flat(a: Copies, b: Copies) -> torch.Tensor:
    """Return (N,) bool over all weights: whose bits differ."""
    return torch.cat([differ(a[name], b[name]).view(-1) for name in a])


def share(part: torch.Tensor, whole: torch.Tensor) -> float | None:
    return int(part.sum()) / int(whole.sum()) if whole.any() else None


def naive(copies: FullCopies, mask: SubnetMask, *, every: int) -> dict[str, Any]:
    """Return the figures from full copies."""
    weights, masters = copies.weights, copies.masters
    last = len(weights) - 1
    steps = [step for step in range(1, last + 1) if step % every == 0 or step == last]
    changed = [flat(weights[0], weights[step]) for step in steps]
    final, everything = changed[-1], torch.ones_like(changed[-1])
    ever = [torch.stack(changed[: place + 1]).any(0) for place in range(len(steps))]
    found: dict[str, Any] = {
        "every": every,
        "steps": steps,
        "num_parameters": everything.numel(),
        "num_trainable": mask.num_trainable,
        "never": share(~ever[-1], everything),
        "cancelled": share(ever[-1] & ~final, everything),
        "final": share(final, everything),
        "density": [share(bits, everything) for bits in changed],
        "ever": [share(bits, everything) for bits in ever],
        "recall": [share(bits & final, final) for bits in changed],
        "coverage": [share(bits & final, bits) for bits in changed],
        "jaccard": [None, *(share(a & b, a | b) for a, b in itertools.pairwise(changed))],
        **{name: [] for name in LOST},
    }
    for step in steps:
        moved, stayed, plain_stayed = [], [], []
        for name, chosen in ((name, mask[name]) for name in mask.names):
            before, after = weights[step - 1][name][chosen], weights[step][name][chosen]
            exact, exact_after = masters[step - 1][name], masters[step][name]
            moved.append(differ(exact, exact_after))
            stayed.append(~differ(before, after))
            without = round_to_weights(before.float() + (exact_after - exact), before.dtype)
            plain_stayed.append(~differ(before, without))
        attempted = torch.cat(moved)
        found["num_updates"].append(int(attempted.sum()))
        found["changed_in_step"].append(share(flat(weights[step - 1], weights[step]), everything))
        found["lost_with_masters"].append(share(attempted & torch.cat(stayed), attempted))
        found["lost_without_masters"].append(share(attempted & torch.cat(plain_stayed), attempted))
    return found


def figures(dynamics: Dynamics, *, but: tuple[str, ...] = ("seconds",)) -> dict[str, Any]:
    return {name: value for name, value in vars(dynamics).items() if name not in but}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_training_dynamics_are_those_of_full_copies(kind: str, every: int, tmp_path: Path, bases: Bases) -> None:
    trainer = run(tmp_path, bases, every=every, **KINDS[kind])
    copies = FullCopies(trainer)
    trainer.train()
    found = read_dynamics(tmp_path)
    assert figures(found, but=("seconds", "peak_bytes", "disk_bytes", "missing")) == naive(
        copies, trainer.masked_optimizer.mask, every=every
    )
    assert found.missing == ""
    assert found.seconds > 0
    assert 0 < found.disk_bytes <= len(found.steps) * found.num_parameters / 8
    # What the comparison must be able to see.
    assert found.final > 0
    assert found.recall[-1] == found.coverage[-1] == 1
    if "float32" in kind:  # a weight changes at once, and never comes back to the bit
        assert set(found.lost_with_masters) == set(found.lost_without_masters) == {0.0}
    else:
        assert found.cancelled > 0
        assert found.never > 0
        assert any(0 < value < 1 for value in [*found.recall, *found.coverage])  # type: ignore[operator]
        assert all(0 <= value < 1 for value in [*found.lost_with_masters, *found.lost_without_masters])  # type: ignore[operator]
        assert any(found.lost_with_masters)
        assert found.lost_with_masters[1:] != found.lost_without_masters[1:]
    assert not (tmp_path / SNAPSHOTS).exists()


@pytest.mark.parametrize("kind", ["masters", "full mask, remainders", "accumulation", "SGD"])
def test_training_dynamics_change_no_bit(kind: str, tmp_path: Path, bases: Bases) -> None:
    watched = run(tmp_path / "a", bases, every=1, **KINDS[kind])
    watched.train()
    alone = run(tmp_path / "b", bases, every=1, **KINDS[kind])
    alone.remove_callback(TrainingDynamics)
    alone.train()
    assert not (tmp_path / "b" / DYNAMICS).exists()
    same_weights(weights_of(watched.model), weights_of(alone.model))
    same_state(state_of(watched), state_of(alone))


def test_training_dynamics_watch_only_the_steps_that_end_in_a_snapshot(tmp_path: Path, bases: Bases) -> None:
    trainer = run(tmp_path, bases, every=3, **ACCUMULATED)
    before: list[bool] = []
    after: list[bool] = []
    trainer.add_callback(
        Watch(
            before=lambda _: before.append(trainer.masked_optimizer.watch is not None),
            after=lambda _: after.append(trainer.masked_optimizer.watch is not None),
        )
    )
    trainer.train()
    assert before == [False, False, True, False, False, True, True]
    assert not any(after)


@pytest.mark.parametrize("after", [2, 3, 5])
@pytest.mark.parametrize("kind", ["masters", "full mask, remainders", "SGD"])
def test_training_dynamics_of_a_resumed_run_are_those_of_one_that_was_not_cut_off(
    kind: str, after: int, tmp_path: Path, bases: Bases
) -> None:
    straight = run(tmp_path / "straight", bases, **KINDS[kind])
    straight.train()
    saves = {**SAVES, "save_steps": 2}
    cut_off(run(tmp_path / "cut", bases, **KINDS[kind], **saves, max_steps=STEPS), after=after)
    again = run(tmp_path / "cut", bases, **KINDS[kind])
    resumable = after > 2
    again.train(resume_from_checkpoint=resumable or None)
    expected, found = read_dynamics(tmp_path / "straight"), read_dynamics(tmp_path / "cut")
    assert figures(found) == figures(expected)


def test_training_dynamics_take_snapshots_beyond_the_checkpoint_again(tmp_path: Path, bases: Bases) -> None:
    straight = run(tmp_path / "straight", bases)
    straight.train()
    kept = {"callback": {"keep_bitmaps": True}}
    run(tmp_path / "cut", bases, **SAVES, **kept).train()
    bitmaps = tmp_path / "cut" / SNAPSHOTS
    for path in bitmaps.iterdir():
        if path.name > "step-00000005":
            path.write_bytes(b"of another life")
    (bitmaps / "step-00000003.unfinished").write_bytes(b"half")
    again = run(tmp_path / "cut", bases, **kept)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert figures(read_dynamics(tmp_path / "cut")) == figures(read_dynamics(tmp_path / "straight"))
    assert sorted(path.name for path in bitmaps.iterdir()) == [f"step-0000000{n}.safetensors" for n in (2, 4, 6, 7)]


def test_training_dynamics_of_a_longer_run_forget_the_end_of_the_shorter(tmp_path: Path, bases: Bases) -> None:
    straight = run(tmp_path / "straight", bases, max_steps=9, lr_scheduler_type="constant")
    straight.train()
    kept = {"callback": {"keep_bitmaps": True}, "lr_scheduler_type": "constant"}
    run(tmp_path / "cut", bases, **SAVES, **kept).train()
    assert read_dynamics(tmp_path / "cut").steps == [2, 4, 6, 7]
    run(tmp_path / "cut", bases, max_steps=9, **kept).train(resume_from_checkpoint=True)
    found = read_dynamics(tmp_path / "cut")
    assert found.steps == [2, 4, 6, 8, 9]
    assert figures(found) == figures(read_dynamics(tmp_path / "straight"))


def test_training_dynamics_of_a_finished_run_stay_when_it_is_resumed(tmp_path: Path, bases: Bases) -> None:
    run(tmp_path, bases, **SAVES).train()
    before = (tmp_path / DYNAMICS).read_text()
    run(tmp_path, bases).train(resume_from_checkpoint=True)
    assert (tmp_path / DYNAMICS).read_text() == before
    with pytest.raises(TrainerError, match=r"no snapshot of step 2, .*`keep_bitmaps`"):
        run(tmp_path, bases).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_training_dynamics_refuse_snapshots_of_another_rhythm_or_base(tmp_path: Path, bases: Bases) -> None:
    cut_off(run(tmp_path, bases, **SAVES), after=5)
    with pytest.raises(TrainerError, match=r"no snapshot of step 3"):
        run(tmp_path, bases, every=3).train(resume_from_checkpoint=True)
    cut_off(run(tmp_path / "b", bases, **SAVES), after=5)
    with pytest.raises(TrainerError, match=r"was taken with `every=2` .*, this run has `every=4`"):
        run(tmp_path / "b", bases, every=4).train(resume_from_checkpoint=True)
    cut_off(run(tmp_path / "c", bases, **SAVES), after=5)
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(TrainerError, match=r"The snapshot of step 2 .* and base \w{16} "):
        run(tmp_path / "c", lambda _: tmp_path / "other").train(resume_from_checkpoint=True)
    # What was refused is still there for the right callback.
    for folder in (tmp_path, tmp_path / "b", tmp_path / "c"):
        run(folder, bases).train(resume_from_checkpoint=True)
        assert read_dynamics(folder).steps == [2, 4, 6, 7]


def test_a_snapshot_that_cannot_be_read_is_named(tmp_path: Path, bases: Bases) -> None:
    cut_off(run(tmp_path, bases, **SAVES), after=5)
    (tmp_path / SNAPSHOTS / "step-00000002.safetensors").write_bytes(b"half")
    with pytest.raises(TrainerError, match=r"step-00000002.safetensors` cannot be read"):
        run(tmp_path, bases).train(resume_from_checkpoint=True)


def test_training_dynamics_refuse_another_base_and_another_model(tmp_path: Path, bases: Bases) -> None:
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(TrainerError, match=r"does not start from .*`model.embed_tokens.weight` has other weights"):
        run(tmp_path, lambda _: tmp_path / "other").train()
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "smaller")
    with pytest.raises(TrainerError, match=r"`model.layers.1.*` of shape .* is missing there"):
        run(tmp_path, lambda _: tmp_path / "smaller").train()
    with pytest.raises(ValueError, match="`every` must be >= 1, got 0"):
        TrainingDynamics(bases(torch.bfloat16), 0)
    trainer = plain(tmp_path, callbacks=[TrainingDynamics(bases(torch.bfloat16), 1)])
    with pytest.raises(TrainerError, match="not a masked one"):
        trainer.train()


def test_a_weight_that_goes_and_comes_back_is_cancelled(tmp_path: Path, bases: Bases) -> None:
    """One weight leaves the base at step 2 and is there again at step 4; nobody sees one that is away for step 5."""

    def flip(trainer: Trainer, place: int) -> None:
        weight = dict(trainer.model.named_parameters())[FROZEN].data.view(-1)
        weight.view(torch.int16).numpy()[place] ^= 1

    trainer = run(tmp_path, bases, learning_rate=0.0)
    places = {2: [0, 1], 4: [0], 5: [9], 6: [9]}
    trainer.add_callback(Watch(after=lambda step: [flip(trainer, place) for place in places.get(step, [])]))
    trainer.train()
    found = read_dynamics(tmp_path)
    n = found.num_parameters
    assert (found.never, found.cancelled, found.final) == ((n - 2) / n, 1 / n, 1 / n)
    assert found.density == [2 / n, 1 / n, 1 / n, 1 / n]
    assert found.coverage == [0.5, 1.0, 1.0, 1.0]
    assert found.jaccard == [None, 0.5, 1.0, 1.0]
    assert found.num_updates == [0] * 4
    assert found.lost_with_masters == found.lost_without_masters == [None] * 4


class BackAndForth(SubnetTrainer):
    """Every weight has the gradient 1 in the first two steps and -1 in the next two."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = sum(parameter.float().sum() for parameter in model.parameters() if parameter.requires_grad)
        return loss if self.state.global_step < 2 else -loss


def test_a_run_that_goes_back_cancels_all_it_changed(tmp_path: Path, bases: Bases) -> None:
    trainer = plain(
        tmp_path,
        trainer_class=BackAndForth,
        arguments={"subnet_mask": usual_mask()},
        **{"optim": "sgd", "learning_rate": 2.0**-9, "weight_decay": 0.0, "max_grad_norm": 0.0},
        lr_scheduler_type="constant",
    )
    trainer.add_callback(TrainingDynamics(bases(torch.bfloat16), 1))
    trainer.train()
    found = read_dynamics(tmp_path)
    # Sums of a weight and the rate are exact in float32, but for the smallest weights.
    assert found.cancelled > 0.05
    assert found.final < 0.1 * found.cancelled
    assert found.density[1] >= found.density[0] > found.density[3]
    assert found.lost_with_masters[0] == found.lost_without_masters[0]


MISSING: dict[str, tuple[dict[str, Any], str]] = {
    "stochastic": ({"subnet": {"master": "stochastic"}}, "weights are rounded stochastically"),
    "NAdam": (
        {"arguments": {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 1e-3})}},
        "`NAdam` updates all tensors in a step of its own",
    ),
}


@pytest.mark.parametrize("kind", MISSING)
def test_training_dynamics_say_what_is_missing_and_give_the_rest(kind: str, tmp_path: Path, bases: Bases) -> None:
    options, reason = MISSING[kind]
    trainer = run(tmp_path, bases, every=3, **options)
    copies = FullCopies(trainer)
    trainer.train()
    found = read_dynamics(tmp_path)
    assert reason in found.missing
    for name in LOST:
        assert getattr(found, name) == [None] * 3
    but = (*LOST, "seconds", "peak_bytes", "disk_bytes", "missing")
    expected = naive(copies, trainer.masked_optimizer.mask, every=3) if kind == "NAdam" else None
    if expected is None:  # there are no masters to copy
        changed = flat(copies.weights[0], copies.weights[-1])
        assert found.final == share(changed, torch.ones_like(changed))
    else:
        assert figures(found, but=but) == {key: value for key, value in expected.items() if key not in but}


def test_training_dynamics_of_weights_rounded_without_masters(tmp_path: Path, bases: Bases) -> None:
    run(tmp_path, bases, subnet={"master": "none"}).train()
    found = read_dynamics(tmp_path)
    assert found.lost_with_masters == [None] * 4
    for count, changed, lost in zip(found.num_updates, found.changed_in_step, found.lost_without_masters, strict=True):
        assert count * (1 - lost) == pytest.approx(changed * found.num_parameters)  # type: ignore[operator]


class StopAtThree(Watch):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 3


def test_training_dynamics_of_a_run_that_is_stopped_early(tmp_path: Path, bases: Bases) -> None:
    trainer = run(tmp_path, bases)
    trainer.add_callback(StopAtThree())
    trainer.train()
    found = read_dynamics(tmp_path)
    assert found.steps == [2, 3]
    assert [count is None for count in found.num_updates] == [False, True]
    assert (tmp_path / SNAPSHOTS).is_dir()  # it may go on
    changed = flat(weights_of(tiny_model("llama")), weights_of(trainer.model))
    assert found.final == share(changed, torch.ones_like(changed))


def test_the_best_model_is_not_taken_for_the_end(
    tmp_path: Path, bases: Bases, caplog: pytest.LogCaptureFixture
) -> None:
    straight = run(tmp_path / "straight", bases)
    straight.train()
    best = run(tmp_path / "best", bases, **FIRST_IS_BEST)
    best.train()
    assert figures(read_dynamics(tmp_path / "best")) == figures(read_dynamics(tmp_path / "straight"))
    assert "is not that of the last step" not in caplog.text
    stopped = run(tmp_path / "stopped", bases, **FIRST_IS_BEST)
    stopped.add_callback(StopAtThree())
    stopped.train()
    found = read_dynamics(tmp_path / "stopped")
    assert (found.steps, found.density) == ([2], read_dynamics(tmp_path / "straight").density[:1])
    assert "the model is not that of the last step: the last snapshot stands for the run's end" in caplog.messages


def test_training_dynamics_go_where_they_are_told(tmp_path: Path, bases: Bases) -> None:
    callback = {"file": tmp_path / "results" / "of-a-run.json", "keep_bitmaps": True}
    run(tmp_path / "trainer", bases, callback=callback).train()
    assert read_dynamics(tmp_path / "results" / "of-a-run.json").steps == [2, 4, 6, 7]
    assert not (tmp_path / "trainer" / DYNAMICS).exists()
    assert len(list((tmp_path / "trainer" / SNAPSHOTS).iterdir())) == 4


def test_a_new_run_in_a_used_folder_starts_anew(tmp_path: Path, bases: Bases) -> None:
    run(tmp_path, bases, every=1, callback={"keep_bitmaps": True}).train()
    trainer = run(tmp_path, bases, every=3)
    cut_off(trainer, after=2)
    assert not (tmp_path / DYNAMICS).exists()
    assert not (tmp_path / SNAPSHOTS).exists()


def test_what_the_callback_writes_is_what_evidence_reads(tmp_path: Path, bases: Bases) -> None:
    run(tmp_path, bases).train()
    written = json.loads((tmp_path / DYNAMICS).read_text())
    assert set(written) == {"format", *Dynamics.__dataclass_fields__}


def test_the_code_on_the_page_runs(
    tmp_path: Path, bases: Bases, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Dynamics\n(.*?)(?=^## |\Z)", page, flags=re.M | re.S)
    (code,) = re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S)
    assert "Qwen/Qwen2.5-0.5B" in code
    names = {"trainer": plain(tmp_path, max_steps=11), "mask": usual_mask()}
    exec(code.replace("Qwen/Qwen2.5-0.5B", str(bases(torch.bfloat16))), names)
    found = read_dynamics(tmp_path)
    assert found.steps == [10, 11]
    assert (
        f"never {found.never:.1%}, cancelled {found.cancelled:.1%}, final {found.final:.1%}" in capsys.readouterr().out
    )
