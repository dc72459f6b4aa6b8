"""What a machine lacks is said with the recipe's other problems, before a weight is loaded."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_texts import DPO, GRPO

from subnet_ft.checkpoints.quantized import why_not
from subnet_ft.errors import RecipeError
from subnet_ft.pipeline import load_checked_recipe
from subnet_ft.recipe import Recipe, load_recipe, shipped_recipes
from subnet_ft.recipe.methods import METHODS
from subnet_ft.training.platform_check import platform_problems, why_not_8bit_moments

FLASH = "model.attn_implementation=flash_attention_2"


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if it were not installed."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    why_not.cache_clear()
    why_not_8bit_moments.cache_clear()
    yield
    why_not.cache_clear()
    why_not_8bit_moments.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU of 2018: what is asked about it, nothing that would run on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")


def recipe_of(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def found(folder: Path, text: str, *overrides: str, **options: Any) -> dict[str, str]:
    problems = list(platform_problems(recipe_of(folder, text, *overrides), **options))
    assert len(dict(problems)) == len(problems)
    return dict(problems)


@pytest.mark.parametrize("name", [name for name, _ in shipped_recipes()])
def test_platform_problems_finds_none_in_a_shipped_recipe(name: str) -> None:
    assert not list(platform_problems(load_recipe(name)))


def test_platform_problems_lets_everything_of_bitsandbytes_pass_where_it_runs(tmp_path: Path) -> None:
    options = ("reference.quantization=nf4", "subnet.optimizer.name=adamw_8bit")
    assert not found(tmp_path, DPO, *options, quantizations=["int8", "nf4"])
    assert not found(tmp_path, DPO, "method=qlora")


@pytest.mark.usefixtures("without_bitsandbytes")
def test_platform_problems_names_all_that_needs_bitsandbytes_at_once(tmp_path: Path) -> None:
    reference, optimizer = "reference.quantization", "subnet.optimizer.name"
    all_at_once = found(tmp_path, DPO, f"{reference}=int8", f"{optimizer}=adamw_8bit", quantizations=["nf4"])
    assert all_at_once.keys() == {reference, optimizer, "--quantized"}
    methods = {**found(tmp_path, DPO, methods=["full", "qlora"]), **found(tmp_path, DPO, "method=qlora")}
    assert methods.keys() == {"methods.qlora", "method"}
    for message in (*all_at_once.values(), *methods.values()):
        assert "pip install 'subnet-ft[quantization]'" in message


@pytest.mark.usefixtures("without_bitsandbytes")
def test_platform_problems_looks_at_what_is_trained(tmp_path: Path) -> None:
    assert found(tmp_path, DPO, "method=qlora", "baselines=[lora]", methods=["full", "lora"]) == {}
    assert found(tmp_path, DPO, "baselines=[qlora]", methods=["full"]) == {}
    assert found(tmp_path, DPO, "baselines=[qlora]").keys() == {"methods.qlora"}


def test_platform_problems_looks_at_the_reference_of_what_is_trained(tmp_path: Path) -> None:
    held = ("reference.quantization=nf4", "method=lora", "baselines=[ia3]")
    assert found(tmp_path, DPO, *held, methods=["full", "bitfit"]) == {}
    assert list(platform_problems(recipe_of(tmp_path, DPO, *held), methods=["full", "dora"])) == [
        (
            "reference.quantization",
            "`dora` has no reference model of its own: the base under its adapter is one; set it to null",
        )
    ]
    assert [reason[:6] for _, reason in platform_problems(recipe_of(tmp_path, DPO, *held))] == ["`lora`", "`ia3` "]


@pytest.mark.usefixtures("without_bitsandbytes")
def test_load_checked_recipe_lists_a_lack_beside_the_other_problems(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GRPO, encoding="utf-8")
    overrides = ["training.learning_rate=-1", "subnet.optimizer.name=adamw_8bit", FLASH, "method=qlora"]
    with pytest.raises(RecipeError) as caught:
        load_checked_recipe(path, overrides)
    keys = [problem.partition(":")[0] for problem in caught.value.problems]
    assert sorted(set(keys)) == [
        "method",
        "model.attn_implementation",
        "subnet.optimizer.name",
        "training.learning_rate",
    ]


def test_platform_problems_says_what_an_8_bit_step_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    def refuse(*_: Any) -> None:
        raise RuntimeError("no\nkernel")

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", refuse)
    why_not_8bit_moments.cache_clear()
    try:
        (message,) = found(tmp_path, GRPO, "subnet.optimizer.name=adamw_8bit").values()
    finally:
        why_not_8bit_moments.cache_clear()
    assert message.startswith("`adamw_8bit` cannot run here: bitsandbytes ")
    assert message.endswith("has no 8-bit AdamW on cpu: no kernel")


@pytest.mark.parametrize("name", [None, "eager", "sdpa"])
def test_platform_problems_accepts_the_attention_of(name: str | None, tmp_path: Path) -> None:
    assert not found(tmp_path, GRPO, f"model.attn_implementation={name or 'null'}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused where there is no GPU")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("flash_attention_2", "needs a GPU"),
        ("flash_attention_3", "needs a GPU"),
        ("flex_attention", "no backward pass on a CPU"),
        ("kernels-community/flash-attn2", "needs a GPU"),
        ("paged|eager", "unknown"),
        ("sdpaa", "unknown, got 'sdpaa'; choose `sdpa`"),
    ],
)
@pytest.mark.parametrize("section", ["model", "teacher"])
def test_platform_problems_refuses_the_attention_of(name: str, reason: str, section: str, tmp_path: Path) -> None:
    text = GRPO.replace("algorithm: grpo", "algorithm: distillation\nteacher: {name: tiny:llama}")
    key = f"{section}.attn_implementation"
    problems = list(platform_problems(recipe_of(tmp_path, text, f"{key}={name}")))
    assert {found for found, _ in problems} == {key}
    assert reason in problems[0][1]


@pytest.mark.usefixtures("gpu")
def test_platform_problems_asks_for_the_package_and_the_dtype_of_flash_attention(tmp_path: Path) -> None:
    problems = list(platform_problems(recipe_of(tmp_path, GRPO, FLASH, "model.dtype=float32")))
    assert [key for key, _ in problems] == ["model.attn_implementation"] * 2
    assert "computes in bfloat16 or float16, and the dtype is float32" in problems[0][1]
    assert "`pip install flash-attn`" in problems[1][1]
    assert (
        "`pip install kernels`"
        in found(tmp_path, GRPO, "model.attn_implementation=a/b", "model.dtype=float16")["model.attn_implementation"]
    )


@pytest.mark.usefixtures("gpu")
def test_platform_problems_refuses_bfloat16_on_an_older_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = found(tmp_path, GRPO)["model.dtype"]
    assert message.startswith("`Tesla T4` has no bfloat16 (compute capability 7.5, needed is 8.0)")
    assert not found(tmp_path, GRPO, "model.dtype=float32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert not found(tmp_path, GRPO)


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused where there is no GPU")
@pytest.mark.parametrize("name", ["use_vllm", "use_liger_kernel"])
def test_platform_problems_refuses_without_a_gpu(name: str, tmp_path: Path) -> None:
    assert "needs a GPU" in found(tmp_path, GRPO, f"training.{name}=true")[f"training.{name}"]
    assert not found(tmp_path, GRPO, f"training.{name}=false")


COMPILED = "training.torch_compile=true"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs Triton, no C++ compiler")
@pytest.mark.parametrize(
    ("options", "key"),
    [
        ([COMPILED], "training.torch_compile"),
        (["training.torch_compile_backend=inductor"], "training.torch_compile_backend"),
        (["training.torch_compile_mode=default"], "training.torch_compile_mode"),
    ],
)
def test_platform_problems_asks_for_a_compiler_for_inductor(
    options: list[str], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    message = found(tmp_path, GRPO, *options)[key]
    assert "needs a C++ compiler" in message
    assert "`aot_eager`" in message
    assert not found(tmp_path, GRPO, COMPILED, "training.torch_compile_backend=aot_eager")
    assert not found(tmp_path, GRPO, "training.torch_compile=false")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert not found(tmp_path, GRPO, *options)


def test_platform_problems_refuses_unknown_backends_and_modes(tmp_path: Path) -> None:
    message = found(tmp_path, GRPO, "training.torch_compile_backend=induktor")["training.torch_compile_backend"]
    assert message.startswith("unknown, got 'induktor'; torch has ")
    assert "inductor" in message
    key, mode = "training.torch_compile_mode", "training.torch_compile_mode=fast"
    assert found(tmp_path, GRPO, COMPILED, mode)[key].startswith("unknown, got 'fast'; torch has ")
    only = found(tmp_path, GRPO, "training.torch_compile_backend=eager", "training.torch_compile_mode=default")
    assert "only for the backend `inductor`" in only[key]


@pytest.mark.parametrize(("name", "weight"), [("grpo", "beta"), ("rloo", "beta"), ("ppo", "kl_coef")])
def test_platform_problems_refuses_to_quantize_a_reference_that_a_weight_of_0_leaves_out(
    name: str, weight: str, tmp_path: Path
) -> None:
    text = GRPO.replace("algorithm: grpo", f"algorithm: {name}")
    options = ("reference.quantization=nf4", f"training.{weight}")
    assert f"`training.{weight}` is 0" in found(tmp_path, text, options[0], f"{options[1]}=0")["reference.quantization"]
    assert not found(tmp_path, text, options[0], f"{options[1]}=0.1")


def test_platform_problems_knows_the_default_weight_of_a_reference(tmp_path: Path) -> None:
    assert "`training.beta` is 0" in found(tmp_path, GRPO, "reference.quantization=nf4")["reference.quantization"]
    rloo = GRPO.replace("grpo", "rloo")
    assert not found(tmp_path, rloo, "reference.quantization=nf4")


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.trains == "adapter"])
def test_platform_problems_refuses_to_quantize_the_reference_of_an_adapter(name: str, tmp_path: Path) -> None:
    key = "reference.quantization"
    for problems in (
        found(tmp_path, DPO, f"{key}=nf4", methods=["full", name]),
        found(tmp_path, DPO, f"{key}=nf4", f"method={name}"),
    ):
        assert f"`{name}` has no reference model of its own" in problems[key]
