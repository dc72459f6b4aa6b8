"""A checkpoint's tensors are what `from_pretrained` gives, and anything less is refused with the next step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from helpers import same_bits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaModel, conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, WeightTransform

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.checkpoints.shards import ShardReader
from subnet_ft.checkpoints.tiny import FAMILIES, tiny_model
from subnet_ft.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def assert_equals_from_pretrained(checkpoint: Checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype="auto")
    expected = dict(model.named_parameters())
    assert list(checkpoint.specs) == list(expected)
    for name, tensor in checkpoint.tensors():
        # transformers 5.24 keeps routers in float32; widening is one to one, so that equal bits still mean equal bits.
        widened = name.endswith(".mlp.gate.weight") and expected[name].dtype == torch.float32
        assert same_bits(tensor.float() if widened else tensor, expected[name].detach()), name
        assert same_bits(checkpoint.tensor(name), tensor), name
        assert (checkpoint.specs[name].shape, checkpoint.specs[name].dtype) == (tuple(tensor.shape), tensor.dtype)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_open_checkpoint_equals_from_pretrained(family: str, sharded: bool, tmp_path: Path) -> None:
    tiny_model(family, seed=1).save_pretrained(tmp_path, max_shard_size="10KB" if sharded else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    assert_equals_from_pretrained(open_checkpoint(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_open_checkpoint_keeps_the_stored_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model("mixtral", dtype=dtype).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert {spec.dtype for spec in checkpoint.specs.values()} == {dtype}
    assert_equals_from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("family", "on_disk", "in_memory"),
    [
        ("gpt_neox", "embed_out.weight", "lm_head.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight", "model.layers.0.mlp.experts.down_proj"),
        ("deepseek_v3", "model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"),
    ],
)
def test_open_checkpoint_names_tensors_as_in_memory(family: str, on_disk: str, in_memory: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    if on_disk in model.state_dict():
        pytest.skip(f"transformers {transformers.__version__} has `{on_disk}` under that name in memory, too")
    model.save_pretrained(tmp_path)
    assert on_disk in load_file(tmp_path / "model.safetensors")
    specs = open_checkpoint(tmp_path).specs
    assert in_memory in specs
    assert on_disk not in specs


def test_open_checkpoint_reads_no_weight(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subnet_ft.checkpoints.shards.ShardReader.read", lambda *_: pytest.fail("a weight was read"))
    open_checkpoint(llama)


def test_tensors_converts_a_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    read: list[str] = []
    plain = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda self, key: read.append(key) or plain(self, key))
    list(checkpoint.tensors())
    assert sorted(read) == sorted(load_file(tmp_path / "model.safetensors").keys() - checkpoint.ignored.keys())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("size", [8, 1000, 1 << 20])
def test_pieces_add_up_to_the_tensors(family: str, size: int, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path, max_shard_size="20KB")
    checkpoint = open_checkpoint(tmp_path)
    found = {}
    for name, pieces in checkpoint.pieces(size):
        parts = [piece.clone() for piece in pieces]
        assert {part.numel() for part in parts[:-1]} <= {size}
        found[name] = torch.cat(parts)
    assert list(found) == list(checkpoint.specs)
    for name, tensor in checkpoint.tensors():
        assert torch.equal(found[name].view(torch.int16), tensor.view(-1).view(torch.int16)), name


def test_pieces_takes_the_names_and_their_order(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    wanted = list(checkpoint.specs)[3:0:-1]
    assert [name for name, _ in checkpoint.pieces(8, wanted)] == wanted
    with pytest.raises(CheckpointError, match="has no parameter `lm_head`"):
        checkpoint.pieces(8, ["lm_head"])


@pytest.fixture
def llama_conversion(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[WeightTransform]], None]:
    """Give llama other rules of conversion, as some families have them, for one test."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the cache
    cache = conversion_mapping._checkpoint_conversion_mapping_cache
    return lambda rules: monkeypatch.setitem(cache, "llama", rules)


def test_tensors_splits_a_fused_weight_once(
    llama: Path, llama_conversion: Callable[[list[WeightTransform]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for layer in ("model.layers.0.mlp", "model.layers.1.mlp"):
            parts = [tensors.pop(f"{layer}.{part}_proj.weight") for part in ("gate", "up")]
            tensors[f"{layer}.both_proj.weight"] = torch.cat(parts)
        return tensors

    rewrite(llama, fuse)
    targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    llama_conversion([WeightConverter("mlp.both_proj.weight", targets, operations=[Chunk(dim=0)])])
    assert_equals_from_pretrained(open_checkpoint(llama))

    checkpoint = open_checkpoint(llama)
    read: list[str] = []
    plain = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda self, key: read.append(key) or plain(self, key))
    list(checkpoint.tensors())
    assert sorted(read) == sorted(load_file(llama / "model.safetensors"))


def test_open_checkpoint_takes_names_that_need_no_renaming(
    llama: Path, llama_conversion: Callable[[list[WeightTransform]], None]
) -> None:
    llama_conversion([WeightRenaming("self_attn", "attention")])
    assert_equals_from_pretrained(open_checkpoint(llama))


def test_tensors_yields_the_wanted_ones_in_the_given_order(llama: Path) -> None:
    wanted = ["model.norm.weight", EMBEDDING, "model.norm.weight"]
    assert [name for name, _ in open_checkpoint(llama).tensors(wanted)] == wanted


def test_tensors_refuses_an_unknown_name(llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no parameter `lm_head\.weight`; it has 20"):
        open_checkpoint(llama).tensor(HEAD)


def test_tensor_can_be_written_without_touching_the_file(llama: Path) -> None:
    before = (llama / "model.safetensors").read_bytes()
    open_checkpoint(llama).tensor("model.norm.weight").zero_()
    assert (llama / "model.safetensors").read_bytes() == before


def test_open_checkpoint_ignores_buffers_and_says_so(tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).ignored == {"model.layers.1.mlp.gate.e_score_correction_bias": "a buffer"}


def test_open_checkpoint_ignores_leftovers_that_transformers_drops(llama: Path) -> None:
    leftover = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(llama, lambda tensors: {**tensors, leftover: torch.zeros(4)})
    checkpoint = open_checkpoint(llama)
    assert checkpoint.ignored == {leftover: "not used by this architecture"}
    assert_equals_from_pretrained(checkpoint)


def test_open_checkpoint_ignores_a_copy_of_a_tied_weight(llama: Path) -> None:
    rewrite(llama, lambda tensors: {**tensors, HEAD: tensors[EMBEDDING].clone()})
    checkpoint = open_checkpoint(llama)
    assert HEAD not in checkpoint.specs
    assert checkpoint.ignored == {HEAD: "a copy of the weight it is tied to"}
    assert_equals_from_pretrained(checkpoint)


def test_open_checkpoint_unties_stored_weights_that_differ(llama: Path) -> None:
    rewrite(llama, lambda tensors: {**tensors, HEAD: tensors[EMBEDDING] + 1})
    checkpoint = open_checkpoint(llama)
    assert list(checkpoint.specs)[-1] == HEAD
    assert_equals_from_pretrained(checkpoint)


def test_open_checkpoint_finds_a_tied_weight_under_its_other_name(llama: Path) -> None:
    rewrite(llama, lambda tensors: {HEAD if name == EMBEDDING else name: value for name, value in tensors.items()})
    checkpoint = open_checkpoint(llama)
    assert EMBEDDING in checkpoint.specs
    assert_equals_from_pretrained(checkpoint)


def test_open_checkpoint_adds_the_base_models_prefix(llama: Path) -> None:
    rewrite(llama, lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()})
    assert_equals_from_pretrained(open_checkpoint(llama))


def test_open_checkpoint_strips_the_base_models_prefix(llama: Path) -> None:
    set_config(llama, architectures=["LlamaModel"])
    checkpoint = open_checkpoint(llama)
    expected = dict(LlamaModel.from_pretrained(llama, dtype="auto").named_parameters())
    assert list(checkpoint.specs) == list(expected)
    assert all(same_bits(tensor, expected[name].detach()) for name, tensor in checkpoint.tensors())


def test_open_checkpoint_refuses_a_missing_tensor(llama: Path) -> None:
    rewrite(llama, lambda tensors: {name: value for name, value in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(CheckpointError, match=r"1 parameters without a tensor: `model\.norm\.weight`.*save_pretrained"):
        open_checkpoint(llama)


def test_open_checkpoint_refuses_a_missing_expert(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {name: value for name, value in tensors.items() if ".experts.3." not in name})
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj`: \(3, 128, 32\) on disk, \(4, 128, 32\) by"):
        open_checkpoint(tmp_path)


def test_open_checkpoint_refuses_an_extra_tensor(llama: Path) -> None:
    rewrite(llama, lambda tensors: {**tensors, "base_model.lora_A.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"1 tensors without a parameter: `base_model\.lora_A\.weight`"):
        open_checkpoint(llama)


def test_open_checkpoint_refuses_a_resized_tensor(llama: Path) -> None:
    rewrite(llama, lambda tensors: {**tensors, EMBEDDING: tensors[EMBEDDING][:-1].clone()})
    with pytest.raises(CheckpointError, match=r"`model\.embed_tokens\.weight`: \(8\d, 32\) on disk, \(8\d, 32\) by"):
        open_checkpoint(llama)


def test_open_checkpoint_refuses_two_tensors_for_one_parameter(tmp_path: Path) -> None:
    model = tiny_model("gpt_neox")
    if HEAD not in model.state_dict():
        pytest.skip(f"transformers {transformers.__version__} renames no tensor of this architecture")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {**tensors, HEAD: tensors["embed_out.weight"].clone()})
    with pytest.raises(CheckpointError, match=r"both stand for `lm_head\.weight`"):
        open_checkpoint(tmp_path)


def test_open_checkpoint_refuses_an_unknown_architecture(llama: Path) -> None:
    set_config(llama, architectures=["HomemadeForCausalLM"], auto_map={"AutoModel": "modeling.Homemade"})
    with pytest.raises(CheckpointError, match=r"'HomemadeForCausalLM'.*its repository, which is never run here"):
        open_checkpoint(llama)


def test_open_checkpoint_refuses_a_config_without_an_architecture(llama: Path) -> None:
    set_config(llama, architectures=None)
    with pytest.raises(CheckpointError, match="of the architecture None"):
        open_checkpoint(llama)


def test_open_checkpoint_refuses_a_quantized_model(llama: Path) -> None:
    set_config(llama, quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=r"quantized \(fp8\).*dequantize\(\)"):
        open_checkpoint(llama)


def test_open_checkpoint_refuses_eight_bit_weights(llama: Path) -> None:
    rewrite(llama, lambda tensors: {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()})
    with pytest.raises(CheckpointError, match=r"stored as F8_E4M3; weights must be BF16, F16 or F32"):
        open_checkpoint(llama)


def test_open_checkpoint_refuses_a_damaged_config(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read `.*config\.json`"):
        open_checkpoint(llama)


def test_open_checkpoint_refuses_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(CheckpointError, match=r"PEFT adapter of `org/base`.*merge_and_unload"):
        open_checkpoint(tmp_path)


def test_open_checkpoint_names_the_checkpoint_inside_a_run(llama: Path) -> None:
    for step in (80, 100):
        (llama / f"checkpoint-{step}").mkdir()
        (llama / f"checkpoint-{step}" / "config.json").write_bytes((llama / "config.json").read_bytes())
    (llama / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"such as `.*checkpoint-100`"):
        open_checkpoint(llama)


@pytest.mark.parametrize(("file", "hint"), [("model.gguf", "Name the file"), ("notes.txt", "it holds notes.txt")])
def test_open_checkpoint_refuses_a_folder_without_config(file: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=f"no config.json.*{hint}"):
        open_checkpoint(tmp_path)
