"""From a request to a prompt: what is checked, what parser an answer needs."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from protocol.chat import ChatMessage, Tool, ToolChoice
from protocol.errors import CodedError, ErrorCode
from protocol.messages import (
    Detokenize,
    Detokenized,
    Generate,
    Load,
    Sampling,
    Tokenize,
    Tokenized,
)
from worker import prompt
from worker.backends.simulated import SimulatedBackend
from worker.chat.conversation import Conversation
from worker.chat.template import ChatTemplate
from worker.prompt import PromptBuilder

HERMES = "{% if tools %}<tool_call>{% endif %}{{ tool_call.name }}"
MESSAGES = [ChatMessage("user", "hi")]
TOOLS = [Tool("f")]


def builder(folder: Path, template: str | None = None, **script: object) -> PromptBuilder:
    path = folder / "m.sim.json"
    path.write_text(json.dumps({"chat_template": template, **script}))
    backend = SimulatedBackend()
    return PromptBuilder(backend, backend.load(Load(str(path)), lambda _: None))


def text_of(tokens: list[int]) -> str:
    return bytes(tokens).decode()


def test_plain_chats_need_no_parser(tmp_path: Path) -> None:
    prepared = builder(tmp_path, HERMES).prepare(Generate(1, messages=MESSAGES))
    assert text_of(prepared.tokens) == "user: hi\n"
    assert prepared.parser is None
    assert prepared.markers == ()


def test_a_template_that_prints_the_time_prints_that_of_the_request(tmp_path: Path) -> None:
    """A run, its resume and its repetition on another worker have the same prompt."""

    class Clockwork(SimulatedBackend):
        def render_chat(self, conversation: Conversation) -> str:
            return ChatTemplate("{{ strftime_now('%s.%f') }}", {}).render(conversation)

    path = tmp_path / "m.sim.json"
    path.write_text("{}")

    def prompt_of(request: Generate) -> list[int]:
        backend = Clockwork()
        loaded = backend.load(Load(str(path)), lambda _: None)
        return PromptBuilder(backend, loaded).prepare(request).tokens

    first = Generate(1, messages=MESSAGES, accepted_at=1_700_000_000.25)
    again = msgspec.structs.replace(first, request_id=2)
    resumed = msgspec.structs.replace(first, request_id=3, resume_tokens=[5, 6])
    assert text_of(prompt_of(first)) == "1700000000.250000"
    assert prompt_of(first) == prompt_of(again) == prompt_of(resumed)
    assert prompt_of(first) != prompt_of(msgspec.structs.replace(first, accepted_at=None))


def test_tools_need_a_parser_and_its_markers(tmp_path: Path) -> None:
    prompts = builder(tmp_path, HERMES)
    prepared = prompts.prepare(Generate(1, messages=MESSAGES, tools=TOOLS))
    assert prepared.parser is not None
    assert "<tool_call>" in prepared.markers
    for more in ({"raw": True}, {"tool_choice": ToolChoice.NONE}):
        request = Generate(1, messages=MESSAGES, tools=TOOLS, **more)
        assert prompts.prepare(request).parser is None


def test_a_template_with_thinking_always_needs_one(tmp_path: Path) -> None:
    prompts = builder(tmp_path, "{{ message.content.split('</think>') }}<think>")
    assert prompts.prepare(Generate(1, messages=MESSAGES)).parser is not None


def test_tools_are_spelt_out_for_a_template_that_ignores_them(tmp_path: Path) -> None:
    prepared = builder(tmp_path, "{{ messages }}").prepare(
        Generate(1, messages=MESSAGES, tools=TOOLS)
    )
    assert '{"name": "f"' in text_of(prepared.tokens)
    assert prepared.parser is not None


def test_an_echo_is_the_prompt_as_text(tmp_path: Path) -> None:
    prompts = builder(tmp_path)
    assert prompts.prepare(Generate(1, prompt="hi", echo=True)).echo == "hi"
    assert prompts.prepare(Generate(1, prompt=[104, 105], echo=True)).echo == "hi"
    assert prompts.prepare(Generate(1, prompt="hi")).echo == ""


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (Generate(1, prompt=""), ErrorCode.INVALID_VALUE, "prompt"),
        (Generate(1, prompt=[1, 9999]), ErrorCode.INVALID_VALUE, "prompt"),
        (
            Generate(1, prompt="x", sampling=Sampling(logit_bias={9999: 1})),
            ErrorCode.INVALID_VALUE,
            "logit_bias",
        ),
        (Generate(1, prompt="x" * 10), ErrorCode.CONTEXT_LENGTH_EXCEEDED, "prompt"),
        (Generate(1, messages=MESSAGES * 9), ErrorCode.CONTEXT_LENGTH_EXCEEDED, "messages"),
    ],
)
def test_what_is_at_fault_is_named(
    tmp_path: Path, request_: Generate, code: ErrorCode, param: str
) -> None:
    with pytest.raises(CodedError) as refused:
        builder(tmp_path, context_length=10).prepare(request_)
    assert (refused.value.code, refused.value.param) == (code, param)


def test_what_cannot_fit_is_refused_for_its_beginning(tmp_path: Path) -> None:
    read: list[int] = []

    class Tokenizer(SimulatedBackend):
        """Four characters a token, but runs of spaces, which are one of 100."""

        def encode_text(self, text: str, *, add_special: bool = True) -> list[int]:
            read.append(len(text))
            words = len(text.replace(" ", "")) // 4
            return [1] * (words + text.count(" ") // 100)

    path = tmp_path / "m.sim.json"
    path.write_text(json.dumps({"context_length": 1000}))
    backend = Tokenizer()
    prompts = PromptBuilder(backend, backend.load(Load(str(path)), lambda _: None))
    for text in ("word" * 5_000_000, " " * 50_000 + "word" * 5_000_000):
        read.clear()
        with pytest.raises(CodedError) as refused:
            prompts.prepare(Generate(1, prompt=text))
        assert refused.value.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
        assert refused.value.param == "prompt"
        assert sum(read) < 300_000
    # Long, and fits.
    assert len(prompts.prepare(Generate(1, prompt=" " * 90_000)).tokens) == 900


def test_a_prompt_is_counted_with_its_tools_whatever_the_context(tmp_path: Path) -> None:
    prompts = builder(tmp_path, "{{ messages }}", context_length=4)
    bare = prompts.answer(Tokenize(1, Generate(0, messages=MESSAGES)))
    assert bare == Tokenized(1, 9, list(b"user: hi\n"))
    count = prompts.answer(
        Tokenize(1, Generate(0, messages=MESSAGES, tools=TOOLS), count_only=True)
    )
    assert isinstance(count, Tokenized)
    assert (count.count > 100, count.tokens) == (True, [])


def test_nothing_is_no_tokens(tmp_path: Path) -> None:
    prompts = builder(tmp_path)
    assert prompts.answer(Tokenize(1, Generate(0, prompt=""))) == Tokenized(1, 0)
    assert prompts.answer(Detokenize(1, [])) == Detokenized(1, "")


def test_text_of_tokens_is_whole_characters(tmp_path: Path) -> None:
    prompts = builder(tmp_path)
    assert prompts.answer(Detokenize(1, list("é".encode()))) == Detokenized(1, "é")
    assert prompts.answer(Detokenize(1, list("é".encode())[:1])) == Detokenized(1, "\ufffd")
    for token in (-1, 10_000):
        with pytest.raises(CodedError) as error:
            prompts.answer(Detokenize(1, [token]))
        assert (error.value.code, error.value.param) == (ErrorCode.INVALID_VALUE, "tokens")


def test_answers_to_inquiries_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = builder(tmp_path)
    monkeypatch.setattr(prompt, "MAX_TOKENS_TOLD", 3)
    monkeypatch.setattr(prompt, "MAX_TEXT_BYTES_TOLD", 3)
    with pytest.raises(CodedError, match="4 tokens; at most 3") as error:
        prompts.answer(Tokenize(1, Generate(0, prompt="abcd")))
    assert error.value.param == "prompt"
    counted = Tokenize(1, Generate(0, prompt="abcd"), count_only=True)
    assert prompts.answer(counted) == Tokenized(1, 4)
    with pytest.raises(CodedError, match="4 bytes; at most 3"):
        prompts.answer(Detokenize(1, list(b"abcd")))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RecursionError(), ErrorCode.INVALID_VALUE, "nested too deeply"),
        (MemoryError("no"), ErrorCode.INTERNAL_ERROR, "MemoryError: no"),
        (BaseException("a panic"), ErrorCode.INTERNAL_ERROR, "BaseException: a panic"),
    ],
)
def test_what_goes_wrong_with_a_text_is_its_requests_business(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: ErrorCode,
    message: str,
) -> None:
    prompts = builder(tmp_path)

    def fail(*_: object, **__: object) -> list[int]:
        raise error

    monkeypatch.setattr(SimulatedBackend, "encode_text", fail)
    for ask in (prompts.prepare, lambda generate: prompts.answer(Tokenize(1, generate))):
        with pytest.raises(CodedError, match=message) as refusal:
            ask(Generate(1, prompt="hi"))
        assert (refusal.value.code, refusal.value.param) == (code, "prompt")
