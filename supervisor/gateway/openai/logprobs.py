"""Log probabilities in the two shapes that OpenAI's APIs have for them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from protocol.chat import TokenLogprob

#: JSON knows no infinity; this is OpenAI's own stand-in for "very unlikely".
_LOWEST = -9999.0


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ContentLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ContentLogprob(
                _text(each),
                _finite(each.logprob),
                list(each.text),
                [TopLogprob(_text(top), _finite(top.logprob), list(top.text)) for top in each.top],
            )
            for each in tokens
        ]
    )


class TextLogprobsWriter:
    """The shape of text completions, in as many parts as come; it counts characters."""

    def __init__(self) -> None:
        self._offset = 0

    def write(self, tokens: Sequence[TokenLogprob]) -> TextLogprobs:
        written = TextLogprobs([], [], [], [])
        for each in tokens:
            text = _text(each)
            written.tokens.append(text)
            written.token_logprobs.append(_finite(each.logprob))
            written.top_logprobs.append({_text(top): _finite(top.logprob) for top in each.top})
            written.text_offset.append(self._offset)
            self._offset += len(text)
        return written


def _text(token: TokenLogprob) -> str:
    """A part of a character is spelt out, as OpenAI does it."""
    try:
        return token.text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.text)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
