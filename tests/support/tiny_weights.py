"""Random weights of about a million parameters that still write readable text.

Both file formats are written from the same tensors, so that one seed is the same
model in each (in float32).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tests.support.tiny_vocab import TinyVocab

Flaw = Literal["none", "nan", "stuck"]
"""What is wrong with the weights: nothing; logits that are not a number; logits
that are all equal, so that greedy decoding writes one token over and over."""

Tensors = dict[str, NDArray[np.float32]]

# Measured over seeds and prompts: with 0.2 greedy text has no token twice in a row
# and at least 15 different ones in 24; without it, up to 11 in a row.
_SELF_AVERSION = 0.2


@dataclass(frozen=True)
class Shape:
    """A llama-like architecture; the defaults make about a million parameters."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    context_length: int = 2048
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-5

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def feed_forward(self) -> int:
        return 4 * self.hidden


def tiny_weights(
    shape: Shape,
    vocab: TinyVocab,
    *,
    seed: int = 0,
    extra_rows: int = 0,
    head_norms: bool = False,
    flaw: Flaw = "none",
) -> Tensors:
    """The tensors by their Hugging Face names.

    `extra_rows` embeds that many tokens more than the vocabulary has;
    `head_norms` adds the query and key norms of qwen3.
    """
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> NDArray[np.float32]:
        values: NDArray[np.float64] = random.standard_normal((rows, columns))
        return (values * (gain / math.sqrt(columns))).astype(np.float32)

    def ones(size: int) -> NDArray[np.float32]:
        return np.ones(size, dtype=np.float32)

    hidden, inner = shape.hidden, shape.feed_forward
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size

    embedding = matrix(len(vocab), hidden, gain=math.sqrt(hidden))
    # Only printable tokens get a say in the output: the others have a logit of
    # zero, which is always below the best of some hundred random ones. A token
    # speaks against itself, or greedy decoding would get stuck on some.
    head = np.zeros_like(embedding)
    printable = vocab.printable_ids()
    head[printable] = matrix(len(printable), hidden, gain=4.0)
    head[printable] -= _SELF_AVERSION * embedding[printable]

    padding = ((0, extra_rows), (0, 0))
    tensors: Tensors = {
        "model.embed_tokens.weight": np.pad(embedding, padding),
        "model.norm.weight": ones(hidden),
        "lm_head.weight": np.pad(head, padding),
    }
    for layer in range(shape.layers):
        block = f"model.layers.{layer}"
        tensors |= {
            f"{block}.input_layernorm.weight": ones(hidden),
            f"{block}.self_attn.q_proj.weight": matrix(queries, hidden),
            f"{block}.self_attn.k_proj.weight": matrix(keys, hidden),
            f"{block}.self_attn.v_proj.weight": matrix(keys, hidden),
            f"{block}.self_attn.o_proj.weight": matrix(hidden, queries),
            f"{block}.post_attention_layernorm.weight": ones(hidden),
            f"{block}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"{block}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{block}.mlp.down_proj.weight": matrix(hidden, inner),
        }
        if head_norms:
            tensors[f"{block}.self_attn.q_norm.weight"] = ones(shape.head_size)
            tensors[f"{block}.self_attn.k_norm.weight"] = ones(shape.head_size)
    if flaw == "nan":
        tensors["model.norm.weight"][:] = np.nan
    elif flaw == "stuck":
        tensors["model.norm.weight"][:] = 0.0
    return tensors
