"""Writes a random GGUF model of about a million parameters, in well under a second."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import gguf
import numpy

from tests.support.tiny_vocab import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    END_OF_TEXT,
    MARKER_TOKENS,
    TURN_END,
    TinyVocab,
    tiny_vocab,
)
from tests.support.tiny_weights import Flaw, Shape, tiny_weights

_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


RERANK_TEMPLATE = "<|im_start|>{query}<|im_end|><|im_start|>{document}<|im_end|>yes or no?"


def write_tiny_gguf(
    path: Path,
    *,
    seed: int = 0,
    hidden: int = 128,
    layers: int = 4,
    context_length: int = 2048,
    architecture: str = "llama",
    chat_template: str | None = CHAT_TEMPLATE,
    extra_embedding_rows: int = 0,
    flaw: Flaw = "none",
    pooling: Literal["mean", "last", "rank"] | None = None,
    tensors_per_part: int = 0,
    tokenizer: Callable[[gguf.GGUFWriter, TinyVocab], None] | None = None,
) -> Path:
    """Write a GGUF with llama's tensors to `path`, and return it.

    An `architecture` other than "llama" is only a name: a reader that knows it
    misses its tensors, one that doesn't refuses it. `chat_template=None` leaves
    the template out. `extra_embedding_rows` makes the embedding disagree with
    the vocabulary, which llama.cpp refuses to load. With a `pooling` it is no
    generator: each text becomes one vector, or with "rank" a score, as qwen3 has it.
    A `tokenizer` adds the metadata of another one than the shared.
    With `tensors_per_part` the model is split, and the first part's path returned.
    """
    shape = Shape(hidden=hidden, layers=layers, context_length=context_length)
    vocab = tiny_vocab()
    name = "qwen3" if pooling == "rank" else architecture
    writer = gguf.GGUFWriter(path, name, split_max_tensors=tensors_per_part)
    _add_shape(writer, shape, vocab)
    if pooling is not None:
        writer.add_pooling_type(gguf.PoolingType[pooling.upper()])
    (tokenizer or add_tokenizer)(writer, vocab)
    if pooling == "rank":
        chat_template = None
        writer.add_string("tokenizer.chat_template.rerank", RERANK_TEMPLATE)
        writer.add_classifier_output_labels(["yes", "no"])
        writer.add_key_length(shape.head_size)
        writer.add_value_length(shape.head_size)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    tensors = tiny_weights(shape, vocab, seed=seed, extra_rows=extra_embedding_rows, flaw=flaw)
    named = {_gguf_name(name): tensor for name, tensor in tensors.items()}
    if pooling == "rank":
        for layer in range(layers):
            for name in ("attn_q_norm", "attn_k_norm"):
                named[f"blk.{layer}.{name}.weight"] = numpy.ones(shape.head_size, numpy.float32)
        random = numpy.random.default_rng(seed)
        named["cls.output.weight"] = random.normal(0, 0.05, (2, hidden)).astype(numpy.float32)
    write_tensors(writer, named)
    return next(path.parent.glob(f"{path.stem}-00001-of-*")) if tensors_per_part else path


def write_tensors(writer: gguf.GGUFWriter, tensors: Mapping[str, numpy.ndarray]) -> None:
    """Write the file, of which everything else has been added, and close it."""
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, shape: Shape, vocab: TinyVocab) -> None:
    writer.add_name("tiny-random")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(len(vocab))
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope_base)


def add_tokenizer(writer: gguf.GGUFWriter, vocab: TinyVocab, pre: str = "gpt-2") -> None:
    """Add the metadata of the shared tokenizer, `pre` its way of splitting text."""
    kinds = dict.fromkeys(CONTROL_TOKENS, gguf.TokenType.CONTROL)
    kinds |= dict.fromkeys(MARKER_TOKENS, gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in vocab.tokens])
    writer.add_token_merges([" ".join(pair) for pair in vocab.merges])
    writer.add_bos_token_id(vocab.id_of(END_OF_TEXT))
    writer.add_eos_token_id(vocab.id_of(TURN_END))
    writer.add_pad_token_id(vocab.id_of(END_OF_TEXT))
    writer.add_add_bos_token(False)


def _gguf_name(name: str) -> str:
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_BLOCK_NAMES[rest.removesuffix('.weight')]}.weight"
