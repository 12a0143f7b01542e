"""From a request to a prompt: what is checked, what parser an answer needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from protocol.chat import ChatMessage, Tool, ToolChoice
from protocol.errors import CodedError, ErrorCode
from protocol.messages import Generate, Load, Sampling
from worker.backends.simulated import SimulatedBackend
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

        def encode_text(self, text: str) -> list[int]:
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
