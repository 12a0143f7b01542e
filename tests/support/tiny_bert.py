"""Writes a random BERT as GGUF: an embedding model, or a reranker, of a few thousand parameters."""

from pathlib import Path
from typing import Literal

import gguf
import numpy

from tests.support.tiny_gguf import write_tensors

PAD, UNKNOWN, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
_SPECIAL = (PAD, UNKNOWN, CLS, SEP, MASK)
_WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "hello", "world"),
    *("what", "is", "capital", "of", "france", "paris", "berlin", "blue", "sky", "sea"),
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"

Flaw = Literal["none", "nan", "same"]
Pooling = Literal["mean", "cls", "rank"] | None
_POOLING = {
    "mean": gguf.PoolingType.MEAN,
    "cls": gguf.PoolingType.CLS,
    "rank": gguf.PoolingType.RANK,
}

HIDDEN = 64
_FEED_FORWARD = 128
_HEADS = 4
_LAYERS = 2


def bert_tokens() -> list[str]:
    """The vocabulary as GGUF has it: what begins a word has U+2581 before it."""
    return [
        *_SPECIAL,
        *(f"\u2581{word}" for word in dict.fromkeys((*_WORDS, *_LETTERS, *".,?!-"))),
        *_LETTERS,
    ]


def write_tiny_bert(
    path: Path,
    *,
    pooling: Pooling = "mean",
    context_length: int = 128,
    seed: int = 0,
    flaw: Flaw = "none",
    classes: int = 1,
) -> Path:
    """Write the file and return its path. Without a `pooling`, the file does not name one.

    With the flaw "same" every text gets the same vector. A reranker has one of the `classes`.
    """
    tokens = bert_tokens()
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name("tiny-bert")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(context_length)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(_HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    if pooling is not None:
        writer.add_pooling_type(_POOLING[pooling])
    if classes > 1:
        writer.add_classifier_output_labels([f"class {n}" for n in range(classes)])
    writer.add_tokenizer_model("bert")
    writer.add_token_type_count(2)
    writer.add_token_list(tokens)
    kinds = dict.fromkeys(_SPECIAL, gguf.TokenType.CONTROL) | {UNKNOWN: gguf.TokenType.UNKNOWN}
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_bos_token_id(tokens.index(CLS))
    writer.add_unk_token_id(tokens.index(UNKNOWN))
    writer.add_sep_token_id(tokens.index(SEP))
    writer.add_pad_token_id(tokens.index(PAD))
    writer.add_mask_token_id(tokens.index(MASK))
    tensors = _tensors(
        len(tokens), context_length, seed, classes=classes if pooling == "rank" else 0
    )
    if flaw != "none":
        last = f"blk.{_LAYERS - 1}.layer_output_norm"
        tensors[f"{last}.weight"][:] = numpy.nan if flaw == "nan" else 0.0
        tensors[f"{last}.bias"][:] = 1.0
    write_tensors(writer, tensors)
    return path


def _tensors(
    vocab: int, context_length: int, seed: int, *, classes: int
) -> dict[str, numpy.ndarray]:
    random = numpy.random.default_rng(seed)
    tensors: dict[str, numpy.ndarray] = {}

    def matrix(name: str, rows: int, columns: int, scale: float) -> None:
        tensors[name] = random.normal(0.0, scale, (rows, columns)).astype(numpy.float32)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = numpy.ones(HIDDEN, numpy.float32)
        tensors[f"{name}.bias"] = numpy.zeros(HIDDEN, numpy.float32)

    def linear(name: str, outputs: int, inputs: int) -> None:
        matrix(f"{name}.weight", outputs, inputs, inputs**-0.5)
        tensors[f"{name}.bias"] = random.normal(0.0, 0.02, outputs).astype(numpy.float32)

    matrix("token_embd.weight", vocab, HIDDEN, 1.0)
    matrix("token_types.weight", 2, HIDDEN, 0.1)
    matrix("position_embd.weight", context_length, HIDDEN, 0.5)
    norm("token_embd_norm")
    for layer in range(_LAYERS):
        block = f"blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            linear(f"{block}.{name}", HIDDEN, HIDDEN)
        norm(f"{block}.attn_output_norm")
        linear(f"{block}.ffn_up", _FEED_FORWARD, HIDDEN)
        linear(f"{block}.ffn_down", HIDDEN, _FEED_FORWARD)
        norm(f"{block}.layer_output_norm")
    if classes:
        linear("cls", HIDDEN, HIDDEN)
        linear("cls.output", classes, HIDDEN)
    return tensors
