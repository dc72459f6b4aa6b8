"""`applied`: the model with a delta inside the block, the very same model afterwards, and clear errors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from deltas.random_deltas import Weights, delta_of, weights_of
from helpers import same_bits, small_model

import subnet_kernels
from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.deltas import Delta, HotSwap, applied
from subnet_ft.errors import DeltaError, DeltaMismatchError, SwapError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INPUTS = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 3, 4, 2]])}


def check_same(actual: Weights, expected: Weights) -> None:
    """Assert that two sets of weights are the same, bit by bit."""
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not same_bits(actual[name], expected[name])] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 1.0])
def test_applied_gives_every_bit_of_the_result_and_takes_every_bit_back(dtype: torch.dtype, density: float) -> None:
    model = small_model(dtype)
    base = weights_of(model)
    delta, tuned = delta_of(model, density=density, without="1.bias")
    values = {name: tensor.values.clone() for name, tensor in delta.tensors.items()}
    with applied(model, delta) as inside:
        assert inside is model
        check_same(weights_of(model), tuned)
        check_same({name: tensor.values for name, tensor in delta.tensors.items()}, values)
    check_same(weights_of(model), base)
    with applied(model, delta):
        check_same(weights_of(model), tuned)
    check_same(weights_of(model), base)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_applied_model_computes_what_the_tuned_one_does(family: str) -> None:
    model, tuned = tiny_model(family), tiny_model(family)
    delta, weights = delta_of(model)
    finite = {name: torch.nan_to_num(weight) for name, weight in weights.items()}
    delta = with_values(delta, finite)
    for name, parameter in tuned.named_parameters():
        parameter.data = finite[name]
    with torch.no_grad():
        expected, before = tuned(**INPUTS).logits, model(**INPUTS).logits
        with applied(model, delta):
            assert same_bits(model(**INPUTS).logits, expected)
        assert same_bits(model(**INPUTS).logits, before)
    assert not same_bits(before, expected)


def with_values(delta: Delta, weights: Weights) -> Delta:
    """Return a delta with the values of these weights."""
    tensors = {}
    for name, tensor in delta.tensors.items():
        chosen = delta.mask[name]
        tensors[name] = type(tensor)(tensor.bits, weights[name][chosen], tensor.shape)
    return Delta(tensors, delta.base, delta.result)


def test_applied_counts_tied_weights_once() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    delta, tuned = delta_of(model)
    base = weights_of(model)
    with applied(model, delta):
        check_same(weights_of(model), tuned)
        assert same_bits(model.lm_head.weight, tuned["model.embed_tokens.weight"])
    check_same(weights_of(model), base)


def compiled(model: torch.nn.Module) -> Any:
    """Wrap a model as `torch.compile` does."""
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, torch.nn.DataParallel])
def test_applied_finds_the_weights_under_wrappers(wrap: Callable[..., Any]) -> None:
    model = small_model(torch.bfloat16)
    base = weights_of(model)
    delta, tuned = delta_of(model)
    with applied(wrap(model), delta):
        check_same(weights_of(model), tuned)
    check_same(weights_of(model), base)


def test_applied_finds_the_weights_under_an_adapter() -> None:
    model = tiny_model("llama")
    base = weights_of(model)
    delta, tuned = delta_of(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"]))
    found = adapted.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    name = "model.layers.0.self_attn.q_proj.weight"
    with applied(adapted, delta):
        assert same_bits(found.detach(), tuned[name])
    assert same_bits(found.detach(), base[name])
    adapted.merge_adapter()
    with torch.no_grad():
        found.add_(1.0)  # as a merged adapter that was trained
    with pytest.raises(DeltaMismatchError, match=r"`model.layers.0.self_attn.q_proj.weight` are not those of `a base`"):
        applied(adapted, delta).__enter__()


def write_and_fail(model: torch.nn.Module) -> None:
    """Write to a weight and raise: the error that counts is this one."""
    train(model)
    raise ZeroDivisionError


def test_applied_restores_when_the_body_raises() -> None:
    model = small_model(torch.bfloat16)
    base = weights_of(model)
    delta, _ = delta_of(model)
    with pytest.raises(KeyboardInterrupt), applied(model, delta):
        raise KeyboardInterrupt
    check_same(weights_of(model), base)
    with pytest.raises(ZeroDivisionError), applied(model, delta):
        write_and_fail(model)
    with applied(model, delta, check_base=False):
        pass


def test_applied_refuses_a_second_delta_of_the_same_model() -> None:
    model = small_model(torch.bfloat16)
    base = weights_of(model)
    (delta, tuned), (other, _) = delta_of(model), delta_of(model, seed=2)
    with applied(model, delta):
        with (
            pytest.raises(SwapError, match=r"cannot enter the model, because the delta of `a base` is in it"),
            applied(model, other, check_base=False),
        ):
            pass
        with pytest.raises(SwapError, match="One at a time"), applied(compiled(model), other, check_base=False):
            pass
        check_same(weights_of(model), tuned)
    check_same(weights_of(model), base)
    with applied(model, other):
        pass


def test_applied_refuses_a_second_delta_from_another_thread() -> None:
    model = small_model(torch.bfloat16)
    delta, tuned = delta_of(model)
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            with applied(model, delta, check_base=False):
                pass
        except SwapError as error:
            errors.append(error)

    with applied(model, delta):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        check_same(weights_of(model), tuned)
    assert len(errors) == 1


def test_applied_by_many_threads_at_once_lets_one_in_and_loses_nothing() -> None:
    model = small_model(torch.bfloat16)
    base = weights_of(model)
    deltas = [delta_of(model, seed=seed) for seed in range(4)]
    entered, wrong = [0] * 4, []

    def enter(index: int) -> None:
        delta, tuned = deltas[index]
        for _ in range(200):
            try:
                with applied(model, delta, check_base=False):
                    entered[index] += 1
                    if any(not same_bits(value, tuned[name]) for name, value in weights_of(model).items()):
                        wrong.append(index)
            except SwapError:
                pass

    threads = [threading.Thread(target=enter, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(entered)
    assert wrong == []
    check_same(weights_of(model), base)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", range(6))
def test_applied_survives_an_interrupt_in_any_exchange(
    number: int, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(torch.bfloat16)
    base = weights_of(model)
    delta, tuned = delta_of(model)
    swap, calls = subnet_kernels.swap, iter(range(1000))

    def interrupted(*args: Any) -> None:
        if next(calls) != number:
            swap(*args)
            return
        if after:
            swap(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(subnet_kernels, "swap", interrupted)
    with pytest.raises(KeyboardInterrupt), applied(model, delta):
        check_same(weights_of(model), tuned)
    check_same(weights_of(model), base)
    with applied(model, delta):
        check_same(weights_of(model), tuned)
    check_same(weights_of(model), base)


def test_applied_between_forward_and_backward_changes_no_gradient() -> None:
    model, twin = small_model(torch.float32), small_model(torch.float32)
    delta, _ = delta_of(model)
    inputs = torch.randn(3, 13, generator=torch.Generator().manual_seed(0))
    marks = [(p._version, p.data_ptr()) for p in model.parameters()]
    loss = model(inputs).square().sum()
    with applied(model, delta), torch.no_grad():
        model(inputs)
    assert [(p._version, p.data_ptr()) for p in model.parameters()] == marks
    loss.backward()
    twin(inputs).square().sum().backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert same_bits(mine.grad, other.grad)


def test_applied_refuses_a_backward_pass_across_its_border() -> None:
    model = small_model(torch.float32)
    delta, _ = delta_of(model)
    outside = model(torch.ones(2, 13)).sum()
    with applied(model, delta):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outside.backward()
        inside = model(torch.ones(2, 13)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()


def test_applied_under_autocast_uses_no_cast_of_other_weights() -> None:
    model = small_model(torch.float32)
    delta, tuned = delta_of(model)
    finite = {name: torch.nan_to_num(weight) for name, weight in tuned.items()}
    delta = with_values(delta, finite)
    fresh = small_model(torch.float32)
    for name, parameter in fresh.named_parameters():
        parameter.data = finite[name]
    inputs = torch.ones(2, 13)
    expected = []
    for other in (small_model(torch.float32), fresh):
        with torch.autocast("cpu", torch.bfloat16):
            expected.append(other(inputs).detach())
    with torch.autocast("cpu", torch.bfloat16):
        before = model(inputs).detach()
        with applied(model, delta):
            inside = model(inputs).detach()
        after = model(inputs).detach()
    assert [same_bits(a, b) for a, b in ((before, expected[0]), (inside, expected[1]), (after, expected[0]))] == [
        True
    ] * 3


@pytest.mark.parametrize("made_inside", [False, True])
def test_applied_works_in_inference_mode(made_inside: bool) -> None:
    with torch.inference_mode(made_inside):
        model = small_model(torch.bfloat16)
    base = weights_of(model)
    delta, tuned = delta_of(model)
    with torch.inference_mode():
        with applied(model, delta):
            check_same(weights_of(model), tuned)
        check_same(weights_of(model), base)


def train(model: torch.nn.Module) -> None:
    """Write to a weight as an optimizer does."""
    with torch.no_grad():
        model[0].weight.add_(1.0)  # type: ignore[operator,index,union-attr]


def write_behind_autograd(model: torch.nn.Module) -> None:
    """Write to a weight as a kernel of ours does."""
    weight = model[0].weight.detach().view(-1)  # type: ignore[operator,index,union-attr]
    weight.view(torch.int16).numpy()[:] = 7


@pytest.mark.parametrize("write", [train, write_behind_autograd])
def test_applied_says_that_somebody_wrote_to_the_weights(write: Callable[[Any], None]) -> None:
    model = small_model(torch.bfloat16)
    base = weights_of(model)
    delta, _ = delta_of(model)
    written = r"Somebody wrote to 1 tensors while the delta of `a base` .* `0.weight`"
    with pytest.raises(SwapError, match=written), applied(model, delta):
        write(model)
    chosen = delta.mask["0.weight"]
    assert same_bits(model[0].weight.detach()[chosen], base["0.weight"][chosen])
    others = {name: weight for name, weight in weights_of(model).items() if name != "0.weight"}
    check_same(others, {name: base[name] for name in others})
    with applied(model, delta, check_base=False):  # the model is free again
        pass


def test_applied_says_that_the_model_was_cast() -> None:
    model = small_model(torch.bfloat16)
    delta, _ = delta_of(model)
    message = r"`0.weight` is torch.float32 on cpu .* load the model again"
    with pytest.raises(SwapError, match=message), applied(model, delta):
        model.float()
    assert all(p.dtype == torch.float32 for p in model.parameters())


def renamed(model: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Identity(), *model.children())


def moved_to_meta(model: torch.nn.Module) -> torch.nn.Module:
    return model.to("meta")


def transposed(model: torch.nn.Module) -> torch.nn.Module:
    weight = model[0].weight  # type: ignore[operator,index,union-attr]
    weight.data = weight.data.t().contiguous().t()
    return model


def trained(model: torch.nn.Module) -> torch.nn.Module:
    train(model)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "have different parameters: `0.weight`, .* only in the delta"),
        (lambda model: model[0], "have different parameters"),
        (lambda model: model.float(), r"`0.weight` is float32 of shape \(17, 13\) in the model and bfloat16"),
        (moved_to_meta, "`0.weight` is on the meta device"),
        (transposed, "`0.weight` is not contiguous"),
        (trained, "The weights of `0.weight` are not those of `a base`"),
    ],
)
def test_applied_refuses_another_model_and_changes_nothing(
    change: Callable[[torch.nn.Module], torch.nn.Module], message: str
) -> None:
    model = small_model(torch.bfloat16)
    delta, _ = delta_of(model)
    other = change(model)
    before = weights_of(other)
    with pytest.raises(DeltaMismatchError, match=message), applied(other, delta):
        pass
    if not next(other.parameters()).is_meta:
        check_same(weights_of(other), before)


def test_applied_looks_only_at_tensors_that_change_and_only_when_asked() -> None:
    model = small_model(torch.bfloat16)
    delta, _ = delta_of(model, without="0.weight")
    train(model)
    with applied(model, delta):
        pass
    with torch.no_grad():
        model[0].bias.add_(1.0)
    with pytest.raises(DeltaMismatchError, match=r"`0.bias`"), applied(model, delta):
        pass
    with applied(model, delta, check_base=False):
        pass


def test_applied_refuses_values_that_are_not_those_of_its_bits() -> None:
    model = small_model(torch.bfloat16)
    delta, _ = delta_of(model)
    tensor = delta.tensors["0.weight"]
    fewer = type(tensor)(tensor.bits, tensor.values[:-1], tensor.shape)
    broken = Delta({**delta.tensors, "0.weight": fewer}, delta.base, delta.result)
    with pytest.raises(DeltaError, match=r"has [\d,]+ values of torch.bfloat16 for the [\d,]+ weights of `0.weight`"):
        applied(model, broken).__enter__()


def test_applied_refuses_a_model_whose_hot_swap_is_active() -> None:
    model = small_model(torch.bfloat16)
    delta, _ = delta_of(model)
    bank = HotSwap(model)
    bank.add("sums", delta)
    bank.activate("sums")
    with pytest.raises(SwapError, match="because the delta `sums` is in it"), applied(model, delta, check_base=False):
        pass
    bank.deactivate()
    with applied(model, delta):
        pass


def test_applied_copy_of_the_model_is_a_model_of_its_own() -> None:
    model = small_model(torch.bfloat16)
    base, (delta, tuned) = weights_of(model), delta_of(model)
    with applied(model, delta):
        twin = copy.deepcopy(model)
        saved = {name: value.clone() for name, value in model.state_dict().items()}
    check_same(weights_of(model), base)
    check_same(weights_of(twin), tuned)
    check_same(saved, tuned)
    with pytest.raises(DeltaMismatchError), applied(twin, delta):
        pass
    with torch.no_grad():
        twin[0].weight.zero_()  # nobody watches it


def test_applied_takes_weights_that_need_no_gradients() -> None:
    model = small_model(torch.bfloat16).requires_grad_(False)
    base, (delta, tuned) = weights_of(model), delta_of(model)
    with applied(model, delta):
        check_same(weights_of(model), tuned)
        assert not any(parameter.requires_grad for parameter in model.parameters())
    check_same(weights_of(model), base)
