"""The shape of a model, as far as its memory depends on it; from a GGUF header or a config.

Sources: llama.cpp's key names (gguf-py/gguf/constants.py), the configs of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from supervisor.gguf import GgufHeader

#: A header may claim any number; beyond this it is nonsense, and sums stay small.
_MAX_NUMBER = 2**40
_MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class Geometry:
    """Numbers are 0 where nothing says so.

    ``kv``: elements that one token adds to the KV cache, in all layers that keep every
    token; ``windowed_kv`` in those that keep the last ``window`` of them. ``state``:
    elements of one sequence's recurrent state. ``feed_forward`` is the widest one.
    """

    embedding: int = 0
    feed_forward: int = 0
    vocabulary: int = 0
    heads: int = 0
    kv: int = 0
    windowed_kv: int = 0
    window: int = 0
    state: int = 0


UNKNOWN = Geometry()


def of_gguf(header: GgufHeader) -> Geometry:
    """llama.cpp keeps every token in every layer, also where attention has a window."""
    number = header.number
    layers = min(number("block_count") or 0, _MAX_LAYERS)
    embedding = _sane(number("embedding_length"))
    heads = max(_per_layer(header, "attention.head_count", layers), default=0)
    kv_heads = _per_layer(header, "attention.head_count_kv", layers) or [heads] * layers
    head = embedding // heads if heads else 0
    key = _sane(number("attention.key_length")) or head
    value = _sane(number("attention.value_length")) or head
    return Geometry(
        embedding=embedding,
        feed_forward=max(_per_layer(header, "feed_forward_length", layers), default=0),
        vocabulary=header.lengths.get("tokenizer.ggml.tokens", 0),
        heads=heads,
        kv=sum(kv_heads) * (key + value),
        state=_recurrent_layers(kv_heads, layers) * _state_of_a_layer(header, embedding),
    )


def of_config(config: Mapping[str, Any]) -> Geometry:
    """As mlx-lm makes its caches: those of layers with a window hold no more than that."""
    text = config.get("text_config")
    config = {**config, **(text if isinstance(text, dict) else {})}

    def number(*names: str) -> int:
        numbers = [_sane(config.get(name)) for name in names]
        return next(filter(None, numbers), 0)

    layers = min(number("num_hidden_layers", "n_layer", "n_layers"), _MAX_LAYERS)
    embedding = number("hidden_size", "n_embd", "d_model")
    heads = number("num_attention_heads", "n_head")
    key = value = number("head_dim") or (embedding // heads if heads else 0)
    kv_heads = number("num_key_value_heads", "num_kv_heads") or heads
    if latent := number("kv_lora_rank"):
        kv_heads, key, value = 1, latent, number("qk_rope_head_dim")
    window = number("sliding_window") if config.get("use_sliding_window", True) else 0
    windowed = _windowed_layers(config, layers) if window else 0
    a_layer = kv_heads * (key + value)
    return Geometry(
        embedding=embedding,
        feed_forward=number("intermediate_size", "n_inner", "ffn_dim"),
        vocabulary=number("vocab_size"),
        heads=heads,
        kv=(layers - windowed) * a_layer,
        windowed_kv=windowed * a_layer,
        window=window,
    )


def _windowed_layers(config: Mapping[str, Any], layers: int) -> int:
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return min(layers, kinds.count("sliding_attention"))
    # Every so many layers one sees everything.
    pattern = _sane(config.get("sliding_window_pattern"))
    return layers - layers // pattern if pattern else 0


def _recurrent_layers(kv_heads: list[int], layers: int) -> int:
    return sum(count == 0 for count in kv_heads) if kv_heads else layers


def _state_of_a_layer(header: GgufHeader, embedding: int) -> int:
    """Of a recurrent layer of any kind (llama.cpp: ``llama_hparams``, ``n_embd_r`` and ``_s``)."""
    if cached := _sane(header.number("shortconv.l_cache")):
        return (cached - 1) * embedding
    if head := _sane(header.number("wkv.head_size")):
        return embedding * (head + 2)
    inner, size, kernel, groups = (
        _sane(header.number(f"ssm.{name}"))
        for name in ("inner_size", "state_size", "conv_kernel", "group_count")
    )
    return max(0, kernel - 1) * (inner + 2 * groups * size) + inner * size


def _per_layer(header: GgufHeader, key: str, layers: int) -> list[int]:
    """One number for each layer; nothing where the header has neither one nor as many."""
    numbers = header.arrays.get(f"{header.architecture}.{key}")
    if numbers is not None:
        return [_sane(number) for number in numbers[:layers]]
    one = header.number(key)
    return [] if one is None else [_sane(one)] * layers


def _sane(number: object) -> int:
    """A whole number that a model may have; 0 for anything else."""
    if isinstance(number, bool) or not isinstance(number, int):
        return 0
    return number if 0 <= number <= _MAX_NUMBER else 0
