"""Tiny random models built from the real config classes, for tests and first looks: the model name `tiny:FAMILY`.

The weights are random and fixed by a seed; what is real is everything else: the architecture, its parameter names,
its tied, fused and stacked weights, and how transformers converts them between disk and memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from subnet_ft.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_PAD, _EOS = "<pad>", "<eos>"
_CHARACTERS = "\n 0123456789+-*/=().,:?!abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'\"<>_"

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}

# What each family adds to the common sizes; an absent key keeps the family's own default.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {},
    "phi3": {"original_max_position_embeddings": 128},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "olmo2": {},
    # Its scale factors, of which the config's defaults are all 1.
    "granite": {
        "embedding_multiplier": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
        "logits_scaling": 2.0,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per character; unknown characters become `<pad>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([_PAD, _EOS, *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    build: Any = PreTrainedTokenizerFast  # untyped upstream
    fast: PreTrainedTokenizerFast = build(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=(
            "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        ),
    )
    return fast


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """Build the config of a two-layer model of `family` (a transformers `model_type`).

    Args:
        family: A key of `FAMILIES`.
        **overrides: Config fields that replace the tiny sizes.

    Raises:
        CheckpointError: `family` is unknown.
    """
    if family not in FAMILIES:
        raise CheckpointError(f"`tiny:{family}` is not a tiny model. Choose one of {', '.join(sorted(FAMILIES))}.")
    from transformers import AutoConfig

    fields = {**_COMMON, **FAMILIES[family], **overrides}
    vocabulary_size = 2 + len(_CHARACTERS)
    return AutoConfig.for_model(
        family, vocab_size=vocabulary_size, pad_token_id=0, eos_token_id=1, bos_token_id=1, **fields
    )


def tiny_model(family: str, *, dtype: torch.dtype | None = None, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a random causal language model of `family`; the same seed gives the same weights.

    Args:
        family: A key of `FAMILIES`.
        dtype: Dtype of every parameter; bfloat16 when `None`.
        seed: Seed of the initialisation; the global generators are left as they were.
        **overrides: Config fields that replace the tiny sizes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build: Any = AutoModelForCausalLM.from_config  # untyped upstream
        model: Any = build(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4.0)  # the default scale of 0.02 leaves two layers with next to no signal
    converted: PreTrainedModel = model.to(torch.bfloat16 if dtype is None else dtype).eval()
    return converted


def save_tiny(family: str, folder: str | Path, **options: Any) -> Path:
    """Save `tiny_model(family, **options)` and its tokenizer as an ordinary checkpoint folder."""
    folder = Path(folder)
    tiny_model(family, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
