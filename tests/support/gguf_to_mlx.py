"""Turns a llama GGUF into an mlx-lm directory, with its weights kept quantised.

For the demo model, so that both backends can run it. MLX reads the tensors of
F32, F16, Q4_0, Q4_1 and Q8_0 files itself; the tokenizer is rebuilt from the
file's metadata. Scales are widened to float32, which a CPU multiplies many times
faster than half precision.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_GROUP_SIZE = 32  # what a block of a GGUF's Q4 and Q8 types holds
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_to_mlx(source: Path, directory: Path) -> Path:
    """Write the mlx-lm directory of `source`, and return it.

    Raises ValueError for another architecture than llama.
    """
    reader = gguf.GGUFReader(source)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture = metadata["general.architecture"]
    if architecture != "llama":
        raise ValueError(f"{source.name} has the architecture {architecture}, not llama")
    directory.mkdir(parents=True, exist_ok=True)

    loaded = mx.load(str(source))
    assert isinstance(loaded, dict)
    weights = {_mlx_name(name): _widened(array) for name, array in loaded.items()}
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})

    config = _config(metadata, tied="lm_head.weight" not in weights)
    if any(name.endswith(".scales") for name in weights):
        config["quantization"] = _quantization(reader.tensors)
    _write_json(directory / "config.json", config)
    _write_tokenizer(directory, metadata)
    return directory


def _mlx_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{_NAMES[stem]}.{kind}"
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{_NAMES[part]}.{kind}"


def _widened(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if array.dtype in (mx.float16, mx.bfloat16) else array


def _quantization(tensors: list[gguf.ReaderTensor]) -> dict[str, Any]:
    """4 bits, save for the tensors that say otherwise."""
    settings: dict[str, Any] = {"group_size": _GROUP_SIZE, "bits": 4}
    for tensor in tensors:
        module = _mlx_name(tensor.name).removesuffix(".weight")
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            settings[module] = {"group_size": _GROUP_SIZE, "bits": 8}
        elif not module.endswith("norm") and tensor.tensor_type in (
            gguf.GGMLQuantizationType.F16,
            gguf.GGMLQuantizationType.F32,
        ):
            settings[module] = False
    return settings


def _config(metadata: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    hidden = metadata["llama.embedding_length"]
    heads = metadata["llama.attention.head_count"]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": metadata["llama.block_count"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": hidden // heads,
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "rope_theta": metadata.get("llama.rope.freq_base", 10_000.0),
        "rope_traditional": True,  # a llama GGUF's rows are permuted for it
        "max_position_embeddings": metadata["llama.context_length"],
        "tie_word_embeddings": tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
    }


def _write_tokenizer(directory: Path, metadata: dict[str, Any]) -> None:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata["tokenizer.ggml.token_type"]
    merges = [
        (left, right)
        for left, _, right in (line.partition(" ") for line in metadata["tokenizer.ggml.merges"])
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    )
    splits: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        splits.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == gguf.TokenType.CONTROL
        ]
    )
    tokenizer.save(str(directory / "tokenizer.json"))

    end = metadata["tokenizer.ggml.eos_token_id"]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[end],
        "pad_token": tokens[metadata.get("tokenizer.ggml.padding_token_id", end)],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))
