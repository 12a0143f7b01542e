"""Reasoning that a model writes before its answer, between tags."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from worker.chat.answer import Answer
from worker.chat.parsing import SPACE, Steps, other_than


@dataclass(frozen=True)
class Reasoning:
    """How a model marks its reasoning.

    ``anywhere``: not only at the beginning of an answer. That is for openers that
    are tokens of their own, which no text contains by chance.
    """

    name: str
    open: str
    close: str
    anywhere: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts of special tokens that the detokeniser has to show to the parser."""
        # Of Gemma's opener only the beginning is a token; the channel's name is text.
        return (self.open.removesuffix("thought\n"), self.close)

    def opened_by(self, prompt_tail: str) -> bool:
        """Whether the prompt ends inside the reasoning, so that no opener will come."""
        return prompt_tail.rstrip().endswith(self.open.rstrip())


REASONING = (
    Reasoning("gemma4", "<|channel>thought\n", "<channel|>", anywhere=True),
    Reasoning("mistral", "[THINK]", "[/THINK]"),
    Reasoning("seed", "<seed:think>", "</seed:think>"),
    Reasoning("cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
    Reasoning("think", "<think>", "</think>"),
)


def choose_reasoning(template_source: str) -> Reasoning | None:
    """The reasoning tags that a chat template knows; ``None`` if it knows none.

    Also ``None`` for Harmony, whose channels its tool format reads.
    """
    if "<|channel|>" in template_source and "<|message|>" in template_source:
        return None
    for reasoning in REASONING:
        # In a template's source a line break is written as an escape.
        if reasoning.open.rstrip() in template_source or reasoning.close in template_source:
            return reasoning
    return None


def read_reasoning(answer: Answer, reasoning: Reasoning, also: Collection[str] = ()) -> Steps[str]:
    """Reasoning up to its end, without the white space around it; the opener is taken.

    It may end without its closer at one of ``also``, which is taken and returned.
    """
    source, out = answer.source, answer.out
    out.in_reasoning = True
    plain = other_than("".join(stop[0] for stop in (reasoning.close, *also)), space=True)
    yield from source.space()
    source.settle()
    while True:
        if source.some(plain):
            out.think(source.release())
        elif not (yield from source.peek()):
            out.think(source.release())
            return ""
        elif source.some(SPACE):
            continue
        elif found := (yield from source.accept(reasoning.close, *also)):
            break
        else:
            source.take()
            out.think(source.release())
    out.in_reasoning = False
    if found != reasoning.close:
        return found
    source.settle()
    yield from source.space()
    source.settle()
    return ""
