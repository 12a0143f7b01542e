"""Writes a random GGUF model with recurrent state instead of a KV cache."""

from pathlib import Path

import gguf
import numpy

from tests.support.tiny_gguf import add_tokenizer, write_tensors
from tests.support.tiny_vocab import tiny_vocab

_HIDDEN, _INNER, _STATE, _RANK, _KERNEL, _LAYERS = 64, 128, 16, 4, 4, 2


def write_tiny_mamba(path: Path) -> Path:
    """Write a Mamba of two layers to `path`, and return it."""
    vocab = tiny_vocab()
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(len(vocab))
    writer.add_context_length(2048)
    writer.add_embedding_length(_HIDDEN)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(_LAYERS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(_KERNEL)
    writer.add_ssm_inner_size(_INNER)
    writer.add_ssm_state_size(_STATE)
    writer.add_ssm_time_step_rank(_RANK)
    add_tokenizer(writer, vocab)
    write_tensors(writer, _weights(len(vocab)))
    return path


def _weights(vocab_size: int) -> dict[str, numpy.ndarray]:
    dice = numpy.random.default_rng(0)

    def random(*shape: int, scale: float = 0.3) -> numpy.ndarray:
        return (dice.standard_normal(shape) * scale).astype(numpy.float32)

    def ones(size: int) -> numpy.ndarray:
        return numpy.ones(size, numpy.float32)

    weights = {
        "token_embd.weight": random(vocab_size, _HIDDEN, scale=1.0),
        "output_norm.weight": ones(_HIDDEN),
        "output.weight": random(vocab_size, _HIDDEN),
    }
    decay = -numpy.tile(numpy.arange(1, _STATE + 1, dtype=numpy.float32), (_INNER, 1))
    for layer in range(_LAYERS):
        weights |= {
            f"blk.{layer}.{name}": tensor
            for name, tensor in {
                "attn_norm.weight": ones(_HIDDEN),
                "ssm_in.weight": random(2 * _INNER, _HIDDEN),
                "ssm_conv1d.weight": random(_INNER, _KERNEL),
                "ssm_conv1d.bias": random(_INNER),
                "ssm_x.weight": random(_RANK + 2 * _STATE, _INNER),
                "ssm_dt.weight": random(_INNER, _RANK),
                "ssm_dt.bias": random(_INNER),
                "ssm_a": decay,
                "ssm_d": ones(_INNER),
                "ssm_out.weight": random(_HIDDEN, _INNER),
            }.items()
        }
    return weights
