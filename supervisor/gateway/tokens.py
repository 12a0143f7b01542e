"""``POST /tokenize`` and ``/detokenize``, in the shapes of vLLM and of llama.cpp.

The two name the same things differently, and both names are taken: the text is
``prompt`` or ``content``, the switch for the beginning-of-sequence token
``add_special_tokens`` or ``add_special``. Without it the default is that of the server
whose name the text has: on with ``prompt``, off with ``content``.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.responses import Response

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Detokenize, Generate, Tokenize
from supervisor.gateway import inquiries
from supervisor.gateway.body import read_json
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response
from supervisor.gateway.openai.parameters import (
    TokenId,
    invalid_value,
    refuse_unsupported,
    unsupported,
)
from supervisor.gateway.openai.tools import ToolSpec, tool_use
from supervisor.gateway.openai.turns import SYSTEM_ROLES, Turn, checked_options, messages_of
from supervisor.gateway.preset_fields import add_preset
from supervisor.gateway.scheduling import terms_of

#: As many as a worker tells.
MAX_TOKENS = 1_000_000


class TokenizeRequest(msgspec.Struct, kw_only=True):
    model: str
    prompt: str | None = None
    content: str | None = None
    messages: list[Turn] | None = None
    tools: list[ToolSpec] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    parse_special: Any = None
    with_pieces: Any = None
    return_token_strs: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None
    chat_template: Any = None

    @property
    def has_system_prompt(self) -> bool:
        turns = self.messages
        return turns is None or any(turn.role in SYSTEM_ROLES for turn in turns)

    @property
    def settled_options(self) -> Collection[str]:
        return ()

    def add_system_prompt(self, prompt: str) -> None:
        self.messages = [Turn(role="system", content=prompt), *(self.messages or ())]


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    model: str
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_TOKENS)]


class Tokens(msgspec.Struct):
    count: int
    max_model_len: int | None
    tokens: list[int]


class Text(msgspec.Struct):
    """The same text by vLLM's and by llama.cpp's name."""

    prompt: str
    content: str


#: Documented fields that cannot be honoured, with the values that ask for nothing.
_LIMITS: Mapping[str, Sequence[Any]] = {
    "parse_special": (True,),
    "with_pieces": (False,),
    "return_token_strs": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
}

_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)


async def tokenize(gateway: Gateway, call: Call) -> Response:
    started = time.perf_counter()
    request = await read_json(call, _tokenize_decoder, gateway.settings)
    if request.messages is not None:
        add_preset(gateway, request)
    inquiry = to_inquiry(request)
    terms = terms_of(call, started, api_key=gateway.settings.api_key)
    told = await inquiries.tokenize(gateway, call, request.model, inquiry, terms)
    context_length = gateway.fleet.model(call.model).context_length
    return json_response(Tokens(told.count, context_length, told.tokens))


async def detokenize(gateway: Gateway, call: Call) -> Response:
    started = time.perf_counter()
    request = await read_json(call, _detokenize_decoder, gateway.settings)
    terms = terms_of(call, started, api_key=gateway.settings.api_key)
    inquiry = Detokenize(0, request.tokens)
    told = await inquiries.detokenize(gateway, call, request.model, inquiry, terms)
    return json_response(Text(told.text, told.text))


def to_inquiry(request: TokenizeRequest) -> Tokenize:
    """Raises ``CodedError`` for what the decoder cannot see."""
    refuse_unsupported(request, _LIMITS)
    given = [
        name for name in ("prompt", "content", "messages") if getattr(request, name) is not None
    ]
    if not given:
        raise CodedError(
            ErrorCode.MISSING_PARAMETER, "prompt, content or messages is required", param="prompt"
        )
    if len(given) > 1:
        raise invalid_value(given[1], f"not together with {given[0]}")
    add_special = request.add_special_tokens
    if add_special is None:
        add_special = request.add_special
    if request.messages is None:
        for name in ("tools", "chat_template_kwargs"):
            if getattr(request, name):
                raise invalid_value(name, "only with messages")
        text = request.content if request.prompt is None else request.prompt
        if add_special is None:
            add_special = request.prompt is not None
        return Tokenize(0, Generate(0, prompt=text), add_special=add_special)
    if add_special:
        raise unsupported("add_special_tokens", "beside what a chat template writes, true is")
    generate = Generate(
        request_id=0,
        messages=messages_of(request.messages),
        tools=tool_use(request.tools, None).tools,
        template_options=checked_options(request.chat_template_kwargs),
    )
    return Tokenize(0, generate)
