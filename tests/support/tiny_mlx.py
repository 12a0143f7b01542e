"""Writes a random mlx-lm model directory of about a million parameters, in a second.

Everything is float32: on a CPU, MLX multiplies half-precision matrices many
times slower.
"""

import json
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from tests.support.tiny_vocab import CHAT_TEMPLATE, END_OF_TEXT, TURN_END, TinyVocab, tiny_vocab
from tests.support.tiny_weights import Flaw, Shape, tiny_weights

_GROUP_SIZE = 32
_BITS = 4
_CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def write_tiny_mlx(
    directory: Path,
    *,
    seed: int = 0,
    hidden: int = 128,
    layers: int = 4,
    context_length: int = 2048,
    architecture: Literal["llama", "qwen3"] = "llama",
    model_type: str | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
    extra_embedding_rows: int = 0,
    quantised: bool = False,
    shards: int = 1,
    flaw: Flaw = "none",
) -> Path:
    """Write a model directory that mlx-lm loads, and return it.

    `model_type` overrides the name in config.json, for an architecture that
    nothing knows. `chat_template=None` leaves the template out.
    `extra_embedding_rows` pads the embedding beyond the tokenizer's vocabulary,
    as published models do. `quantised` keeps the matrices in 4 bits with float32
    scales. With more than one of `shards` the weights are spread over
    model-0000N-of-0000M.safetensors with an index.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shape = Shape(hidden=hidden, layers=layers, context_length=context_length)
    vocab = tiny_vocab()
    tensors = tiny_weights(
        shape,
        vocab,
        seed=seed,
        extra_rows=extra_embedding_rows,
        head_norms=architecture == "qwen3",
        flaw=flaw,
    )
    weights = {name: mx.array(tensor) for name, tensor in tensors.items()}
    config = _config(shape, vocab, architecture, rows=len(vocab) + extra_embedding_rows)
    config["model_type"] = model_type or architecture
    if quantised:
        weights = _quantise(weights)
        config["quantization"] = {"group_size": _GROUP_SIZE, "bits": _BITS}
    _write_json(directory / "config.json", config)
    write_tokenizer(directory, vocab, shape, chat_template)
    write_weights(directory, weights, shards)
    return directory


def write_tokenizer(
    directory: Path, vocab: TinyVocab, shape: Shape, chat_template: str | None
) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    vocab.tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.context_length,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    _write_json(directory / "tokenizer_config.json", settings)


def write_weights(directory: Path, weights: dict[str, mx.array], shards: int = 1) -> None:
    """Write the weights as one file, or as shards with an index."""
    metadata = {"format": "mlx"}
    if shards == 1:
        mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata)
        return
    owners: dict[str, str] = {}
    names = list(weights)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        mx.save_safetensors(str(directory / file), part, metadata)
        owners |= dict.fromkeys(part, file)
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in weights.values())},
        "weight_map": owners,
    }
    _write_json(directory / "model.safetensors.index.json", index)


def _config(shape: Shape, vocab: TinyVocab, architecture: str, rows: int) -> dict[str, Any]:
    return {
        "architectures": [_CLASSES[architecture]],
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.feed_forward,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "rms_norm_eps": shape.norm_epsilon,
        "vocab_size": rows,
        "rope_theta": shape.rope_base,
        # Pairs of neighbours are rotated in a llama GGUF; qwen3 has no such switch.
        "rope_traditional": True,
        "max_position_embeddings": shape.context_length,
        "tie_word_embeddings": False,
        "bos_token_id": vocab.id_of(END_OF_TEXT),
        "eos_token_id": vocab.id_of(TURN_END),
    }


def _quantise(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    packed: dict[str, mx.array] = {}
    for name, array in weights.items():
        if array.ndim < 2:
            packed[name] = array
            continue
        stem = name.removesuffix(".weight")
        quantised, scales, biases = mx.quantize(array, group_size=_GROUP_SIZE, bits=_BITS)
        packed |= {name: quantised, f"{stem}.scales": scales, f"{stem}.biases": biases}
    return packed


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))
