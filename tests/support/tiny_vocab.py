"""The tokenizer and chat template that every tiny model shares.

A byte-level BPE over all 256 bytes, so that any text survives encoding and
decoding, with merges for common English, JSON and a little code.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
MARKER_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")

CHAT_TEMPLATE = """\
{%- if tools -%}
<|im_start|>system
# Tools
{% for tool in tools -%}
{{ tool | tojson }}
{% endfor -%}
Call one with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function or call -%}
<tool_call>{"name": "{{ function.name }}", "arguments": {{ function.arguments | tojson }}}\
</tool_call>
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

_MERGED_SIZE = 512
_CORPUS = (
    "The quick brown fox jumps over the lazy dog. Hello world, how are you today?",
    "What is the capital of France? The capital of France is Paris, on the river Seine.",
    "You are a helpful assistant. Please answer the question in one or two short sentences.",
    "There was a time when people would walk for hours to see what they could find there.",
    "Say hello to the others and tell them that we are going to be there in the morning.",
    "She said that it was not the first time, and that it would not be the last of them.",
    '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}',
    "def add(left, right):\n    return left + right\n\nfor number in range(10):\n    print(number)",
    "system\nuser\nassistant\ntool\n",
)


@dataclass(frozen=True)
class TinyVocab:
    """A trained vocabulary: `tokens[i]` is the token with id i."""

    tokenizer: Tokenizer
    tokens: Sequence[str]
    merges: Sequence[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.tokens)

    def id_of(self, token: str) -> int:
        return self.tokens.index(token)

    def printable_ids(self) -> list[int]:
        """The tokens that are plain visible text by themselves."""
        reserved = {*CONTROL_TOKENS, *MARKER_TOKENS}
        return [
            index
            for index, token in enumerate(self.tokens)
            if token not in reserved
            and (text := self.tokenizer.decode([index])).isascii()
            and text.isprintable()
        ]


@cache
def tiny_vocab() -> TinyVocab:
    """Train the vocabulary; the same every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=_MERGED_SIZE,
            special_tokens=list(CONTROL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in MARKER_TOKENS])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return TinyVocab(
        tokenizer=tokenizer,
        tokens=[str(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())],
        merges=[(left, right) for left, right in merges],
    )
