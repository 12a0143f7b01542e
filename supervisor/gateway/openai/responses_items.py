"""What a conversation of the Responses API consists of, as it is stored and sent.

Everything that goes in or comes out is an item with an id: messages, reasoning, calls
of functions and their results.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from supervisor.gateway.openai.logprobs import ContentLogprob

Status = Literal["in_progress", "completed", "incomplete"]
Role = Literal["user", "system", "developer", "assistant"]

#: How reasoning begins that was sealed here.
_SEAL = b"opta-lmx:"


class InputText(msgspec.Struct, frozen=True, tag="input_text"):
    text: str


class OutputText(msgspec.Struct, frozen=True, tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[ContentLogprob] = []


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    refusal: str


class ReasoningText(msgspec.Struct, frozen=True, tag="reasoning_text"):
    text: str


class SummaryText(msgspec.Struct, frozen=True, tag="summary_text"):
    text: str


class Message(msgspec.Struct, frozen=True, tag="message"):
    id: str
    role: Role
    content: list[InputText | OutputText | Refusal]
    status: Status = "completed"


class Reasoning(msgspec.Struct, frozen=True, tag="reasoning"):
    """``encrypted_content`` is the same text for clients that send only this back."""

    id: str
    summary: list[SummaryText] = []
    content: list[ReasoningText] = []
    encrypted_content: str | UnsetType = UNSET
    status: Status = "completed"


class FunctionCall(msgspec.Struct, frozen=True, tag="function_call"):
    """``arguments`` is JSON text. ``namespace``: of the function, if it is in one."""

    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: Status = "completed"
    namespace: str | UnsetType = UNSET


class FunctionCallOutput(msgspec.Struct, frozen=True, tag="function_call_output"):
    id: str
    call_id: str
    output: str | list[InputText]
    status: Status = "completed"


OutputItem = Message | Reasoning | FunctionCall
Item = OutputItem | FunctionCallOutput


def new_item_id(prefix: str) -> str:
    """By the item's type: ``msg``, ``rs``, ``fc`` or ``fco``."""
    return f"{prefix}_{secrets.token_hex(16)}"


def seal(text: str) -> str:
    """Reasoning as ``encrypted_content``: opaque, but no secret, as ``content`` has it too."""
    return base64.b64encode(_SEAL + text.encode(errors="replace")).decode()


def unseal(sealed: str) -> str | None:
    """None for what was not sealed here."""
    try:
        data = base64.b64decode(sealed, validate=True)
        return data[len(_SEAL) :].decode() if data.startswith(_SEAL) else None
    except (binascii.Error, ValueError):
        return None
