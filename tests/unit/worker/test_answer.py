"""Tokens become what they mean: content, reasoning, calls, log probabilities, a finish."""

from __future__ import annotations

import codecs

from protocol.chat import Extras, TokenLogprob, Tool, ToolCallPiece
from protocol.messages import Delta, FinishReason
from worker.answer import Answer
from worker.backends.base import SequenceSpec, StepToken, TokenLogprobs
from worker.chat.output import choose_format, choose_reasoning, create_parser
from worker.stops import StopMatcher

END = 0
TOOL = Tool("f", None, {"type": "object"})


class Letters:
    """Token n is the byte n."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def add(self, token: int) -> str:
        return self._decode(bytes([token]))

    def finish(self) -> str:
        return self._decode(b"", True)


def answer(
    *, max_tokens: int = 1000, stops: tuple[str, ...] = (), tools: bool = False, think: str = ""
) -> Answer:
    parser = None
    if tools or think:
        template = "<think></think>" if think else ""
        parser = create_parser(
            choose_format("<tool_call>"),
            choose_reasoning(template),
            [TOOL] if tools else [],
            prompt_tail=think,
            parallel=True,
        )
    spec = SequenceSpec(1, [1], max_tokens)
    return Answer(spec, Letters(), StopMatcher(stops), lambda token: bytes([token]), parser)


def say(answer: Answer, text: str, *, end: bool = True) -> list[Delta]:
    deltas = [answer.add(StepToken(1, token, False)) for token in text.encode()]
    if end:
        deltas.append(answer.add(StepToken(1, END, True)))
    return deltas


def extras(deltas: list[Delta]) -> list[Extras]:
    return [delta.extras for delta in deltas if delta.extras is not None]


def test_plain_text_needs_no_extras() -> None:
    deltas = say(answer(), "ab")
    assert [(delta.text, delta.finish) for delta in deltas] == [
        ("a", None),
        ("b", None),
        ("", FinishReason.STOP),
    ]
    assert extras(deltas) == []


def test_a_call_is_told_in_pieces_and_is_the_finish() -> None:
    deltas = say(
        answer(tools=True), 'ok<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    )
    assert "".join(delta.text for delta in deltas) == "ok"
    pieces = [piece for each in extras(deltas) for piece in each.tool_calls]
    assert isinstance(pieces[0], ToolCallPiece)
    assert (pieces[0].name, pieces[0].arguments) == ("f", "")
    assert "".join(piece.arguments for piece in pieces) == '{"a": 1}'
    assert deltas[-1].finish is FinishReason.TOOL_CALLS


def test_an_answer_cut_off_in_a_call_is_cut_off() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "b'
    deltas = say(answer(tools=True, max_tokens=len(text)), text, end=False)
    assert deltas[-1].finish is FinishReason.LENGTH
    pieces = [piece for each in extras(deltas) for piece in each.tool_calls]
    assert "".join(piece.arguments for piece in pieces) == '{"a": "b"}'


def test_reasoning_is_counted_and_kept_apart() -> None:
    deltas = say(answer(think="<think>\n"), "hm</think>yes")
    assert "".join(each.reasoning for each in extras(deltas)) == "hm"
    assert sum(each.reasoning_tokens for each in extras(deltas)) == len("hm</think>")
    assert "".join(delta.text for delta in deltas) == "yes"


def test_the_stop_string_is_told() -> None:
    deltas = say(answer(stops=("x", "yz")), "ayz", end=False)
    assert deltas[-1].finish is FinishReason.STOP
    assert extras(deltas) == [Extras(stop="yz")]


def test_log_probabilities_have_the_tokens_bytes() -> None:
    one = answer()
    found = TokenLogprobs(-0.5, [(98, -0.1)])
    delta = one.add(StepToken(1, 97, False, logprobs=found))
    top = [TokenLogprob(98, b"b", -0.1)]
    assert delta.extras == Extras(logprobs=[TokenLogprob(97, b"a", -0.5, top)])
    assert one.add(StepToken(1, END, True, logprobs=found)).extras is None


def test_an_echo_comes_first_and_once() -> None:
    one = answer()
    one.echo = "prompt "
    assert [delta.text for delta in say(one, "ab")] == ["prompt a", "b", ""]
