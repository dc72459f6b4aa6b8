"""The forecast finds the weights that simulated runs of AdamW change, and says how sure it is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.checkpoints.models import load_model
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.errors import MaskError, MaskMismatchError
from subnet_ft.masks import SubnetMask, base_mask
from subnet_ft.masks.forecast import change_probability, forecast_mask
from subnet_ft.masks.moments import Moments
from subnet_ft.masks.spacing import reach_keys

LR = 2e-5
STEPS = 40
Run = tuple[dict[int, Moments], torch.Tensor]


def simulated(weights: torch.Tensor, *, seed: int = 0, steps: int = STEPS, lr: float = LR) -> Run:
    """Train (n,) weights by torch's AdamW on float32 masters with random gradients of many sizes.

    A third of them has gradients far below eps, as tokens that never occur. Returns the moments after some steps, and
    (n,) bool: which stored weights changed in the end.
    """
    generator = torch.Generator().manual_seed(seed)
    master = torch.nn.Parameter(weights.float())
    sizes = 10 ** (2 * torch.rand(weights.shape, generator=generator) - 6)
    sizes[torch.rand(weights.shape, generator=generator) < 1 / 3] = 1e-12
    optimizer = torch.optim.AdamW([master], lr=lr, weight_decay=0.0)
    found: dict[int, Moments] = {}
    for step in range(1, steps + 1):
        master.grad = sizes * torch.randn(weights.shape, generator=generator)
        optimizer.step()
        if step in (1, 4, 12, 39):
            state = optimizer.state[master]
            kept = (state["exp_avg"].clone(), state["exp_avg_sq"].clone(), master.detach().clone())
            found[step] = Moments(*kept, step, beta1=0.9, beta2=0.999, eps=1e-8, lr=lr)
    return found, master.detach().to(weights.dtype) != weights


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return (0.06 * torch.randn(200_000, generator=generator)).bfloat16()


@pytest.fixture(scope="module")
def run(weights: torch.Tensor) -> Run:
    return simulated(weights)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny model in bfloat16 whose weights have the usual spread, norms included."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("models") / "base")
    model, _ = load_model(folder, dtype="bfloat16")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.06 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def first_steps(base: Checkpoint) -> tuple[list[tuple[str, Moments]], SubnetMask]:
    """The moments of every tensor after four steps, and the mask of the whole run."""
    moments, changed = [], {}
    for number, (name, weight) in enumerate(base.tensors()):
        found, flat = simulated(weight.view(-1), seed=number)
        moments.append((name, found[4]))
        changed[name] = flat.view(weight.shape)
    return moments, SubnetMask.from_dense(changed)


def recall(mask: SubnetMask, final: SubnetMask) -> float:
    return (mask & final).num_trainable / final.num_trainable


def of_one(
    *,
    exp_avg: float = 0.0,
    exp_avg_sq: float = 1.0,
    master: float = 1.5,
    beta1: float = 0.0,
    lr: float = 2.0**-10,
) -> Moments:
    """Moments of one weight whose mean square is `exp_avg_sq`, after two steps."""
    one, square = torch.tensor([exp_avg]), torch.tensor([exp_avg_sq * (1 - 0.999**2)])
    return Moments(one, square, torch.tensor([master]), 2, beta1=beta1, beta2=0.999, eps=1e-12, lr=lr)


def chance(moments: Moments, *, weight: float = 1.5, remaining: int = 16, dtype: torch.dtype = torch.bfloat16) -> float:
    return change_probability(torch.tensor([weight], dtype=dtype), moments, remaining=remaining).item()


def test_change_probability_of_a_drift_that_spreads_by_the_half_spacing() -> None:
    assert chance(of_one()) == pytest.approx(0.3173, abs=1e-4)  # the example of its docstring
    assert chance(of_one(master=1.5 + 2.0**-8)) == pytest.approx(0.5 + 0.0228, abs=1e-4)
    assert chance(of_one(), remaining=64) == pytest.approx(0.6171, abs=1e-4)  # beyond half a deviation
    assert chance(of_one(lr=2.0**-11), remaining=64) == pytest.approx(0.3173, abs=1e-4)


def test_change_probability_knows_that_neighbours_lie_closer_below_a_power_of_two() -> None:
    """Half of 0.3173 above 1.0, and half of 0.6171 below."""
    assert chance(of_one(master=1.0), weight=1.0) == pytest.approx((0.3173 + 0.6171) / 2, abs=1e-4)
    assert chance(of_one(master=-1.0), weight=-1.0) == pytest.approx((0.3173 + 0.6171) / 2, abs=1e-4)


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.bfloat16, -8), (torch.float16, -11), (torch.float32, -24)])
def test_change_probability_goes_by_the_dtype_of_training(dtype: torch.dtype, exponent: int) -> None:
    assert chance(of_one(lr=2.0 ** (exponent - 2)), dtype=dtype) == pytest.approx(0.3173, abs=1e-4)


def test_change_probability_without_gradients_is_what_the_master_says() -> None:
    still = {"exp_avg_sq": 0.0, "beta1": 0.9}
    assert chance(of_one(**still)) == 0
    assert chance(of_one(master=1.5 + 2.0**-8 + 2.0**-20, **still)) == 1
    assert chance(of_one(master=1.5 - 2.0**-8 - 2.0**-20, **still)) == 1
    assert chance(of_one(exp_avg_sq=1e-40)) == 0  # far below eps


def test_change_probability_follows_momentum_to_where_it_ends() -> None:
    """A gradient that never comes back moves the master on, against its sign, by a known way."""
    way = 0.1 * sum(0.9**t / (1 - 0.9 ** (2 + t)) for t in range(1, 9))
    lr = 2.0**-8 / way
    one = of_one(exp_avg=0.1, beta1=0.9, lr=lr)
    toward, away = (chance(replace(one, exp_avg=sign * one.exp_avg), remaining=8) for sign in (1, -1))
    assert toward == pytest.approx(away)  # both middles are as far
    drifted = of_one(exp_avg=0.1, beta1=0.9, lr=lr, master=1.5 - 2.0**-9)
    ahead, back = (chance(replace(drifted, exp_avg=sign * drifted.exp_avg), remaining=8) for sign in (1, -1))
    assert ahead > back
    expected = chance(of_one(exp_avg=0.0, beta1=0.9, lr=lr, master=1.5 - 2.0**-8), remaining=8)
    assert toward == pytest.approx(expected, abs=1e-6)


def test_change_probability_needs_masters() -> None:
    with pytest.raises(MaskError, match=r"without float32 masters.*`subnet.optimizer.master: fp32`"):
        chance(replace(of_one(), master=None))


@pytest.mark.parametrize("step", [1, 4, 12, 39])
def test_change_probability_is_as_often_right_as_it_says(step: int, weights: torch.Tensor, run: Run) -> None:
    """Of the weights that change with a probability near p, a share near p changes; the sum is their number."""
    found, changed = run
    probability = change_probability(weights, found[step], remaining=STEPS - step)
    assert probability.sum().item() == pytest.approx(int(changed.sum()), rel=0.04)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        near = (probability >= low) & (probability < low + 0.2)
        if near.sum() > 1000:
            assert changed[near].float().mean().item() == pytest.approx(probability[near].mean().item(), abs=0.06)


@pytest.mark.parametrize(("step", "least"), [(1, 0.847), (4, 0.87), (12, 0.907), (39, 0.99)])
def test_change_probability_ranks_better_than_spacing(step: int, least: float, weights: torch.Tensor, run: Run) -> None:
    """At 1.3 times the count; the bounds are one point below what the simulation gives."""
    found, changed = run
    count = round(1.3 * int(changed.sum()))
    probability = change_probability(weights, found[step], remaining=STEPS - step)
    share = changed[probability.argsort(descending=True)[:count]].sum() / changed.sum()
    by_spacing = changed[torch.from_numpy(reach_keys(weights)).argsort(stable=True)[:count]].sum() / changed.sum()
    assert share > least
    assert share > by_spacing + 0.1


def test_forecast_mask_covers_more_of_the_final_mask_than_small_weights(
    base: Checkpoint, first_steps: tuple[list[tuple[str, Moments]], SubnetMask]
) -> None:
    moments, final = first_steps
    mask = forecast_mask(base, moments, total_steps=STEPS, density=1.3 * final.density)
    assert mask.density == pytest.approx(1.3 * final.density, abs=1 / mask.num_parameters)
    small = base_mask(base, "low_magnitude", density=1.3 * final.density)
    assert recall(mask, final) > 0.8 > 0.7 > recall(small, final)
    assert recall(mask, final) == pytest.approx(mask.provenance.source["expected_recall"], abs=0.03)
    mask.check_base(base)


def test_forecast_mask_chooses_for_a_recall(
    base: Checkpoint, first_steps: tuple[list[tuple[str, Moments]], SubnetMask]
) -> None:
    moments, final = first_steps
    mask = forecast_mask(base, moments, total_steps=STEPS, recall=0.9)
    assert mask.provenance.source["expected_recall"] == pytest.approx(0.9, abs=0.001)
    assert recall(mask, final) == pytest.approx(0.9, abs=0.03)
    assert final.density < mask.density < 2 * final.density


def test_forecast_mask_has_the_density_it_expects(
    base: Checkpoint, first_steps: tuple[list[tuple[str, Moments]], SubnetMask]
) -> None:
    moments, final = first_steps
    mask = forecast_mask(base, moments, total_steps=STEPS)
    assert mask.density == pytest.approx(mask.provenance.source["expected_density"], abs=1e-4)
    assert mask.density == pytest.approx(final.density, rel=0.05)
    longer = forecast_mask(base, moments, total_steps=4 * STEPS)
    assert longer.density > 1.3 * mask.density
    # Four times the steps at half the learning rate spread the drift as far.
    slower = forecast_mask(base, moments, total_steps=4 * STEPS, learning_rate=LR / 2)
    assert slower.density == pytest.approx(mask.density, rel=0.05)


def test_forecast_mask_is_made_again_from_its_source(
    base: Checkpoint, first_steps: tuple[list[tuple[str, Moments]], SubnetMask], tmp_path: Path
) -> None:
    moments, _ = first_steps
    mask = forecast_mask(base, moments, total_steps=STEPS, recall=0.5, learning_rate=1e-5, seed=4)
    loaded = SubnetMask.load(mask.save(tmp_path / "mask.subnet.safetensors"), base=base)
    assert loaded == mask
    source = dict(loaded.provenance.source)
    assert (source.pop("kind"), source.pop("step")) == ("forecast", 4)
    assert 0 < source.pop("expected_density") < 1
    assert source.pop("expected_recall") == pytest.approx(0.5, abs=0.001)
    assert forecast_mask(base, moments, **source) == mask
    assert forecast_mask(base, moments[::-1], **source) == mask  # whatever the order of the moments


def test_forecast_mask_takes_nothing_of_a_tensor_that_took_no_step(
    base: Checkpoint, first_steps: tuple[list[tuple[str, Moments]], SubnetMask]
) -> None:
    moments, _ = first_steps
    mask = forecast_mask(base, moments[1:], total_steps=STEPS, density=0.1)
    assert mask.names == list(base.specs)
    assert mask.tensors[moments[0][0]].count == 0
    assert mask.density == pytest.approx(0.1, abs=1e-4)


def test_forecast_mask_casts_to_the_dtype_of_training(
    base: Checkpoint, first_steps: tuple[list[tuple[str, Moments]], SubnetMask]
) -> None:
    """In float32 nearly every weight changes."""
    moments, _ = first_steps
    mask = forecast_mask(base, moments, total_steps=STEPS, dtype="float32")
    assert mask.provenance.compare_dtype == "float32"
    assert mask.density > 0.9
    mask.check_base(base)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"density": 0.1, "recall": 0.9}, "not both"),
        ({"density": 0.0}, "`density` must be"),
        ({"density": math.nan}, "`density` must be"),
        ({"recall": 1.0}, "`recall` must be"),
        ({"learning_rate": 0.0}, "`learning_rate` must be"),
        ({"learning_rate": math.inf}, "`learning_rate` must be"),
        ({"dtype": "int8"}, "`dtype` must be"),
        ({"total_steps": 4}, "above the 4 steps"),
        ({"seed": -1}, "`seed` must be"),
    ],
)
def test_forecast_mask_refuses_what_is_out_of_range(
    options: dict[str, object],
    said: str,
    base: Checkpoint,
    first_steps: tuple[list[tuple[str, Moments]], SubnetMask],
) -> None:
    with pytest.raises(MaskError, match=said):
        forecast_mask(base, first_steps[0], **{"total_steps": STEPS, **options})


def test_forecast_mask_refuses_moments_of_another_model(
    base: Checkpoint, first_steps: tuple[list[tuple[str, Moments]], SubnetMask]
) -> None:
    moments, _ = first_steps
    with pytest.raises(MaskMismatchError, match=r"no `other`"):
        forecast_mask(base, [("other", moments[0][1])], total_steps=STEPS)
    with pytest.raises(MaskError, match=r"only once"):
        forecast_mask(base, iter(moments), total_steps=STEPS)
