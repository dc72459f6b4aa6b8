"""`subnet-ft mask make` and `subnet-ft mask combine`: every kind, and one message for options that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.cli import main
from subnet_ft.cli.making import FROM_BASE, FROM_STATE, KINDS, LIKE, RULES
from subnet_ft.masks import BASE_KINDS, CONTROLS, SubnetMask, base_mask, combine, control_mask, early_mask
from subnet_ft.masks import RULES as LIBRARY_RULES
from subnet_ft.masks.forecast import forecast_mask
from subnet_ft.masks.gradients import GRADIENT_KINDS, gradient_mask
from subnet_ft.training.moments import read_moments

SUFFIX = ".subnet.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, a checkpoint of a run from it, and two sparse masks of the pair."""
    folder = tmp_path_factory.mktemp("files")
    base, tuned = save_tiny("llama", folder / "base"), save_tiny("llama", folder / "checkpoint-7", seed=1)
    (tuned / "trainer_state.json").write_text(json.dumps({"global_step": 7}), encoding="utf-8")
    masks = [base_mask(base, "uniform", density=0.2, seed=seed).save(folder / f"{seed}{SUFFIX}") for seed in (1, 2, 3)]
    return {"base": str(base), "tuned": str(tuned)} | {str(n): str(path) for n, path in enumerate(masks, start=1)}


def made(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[SubnetMask, dict[str, Any]]:
    """Run a command with `--json`; return the mask that it wrote and what it printed."""
    assert main([*arguments, "--json", "-q"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return SubnetMask.load(arguments[arguments.index("-o") + 1]), json.loads(out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, "-q"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint of two steps of a full run, with its optimizer's state."""
    output = tmp_path_factory.mktemp("run") / "run"
    words = ["task.num_train=32", "training.max_steps=3", "training.save_steps=2", "keep_checkpoints=true"]
    assert main(["train", "tiny/sft", "method=full", f"output={output}", *words, "-q"]) == 0
    return str(next(output.rglob("checkpoint-2")))


def test_kinds_and_rules_are_those_of_the_library() -> None:
    assert LIKE == CONTROLS
    assert FROM_BASE == BASE_KINDS
    assert ("forecast", *GRADIENT_KINDS) == FROM_STATE
    assert RULES == LIBRARY_RULES


@pytest.mark.parametrize("kind", LIKE)
def test_make_like_a_mask_is_its_control(
    kind: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask, figures = made(
        capsys, "mask", "make", kind, "-o", str(tmp_path / f"m{SUFFIX}"), "--like", files["1"], "--seed", "4"
    )
    weights = open_checkpoint(files["base"]).tensors()
    expected = control_mask(SubnetMask.load(files["1"]), kind, seed=4, weights=weights)
    assert (mask, mask.provenance) == (expected, expected.provenance)
    assert figures["source"] == expected.provenance.source
    assert figures["fingerprint"] == mask.fingerprint
    mask.check_base(files["base"])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"density": 0.1}) for kind in FROM_BASE),
        ("uniform", {"density": 0.1, "scope": "global", "seed": 3}),
        ("principal", {"density": 0.1, "rank": 2, "dtype": "float16"}),
        ("predicted", {"reach": 1e-3}),
    ],
)
def test_make_from_a_base_is_a_base_mask(
    kind: str, options: dict[str, Any], files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    mask, figures = made(
        capsys, "mask", "make", kind, "-o", str(tmp_path / f"m{SUFFIX}"), "--base", files["base"], *words
    )
    expected = base_mask(files["base"], kind, **options)
    assert (mask, mask.provenance) == (expected, expected.provenance)
    assert figures["num_trainable"] == mask.num_trainable > 0


def test_make_early_is_an_early_mask(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base", files["base"], "--tuned", files["tuned"], "--criterion", "absolute", "--tolerance", "0.1"]
    mask, figures = made(capsys, "mask", "make", "early", "-o", str(tmp_path / f"m{SUFFIX}"), *words)
    expected = early_mask(files["base"], files["tuned"], criterion="absolute", tolerance=0.1)
    assert (mask, mask.provenance) == (expected, expected.provenance)
    assert figures["source"] == {"kind": "early", "step": 7}


@pytest.mark.parametrize(("kind", "options"), [("gradient", {}), ("fisher", {"scope": "global", "seed": 1})])
def test_make_from_state_is_a_mask_of_gradients(
    kind: str, options: dict[str, Any], state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    words += ["--base", "tiny:llama", "--state", state, "--density", "0.1"]
    mask, figures = made(capsys, "mask", "make", kind, "-o", str(tmp_path / f"m{SUFFIX}"), *words)
    expected = gradient_mask("tiny:llama", read_moments(state), kind, density=0.1, **options)
    assert (mask, mask.provenance) == (expected, expected.provenance)
    assert figures["source"]["step"] == 2


@pytest.mark.parametrize("options", [{}, {"density": 0.1, "seed": 1}, {"recall": 0.5, "total_steps": 20}])
def test_make_forecast_is_a_forecast_of_the_run(
    options: dict[str, Any], state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    words += ["--base", "tiny:llama", "--state", state]
    mask, figures = made(capsys, "mask", "make", "forecast", "-o", str(tmp_path / f"m{SUFFIX}"), *words)
    expected = forecast_mask("tiny:llama", read_moments(state), **{"total_steps": 3, **options})
    assert (mask, mask.provenance) == (expected, expected.provenance)
    assert (figures["source"]["step"], figures["source"]["total_steps"]) == (2, options.get("total_steps", 3))


@pytest.mark.parametrize("rule", RULES)
def test_combine_combines(rule: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [files[number] for number in "123"]
    mask, figures = made(capsys, "mask", "combine", rule, *paths, "-o", str(tmp_path / f"m{SUFFIX}"))
    expected = combine([SubnetMask.load(path) for path in paths], rule)
    assert (mask, mask.provenance) == (expected, expected.provenance)
    assert figures["source"]["of"] == [SubnetMask.load(path).fingerprint for path in paths]


def test_combine_takes_at_least(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, out = [files[number] for number in "123"], str(tmp_path / f"m{SUFFIX}")
    mask, _ = made(capsys, "mask", "combine", "majority", *paths, "-o", out, "--at-least", "1")
    assert mask == combine([SubnetMask.load(path) for path in paths], "union")
    assert "from 1 to the number of masks, 3, got 4" in refused(
        capsys, "mask", "combine", "majority", *paths, "-o", out, "--at-least", "4"
    )


def test_make_reads_as_text(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"m{SUFFIX}"
    assert main(["mask", "make", "inverted", "-o", str(path), "--like", files["1"], "-q"]) == 0
    text = capsys.readouterr().out
    assert "source     inverted, seed 0, of" in text
    assert "density by layer" in text
    assert f"saved in {path}" in text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["uniform"], ["`uniform` needs `--base`, `--density` or `--like`."]),
        (["uniform", "--base", "B"], ["needs `--density` or `--like`."]),
        (["predicted", "--density", "0.1"], ["`predicted` needs `--base`."]),
        (["inverted", "--density", "0.1"], ["`inverted` has the size of another mask", "--like MASK"]),
        (["early", "--base", "B"], ["`early` needs `--tuned`"]),
        (["forecast", "--base", "B", "--total-steps", "3"], ["`forecast` needs `--state`."]),
        (["fisher", "--base", "B", "--density", "1", "--state", "S", "--total-steps", "3"], ["use `--total-steps`"]),
        (["fisher", "--base", "B"], ["`fisher` needs `--state`, `--density`."]),
        (["predicted", "--like", "M"], ["`predicted` matches no other mask", "`inverted`"]),
        (["uniform", "--like", "M", "--density", "0.1"], ["with `--like` does not use `--density`", "`--seed`"]),
        (["uniform", "--base", "B", "--density", "0.1", "--rank", "3"], ["does not use `--rank`", "`--scope`"]),
        (["predicted", "--base", "B", "--density", "0.1", "--reach", "1"], ["does not use `--density`; its options"]),
        (["early", "--base", "B", "--tuned", "T", "--seed", "0"], ["`early` does not use `--seed`"]),
    ],
)
def test_make_names_options_that_are_missing_or_too_many(
    arguments: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"m{SUFFIX}"
    message = refused(capsys, "mask", "make", *arguments, "-o", str(path))
    assert all(part in message for part in parts)
    assert not path.exists()


def test_make_checks_the_base_of_the_mask(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-o", str(tmp_path / f"m{SUFFIX}"), "--like", files["1"]]
    for kind in ("uniform", "low_magnitude"):
        message = refused(capsys, "mask", "make", kind, *words, "--base", files["tuned"])
        assert "are not those that the mask was made for" in message
    nameless = SubnetMask(SubnetMask.load(files["1"]).tensors).save(tmp_path / f"nameless{SUFFIX}")
    words[-1] = str(nameless)
    assert "does not name its base" in refused(capsys, "mask", "make", "low_magnitude", *words)
    assert main(["mask", "make", "low_magnitude", *words, "--base", files["base"], "-q"]) == 0


@pytest.mark.parametrize(
    "command", [["make", "uniform", "--base", "no-base", "--density", "0.1"], ["combine", "union", "no", "no"]]
)
@pytest.mark.parametrize("output", [".", "/proc/x/m"])
def test_an_output_is_refused_before_anything_is_read(
    command: list[str], output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "mask", *command, "-o", output)
    assert f"`{output.removesuffix('/m')}`" in message
    assert "no-base" not in message
    assert "no mask file" not in message


def test_an_unknown_kind_or_rule_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["make", "unifrom"], ["combine", "xor", "a"]):
        with pytest.raises(SystemExit, match="2"):
            main(["mask", *arguments, "-o", "m"])
        assert "invalid choice" in capsys.readouterr().err
    assert len(KINDS) == len(set(KINDS))
