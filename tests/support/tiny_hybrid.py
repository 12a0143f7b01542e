"""Writes a random GGUF model half of whose layers are recurrent and half attend."""

import math
from pathlib import Path

import gguf
import numpy

from tests.support.tiny_gguf import add_tokenizer, write_tensors
from tests.support.tiny_vocab import tiny_vocab

_HIDDEN, _INNER, _HEADS, _KERNEL = 64, 128, 2, 8
_KV_HEADS = [0, 2, 0, 2]  # of each layer; none in one that is recurrent


def write_tiny_hybrid(path: Path, *, window: int = 0) -> Path:
    """Write an LFM2 of four layers to `path`, and return it.

    Those that attend see the last `window` tokens, or all.
    """
    vocab = tiny_vocab()
    writer = gguf.GGUFWriter(path, "lfm2")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(len(vocab))
    writer.add_context_length(2048)
    writer.add_embedding_length(_HIDDEN)
    writer.add_block_count(len(_KV_HEADS))
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_shortconv_l_cache(_KERNEL)
    if window:
        writer.add_sliding_window(window)
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
        "token_embd.weight": random(vocab_size, _HIDDEN, gain=8.0),
        "token_embd_norm.weight": ones(_HIDDEN),
        "output.weight": random(vocab_size, _HIDDEN, gain=4.0),
    }
    head = _HIDDEN // _HEADS
    for layer, kv_heads in enumerate(_KV_HEADS):
        tensors = {
            "attn_norm": ones(_HIDDEN),
            "ffn_norm": ones(_HIDDEN),
            "ffn_gate": random(_INNER, _HIDDEN),
            "ffn_up": random(_INNER, _HIDDEN),
            "ffn_down": random(_HIDDEN, _INNER),
        }
        if kv_heads:
            tensors |= {
                "attn_q_norm": ones(head),
                "attn_k_norm": ones(head),
                "attn_q": random(_HIDDEN, _HIDDEN),
                "attn_k": random(kv_heads * head, _HIDDEN),
                "attn_v": random(kv_heads * head, _HIDDEN),
                "attn_output": random(_HIDDEN, _HIDDEN),
            }
        else:
            tensors |= {
                "shortconv.conv": random(_HIDDEN, _KERNEL, gain=2.0),
                "shortconv.in_proj": random(3 * _HIDDEN, _HIDDEN),
                "shortconv.out_proj": random(_HIDDEN, _HIDDEN),
            }
        weights |= {f"blk.{layer}.{name}.weight": tensor for name, tensor in tensors.items()}
    return weights
