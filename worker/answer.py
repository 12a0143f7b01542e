"""The output side of one request: tokens become text, and text what it means.

Detokeniser, stop strings, then the parser for reasoning and tool calls. What is held
back on the way comes out with the answer's end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from protocol.chat import Extras, TokenLogprob
from protocol.messages import Delta, FinishReason
from worker.backends.base import Detokenizer, SequenceSpec, StepToken
from worker.chat.output import OutputParser
from worker.stops import StopMatcher

#: Text of a token that may be only part of a character.
TokenBytes = Callable[[int], bytes]


@dataclass(slots=True)
class Answer:
    """``echo`` is put before the text. Without a ``parser`` the text is all there is."""

    spec: SequenceSpec
    detokenizer: Detokenizer
    stops: StopMatcher
    token_bytes: TokenBytes
    parser: OutputParser | None = None
    echo: str = ""
    sampled: int = 0

    @property
    def limit(self) -> int:
        """How many tokens there may be, with those of an earlier run."""
        return self.spec.sampled + self.spec.max_tokens

    @property
    def begun(self) -> bool:
        """Whether this run has brought anything."""
        return self.sampled > self.spec.sampled

    def replay(self, tokens: Iterable[int]) -> bool:
        """Take the tokens of an earlier run in, whose output is with the client.

        All state is then as it was: what was held back is told when its time comes.
        False if the answer ends with them.
        """
        number = self.spec.sequence_id
        return all(self.add(StepToken(number, token, False)).finish is None for token in tokens)

    def add(self, produced: StepToken) -> Delta:
        """Take one token in. A delta with a ``finish`` is the last.

        The finish is ``stop`` in the middle of an answer only for a stop string: the
        backend, which does not know them, has then to be told.
        """
        self.sampled += 1
        text, finish = self._text(produced)
        if self.echo:
            text, self.echo = self.echo + text, ""
        logprobs = self._logprobs(produced)
        if self.parser is None:
            extras = None
            if logprobs or self.stops.found is not None:
                extras = Extras(logprobs=logprobs, stop=self.stops.found)
            return Delta(self.spec.sequence_id, text, [produced.token], finish, extras)
        return self._parsed(self.parser, produced.token, text, finish, logprobs)

    def _text(self, produced: StepToken) -> tuple[str, FinishReason | None]:
        if produced.is_end:
            return self._rest()[0], FinishReason.STOP
        text = self.stops.feed(self.detokenizer.add(produced.token))
        if self.stops.stopped:
            return text, FinishReason.STOP
        if self.sampled < self.limit:
            return text, None
        rest, finish = self._rest()
        return text + rest, finish

    def _rest(self) -> tuple[str, FinishReason]:
        """The text that was held back, and the finish of an answer that has no end."""
        text = self.stops.feed(self.detokenizer.finish()) + self.stops.flush()
        return text, FinishReason.STOP if self.stops.stopped else FinishReason.LENGTH

    def _parsed(
        self,
        parser: OutputParser,
        token: int,
        text: str,
        finish: FinishReason | None,
        logprobs: list[TokenLogprob],
    ) -> Delta:
        reasoning_tokens = int(parser.in_reasoning)
        content, reasoning, calls = parser.feed(text)
        if finish is not None:
            rest = parser.finish()
            content += rest.content
            reasoning += rest.reasoning
            calls = [*calls, *rest.calls]
            if finish is FinishReason.STOP and parser.called:
                finish = FinishReason.TOOL_CALLS
        stop = self.stops.found
        extras = None
        if reasoning or reasoning_tokens or calls or logprobs or stop is not None:
            extras = Extras(reasoning, reasoning_tokens, calls, logprobs, stop)
        return Delta(self.spec.sequence_id, content, [token], finish, extras)

    def _logprobs(self, produced: StepToken) -> list[TokenLogprob]:
        found = produced.logprobs
        if found is None or produced.is_end:
            return []
        top = [TokenLogprob(token, self.token_bytes(token), value) for token, value in found.top]
        own = self.token_bytes(produced.token)
        return [TokenLogprob(produced.token, own, found.logprob, top)]
