"""Writes a random GGUF model most of whose layers see a sliding window only."""

import math
from pathlib import Path

import gguf
import numpy

from tests.support.tiny_gguf import add_tokenizer, write_tensors
from tests.support.tiny_vocab import tiny_vocab

_WINDOW = 32
_HIDDEN, _INNER, _LAYERS = 64, 128, 6  # of gemma3's layers every sixth sees all
_HEADS, _KV_HEADS, _HEAD_SIZE = 2, 1, 32


def write_tiny_gemma(path: Path) -> Path:
    """Write a Gemma 3 of six layers to `path`, and return it."""
    vocab = tiny_vocab()
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(len(vocab))
    writer.add_context_length(2048)
    writer.add_embedding_length(_HIDDEN)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_key_length(_HEAD_SIZE)
    writer.add_value_length(_HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(_WINDOW)
    writer.add_rope_freq_base(10_000.0)
    add_tokenizer(writer, vocab)
    write_tensors(writer, _weights(len(vocab)))
    return path


def _weights(vocab_size: int) -> dict[str, numpy.ndarray]:
    dice = numpy.random.default_rng(0)

    def random(rows: int, columns: int, gain: float = 1.0) -> numpy.ndarray:
        values = dice.standard_normal((rows, columns))
        return (values * (gain / math.sqrt(columns))).astype(numpy.float32)

    def ones(size: int) -> numpy.ndarray:
        return numpy.ones(size, numpy.float32)

    weights = {
        "token_embd.weight": random(vocab_size, _HIDDEN),
        "output_norm.weight": ones(_HIDDEN),
        "output.weight": random(vocab_size, _HIDDEN, gain=4.0),
    }
    queries, keys = _HEADS * _HEAD_SIZE, _KV_HEADS * _HEAD_SIZE
    for layer in range(_LAYERS):
        weights |= {
            f"blk.{layer}.{name}.weight": tensor
            for name, tensor in {
                "attn_norm": ones(_HIDDEN),
                "attn_q": random(queries, _HIDDEN),
                "attn_q_norm": ones(_HEAD_SIZE),
                "attn_k": random(keys, _HIDDEN),
                "attn_k_norm": ones(_HEAD_SIZE),
                "attn_v": random(keys, _HIDDEN),
                "attn_output": random(_HIDDEN, queries),
                "post_attention_norm": ones(_HIDDEN),
                "ffn_norm": ones(_HIDDEN),
                "ffn_gate": random(_INNER, _HIDDEN),
                "ffn_up": random(_INNER, _HIDDEN),
                "ffn_down": random(_HIDDEN, _INNER),
                "post_ffw_norm": ones(_HIDDEN),
            }.items()
        }
    return weights
