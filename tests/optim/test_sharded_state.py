"""What four processes saved in parts, loaded by four, two and one; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_model import OddModel, batch, odd_mask
from safetensors.torch import load_file

from subnet_ft.checkpoints.parts import PartsReader
from subnet_ft.errors import OptimizerError, OptimizerStateError
from subnet_ft.optim import MaskedAdamW, MaskedOptimizer, load_sharded, save_sharded
from subnet_ft.optim.sharded_state import FACTS, load_sharded_weights, read_facts


@pytest.mark.parametrize("kind", ["adamw", "radam"])
@pytest.mark.parametrize("size", [2, 1])
def test_another_number_of_processes_loads_the_same_bits(runs: Any, kind: str, size: int) -> None:
    for rank in range(size):
        found = runs.result(size, rank)["resumed"][kind]
        assert found == {"state": True, "weights": True, "from_whole": True}


@pytest.mark.parametrize("kind", ["adamw", "radam"])
@pytest.mark.parametrize("size", [2, 1])
def test_another_number_of_processes_goes_on_as_the_first_did(runs: Any, kind: str, size: int) -> None:
    """Within rounding: sums over other numbers of processes round elsewhere."""
    expected = load_file(runs.folder / f"last-{kind}.safetensors")
    found = load_file(runs.folder / f"last-{kind}-{size}.safetensors")
    assert all(torch.allclose(found[name], weight, rtol=0, atol=1e-6) for name, weight in expected.items())


def test_one_plain_process_loads_what_four_saved(runs: Any) -> None:
    model = OddModel()
    optimizer = MaskedAdamW(model.named_parameters(), odd_mask(), lr=0.05, weight_decay=0.1, max_grad_norm=0.5)
    load_sharded(model, optimizer, runs.folder / "parts-adamw")
    expected = torch.load(runs.folder / "whole-adamw.pt", weights_only=True)
    assert all(torch.equal(p.detach(), expected["weights"][name]) for name, p in model.named_parameters())
    for name, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, expected["state"]["state"][name][key]) for key, value in values.items())


@pytest.mark.parametrize("kind", ["adamw", "radam"])
def test_what_four_saved_is_read_as_whole_weights(runs: Any, kind: str) -> None:
    """Rows that do not divide by four, and processes without a row of some tensor."""
    reader = PartsReader(runs.folder / f"parts-{kind}", {name for name, _ in OddModel().named_parameters()})
    expected = torch.load(runs.folder / f"whole-{kind}.pt", weights_only=True)["weights"]
    assert reader.keys() >= expected.keys()
    assert not [key for key in reader if key.startswith("optimizer.")]
    for name, weight in expected.items():
        assert torch.equal(reader.read(name), weight)
        pieces = [piece.clone() for piece in reader.pieces(name, torch.empty(64, dtype=torch.uint8))]
        assert torch.equal(torch.cat(pieces), weight.view(-1))


@pytest.mark.parametrize("size", [4, 2, 1])
def test_another_mask_is_refused_in_every_process(runs: Any, size: int) -> None:
    for rank in range(size):
        said = runs.result(size, rank)["foreign"]
        assert f"belongs to mask {odd_mask().fingerprint[:16]}" in said
        assert odd_mask(seed=9).fingerprint[:16] in said


@pytest.mark.parametrize("size", [4, 2, 1])
def test_persistent_buffers_come_back(runs: Any, size: int) -> None:
    assert [runs.result(size, rank)["buffers"] for rank in range(size)] == [21.0] * size


def test_parts_are_safetensors_and_json(runs: Any) -> None:
    files = {path.suffix for path in (runs.folder / "parts-adamw").iterdir()}
    assert files == {".safetensors", ".json"}
    facts = read_facts(runs.folder / "parts-adamw")
    assert facts["state"]["embedding.weight"]["step"] == {"dtype": "torch.float32", "value": 2.0}
    assert facts["state"]["embedding.weight"]["exp_avg"]["count"] == odd_mask().tensors["embedding.weight"].count


def trained() -> tuple[OddModel, MaskedAdamW]:
    """Return a model after one step, and its optimizer."""
    model = OddModel()
    optimizer = MaskedAdamW(model.named_parameters(), odd_mask(), lr=0.05, max_grad_norm=None)
    model(batch(0)).backward()
    optimizer.step()
    return model, optimizer


def test_save_sharded_in_one_process_is_loaded_again(tmp_path: Path) -> None:
    model, optimizer = trained()
    save_sharded(model, optimizer, tmp_path / "parts")
    other = OddModel()
    load_sharded_weights(other, tmp_path / "parts")
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), model.parameters(), strict=True))
    fresh = MaskedAdamW(other.named_parameters(), odd_mask(), lr=0.05, max_grad_norm=None)
    load_sharded(other, fresh, tmp_path / "parts")
    for name, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, fresh.state_dict()["state"][name][key]) for key, value in values.items())


def test_load_sharded_names_what_is_missing(tmp_path: Path) -> None:
    model, optimizer = trained()
    with pytest.raises(OptimizerStateError, match=r"optimizer\.json` cannot be read \(FileNotFoundError"):
        load_sharded(model, optimizer, tmp_path)
    save_sharded(model, optimizer, tmp_path / "parts")
    (shard,) = (tmp_path / "parts").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(OptimizerStateError, match="cannot be loaded"):
        load_sharded(model, optimizer, tmp_path / "parts")
    shard.unlink()
    with pytest.raises(OptimizerStateError, match="cannot be loaded"):
        load_sharded(model, optimizer, tmp_path / "parts")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "torch.quint99"}, "torch.quint99"),
        ({"count": 3}, "has 3 values, and the mask trains"),
    ],
)
def test_load_sharded_refuses_facts_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model, optimizer = trained()
    save_sharded(model, optimizer, tmp_path)
    facts = json.loads((tmp_path / FACTS).read_text())
    facts["state"]["embedding.weight"]["exp_avg"].update(change)
    (tmp_path / FACTS).write_text(json.dumps(facts))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(OptimizerStateError, match=message):
        load_sharded(model, optimizer, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


class Tables(torch.optim.Adam):
    """Keeps a table that is neither compact nor a number."""

    def step(self, closure: Any = None) -> Any:
        """Step, and fill the table."""
        result = super().step(closure)
        for values in self.state.values():
            values["table"] = torch.ones(3)
        return result


def test_save_sharded_refuses_a_table(tmp_path: Path) -> None:
    model = OddModel()
    optimizer = MaskedOptimizer(Tables, model.named_parameters(), odd_mask(), max_grad_norm=None)
    model(batch(0)).backward()
    optimizer.step()
    with pytest.raises(OptimizerError, match=r"`table` of `embedding\.weight` has shape \(3,\)"):
        save_sharded(model, optimizer, tmp_path)
