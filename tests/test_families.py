"""Every family of models goes from the base to a verdict: each test is a cell of the table in `docs/families.md`."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from feature_table import read_table
from helpers import same_bits
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import FAMILIES, save_tiny
from subnet_ft.cli import main
from subnet_ft.mask_stages import MASK_FILE
from subnet_ft.masks import SubnetMask, extract
from subnet_ft.pipeline import Pipeline, load_checked_recipe
from subnet_ft.stages import TrainedStage
from subnet_ft.training import restrict

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
# Some families come with tied and with untied embeddings: the other form of two whose tiny model has one of them.
TIES = {"llama, untied": {"tie_word_embeddings": False}, "qwen2, tied": {"tie_word_embeddings": True}}
MODELS = [*FAMILIES, *TIES]
STAGES = ("extract", "train", "verify")
TOLERANCE = 0.004
SHORT = [
    "training.max_steps=3", "task.num_train=60", "task.num_eval=0", "evaluation.enabled=false", "seed=1",
    "training.learning_rate=2e-3", f"subnet.source.tolerance={TOLERANCE}",
]  # fmt: skip
ALGORITHMS = {"dpo": ["task.pairs.num_prompts=60"], "grpo": []}
COLUMNS = [f"{algorithm}: {stage}" for algorithm in ALGORITHMS for stage in STAGES]


@dataclass(frozen=True)
class Trained:
    """Base, full run and subnetwork run of one model, and the trainer of the latter."""

    base: str
    full: TrainedStage
    subnet: TrainedStage
    trainer: Any

    @property
    def mask(self) -> SubnetMask:
        assert self.subnet.mask is not None
        return self.subnet.mask

    @property
    def mask_path(self) -> Path:
        return self.subnet.folder.parent / MASK_FILE


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Trained]]:
    """Return what trains a model with an algorithm once, in full and in its subnetwork, from a shipped recipe."""
    patch = pytest.MonkeyPatch()
    trainers: list[Any] = []

    def keep(trainer: Any, *args: Any, **options: Any) -> Any:
        trainers.append(trainer)
        return restrict(trainer, *args, **options)

    patch.setattr("subnet_ft.training.run.restrict", keep)

    @cache
    def run(model: str, algorithm: str) -> Trained:
        base = base_of(model, folder)
        settings = [*SHORT, *ALGORITHMS[algorithm], f"model.name={base}", f"output={folder / algorithm / model}"]
        full, subnet = (
            Pipeline(load_checked_recipe(f"tiny/{algorithm}", [*settings, f"method={method}"])).train()
            for method in ("full", "subnet")
        )
        return Trained(base, full, subnet, trainers[-1])

    folder = tmp_path_factory.mktemp("families")
    yield run
    patch.undo()


def base_of(model: str, folder: Path) -> str:
    """Return the name of a model's base; what is not a family's own tiny model is saved first."""
    if model not in TIES:
        return f"tiny:{model}"
    saved = folder / "bases" / model
    return str(saved if saved.is_dir() else save_tiny(model.partition(",")[0], saved, **TIES[model]))


def load(folder: str | Path) -> PreTrainedModel:
    """Load a checkpoint as anybody would, without this project."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    """Return the parameters of a loaded model, tied ones once."""
    return {name: parameter.detach() for name, parameter in load(folder).named_parameters()}


def stored(folder: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint as they are on disk."""
    return {key: value for path in Path(folder).glob("*.safetensors") for key, value in load_file(path).items()}


def differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Tell for each element of two tensors of one dtype whether the bits differ."""
    assert a.dtype == b.dtype
    integer = {2: torch.int16, 4: torch.int32}[a.itemsize]
    return a.view(integer) != b.view(integer)


def check_extract(run: Trained) -> None:
    base = open_checkpoint(run.base)
    before, after = weights_of(base.folder), weights_of(run.full.folder)
    shapes = {name: tuple(weight.shape) for name, weight in before.items()}
    exact = extract(run.base, run.full.folder)
    for mask in (exact, run.mask):
        assert mask.names == list(shapes)
        assert {name: tuple(mask[name].shape) for name in mask.names} == shapes
    assert run.mask == SubnetMask.load(run.mask_path, base=base)
    for name, weight in before.items():
        assert torch.equal(exact[name], differ(after[name], weight)), name
        assert torch.equal(run.mask[name], (after[name].float() - weight.float()).abs() > TOLERANCE), name
        # Fused, stacked, bias or norm: nothing stands still, so that each tensor's comparison can fail.
        assert exact[name].any(), name
    assert 0.2 < run.mask.density < 0.8


def check_train(run: Trained) -> None:
    base = open_checkpoint(run.base)
    before, after = weights_of(base.folder), weights_of(run.subnet.folder)
    assert list(after) == list(before)
    moved = {name: differ(after[name], weight) for name, weight in before.items()}
    assert not any((moved[name] & ~run.mask[name]).any() for name in moved)
    assert sum(int(changed.sum()) for changed in moved.values()) > 0.5 * run.mask.num_trainable

    # The same on disk, whatever transformers makes of it when it loads.
    on_disk, saved = stored(base.folder), stored(run.subnet.folder)
    assert saved.keys() == on_disk.keys()
    for key, value in on_disk.items():
        if key in base.ignored:  # a buffer, which transformers may load and save in float32
            assert same_bits(saved[key].to(value.dtype), value), key
        else:
            assert saved[key].dtype == value.dtype, key
    for name, weight in open_checkpoint(run.subnet.folder).tensors():
        assert torch.equal(differ(weight, base.tensor(name)), moved[name]), name

    sizes: dict[str, int] = {}
    for name, entries in run.trainer.masked_optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and key != "step":
                assert value.numel() == run.mask[name].sum()
                sizes[key] = sizes.get(key, 0) + value.numel()
    assert sizes == dict.fromkeys(("exp_avg", "exp_avg_sq", "master"), run.mask.num_trainable)


def check_verify(run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    folders = [open_checkpoint(run.base).folder, run.full.folder, run.subnet.folder]

    def verify(mask: Path) -> tuple[int, str, str]:
        capsys.readouterr()
        paths = zip(("--base", "--full", "--subnet", "--mask"), map(str, (*folders, mask)), strict=True)
        code = main(["verify", *itertools.chain(*paths), "--json", "-q"])
        return code, *capsys.readouterr()

    code, out, _ = verify(run.mask_path)
    found = json.loads(out)
    base, full, subnet = (torch.cat([w.float().flatten() for w in weights_of(folder).values()]) for folder in folders)
    mask = torch.cat([run.mask[name].flatten() for name in run.mask.names])
    in_full = differ(full, base)
    same = ~differ(subnet, full)
    assert (code, found["off_mask_changed"]) == (0, 0)
    assert found["mask_changed_share"] == pytest.approx(float(differ(subnet, base)[mask].float().mean()))
    assert found["in_mask_identical"]["0"] == pytest.approx(float(same[in_full].float().mean()))
    assert found["identical"]["0"] == pytest.approx(float(same.float().mean()))
    assert found["base_identical"]["0"] == pytest.approx(float((~in_full).float().mean()))
    distance = (subnet.double() - full.double()).norm() / (base.double() - full.double()).norm()
    assert found["relative_distance"] == pytest.approx(float(distance))

    # A mask of other weights under the same names, and one of other names.
    family = model.partition(",")[0]
    for other, options in ((family, TIES.get(model, {})), (next(name for name in FAMILIES if name != family), {})):
        one, two = (save_tiny(other, tmp_path / f"{other}-{seed}", seed=seed, **options) for seed in (2, 3))
        foreign = extract(one, two).save(tmp_path / f"{other}.subnet.safetensors")
        code, out, message = verify(foreign)
        assert (code, out) == (2, "")
        assert str(one) in message


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("model", MODELS)
def test_family(
    model: str,
    column: str,
    trained: Callable[[str, str], Trained],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    record_property("corner", "model")
    place = MODELS.index(model), model, COLUMNS.index(column), column
    record_property("cell", [*place, len(MODELS) * len(COLUMNS)])
    algorithm, stage = column.split(": ")
    run = trained(model, algorithm)
    if stage == "extract":
        check_extract(run)
    elif stage == "train":
        check_train(run)
    else:
        check_verify(run, tmp_path, capsys, model)
    record_property("outcome", "yes")


def tied(model: PreTrainedModel, folder: Path) -> set[str]:
    once = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - once


def fused(model: PreTrainedModel, folder: Path) -> set[str]:
    return kinds(model, lambda name, weight: weight.dim() == 2 and re.search(r"qkv|query_key_value|gate_up", name))


def stacked(model: PreTrainedModel, folder: Path) -> set[str]:
    return kinds(model, lambda name, weight: weight.dim() == 3)


def biases(model: PreTrainedModel, folder: Path) -> set[str]:
    return kinds(model, lambda name, weight: name.endswith(".bias"))


def inner_norms(model: PreTrainedModel, folder: Path) -> set[str]:
    return kinds(model, lambda name, weight: re.search(r"attn\..*norm", name))


def on_disk(model: PreTrainedModel, folder: Path) -> set[str]:
    names = {name for name, _ in model.named_parameters()}
    keys = stored(folder).keys() - open_checkpoint(folder).ignored.keys()
    return {kind_of(key) for key in keys - names}


def scales(model: PreTrainedModel, folder: Path) -> set[str]:
    config: dict[str, Any] = model.config.to_dict()
    values = {name: value for name, value in config.items() if re.search(r"softcap|multiplier$|logits_scaling", name)}
    return {name for name, value in values.items() if value not in (None, 1.0)}


def wider_in_memory(model: PreTrainedModel, folder: Path) -> set[str]:
    specs = open_checkpoint(folder).specs
    return kinds(model, lambda name, weight: weight.dtype != specs[name].dtype)


def kinds(model: PreTrainedModel, wanted: Callable[[str, torch.Tensor], object]) -> set[str]:
    return {kind_of(name) for name, weight in model.named_parameters() if wanted(name, weight)}


def kind_of(name: str) -> str:
    """Return the last words of a name, which say what a weight is; numbers and `weight` itself say nothing."""
    words = [word for word in name.removesuffix(".weight").split(".") if not word.isdigit()]
    return ".".join(words[-2:] if words[-1] in ("bias", "gate") or "experts" in words[-2:] else words[-1:])


FEATURES: dict[str, Callable[[PreTrainedModel, Path], set[str]]] = {
    "tied": tied,
    "fused": fused,
    "stacked": stacked,
    "biases": biases,
    "norms inside attention": inner_norms,
    "other names on disk": on_disk,
    "soft caps and scales": scales,
    "float32 in memory": wider_in_memory,
}
# Newer releases of transformers rename more tensors, and keep more of them in float32.
GROWING = ("other names on disk", "float32 in memory")


def documented() -> dict[str, tuple[str, dict[str, set[str]]]]:
    """Return the page's table: model to its class, and to the weights or config fields named for each feature."""
    rows = re.findall(r"^\| `([^`]+)` \| `(\w+)` \| (.*)\|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        model: (architecture, {name: set(re.findall(r"`([^`]+)`", words)) for name, words in features(cell)})
        for model, architecture, cell in rows
    }


def features(cell: str) -> list[tuple[str, str]]:
    """Split `feature: words; feature: words` of a cell."""
    return [(name, words) for name, found, words in (part.strip().partition(": ") for part in cell.split(";")) if found]


@pytest.mark.parametrize("model", MODELS)
def test_the_page_names_what_is_special_about(model: str, tmp_path: Path) -> None:
    folder = open_checkpoint(base_of(model, tmp_path)).folder
    loaded = load(folder)
    architecture, expected = documented()[model]
    assert architecture == type(loaded).__name__
    assert expected.keys() <= FEATURES.keys()
    is_old = Version(transformers.__version__) < Version("5.24")
    for feature, function in FEATURES.items():
        found, words = function(loaded, folder), expected.get(feature, set())
        assert found <= words if is_old and feature in GROWING else found == words, feature


def test_the_page_names_every_model() -> None:
    assert list(documented()) == MODELS
    assert {feature for _, expected in documented().values() for feature in expected} == set(FEATURES)


def test_the_table_names_every_cell_with_its_outcome() -> None:
    expected = {(model, column): "yes" for model in MODELS for column in COLUMNS}
    assert read_table(PAGE.read_text(encoding="utf-8")) == expected
