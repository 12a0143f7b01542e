"""Chat templates: untrusted Jinja programs that come with a model's weights.

They are written for the environment Hugging Face's transformers gives them, so
this one offers the same: its whitespace settings, ``raise_exception``,
``strftime_now``, ``tojson`` without HTML escapes, loop controls and the
``generation`` tag.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from worker.backends.base import PromptRefused
from worker.chat.conversation import Conversation


class BrokenTemplate(Exception):
    """The source is not a Jinja template."""


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_at(now: float | None) -> Callable[[str], str]:
    """``strftime_now`` of a template, for which it is that time. None: the clock's."""
    moment = datetime.datetime.now() if now is None else datetime.datetime.fromtimestamp(now)

    def strftime_now(pattern: str) -> str:
        return moment.strftime(pattern)

    return strftime_now


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which a model never saw.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's text for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares an instance variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def refused_by_template(error: Exception) -> PromptRefused:
    """What a request gets whose messages a template does not render."""
    return PromptRefused(
        f"the model's chat template cannot render these messages: {error}", param="messages"
    )


class ChatTemplate:
    """One model's template, compiled.

    Rendering runs in a sandbox: a hostile template can waste time and memory,
    but reaches no Python internals. ``tokens`` are the texts of special tokens by the
    names that templates know: ``bos_token``, ``eos_token``. Raises ``BrokenTemplate`` on
    construction.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise BrokenTemplate(f"the model's chat template is broken: {error}") from error
        self.source = source
        self._tokens = dict(tokens)

    def render(self, conversation: Conversation) -> str:
        """The prompt up to where the assistant's answer begins.

        Raises ``PromptRefused`` for whatever goes wrong inside the template,
        which includes its own complaints about roles.
        """
        variables = {
            "add_generation_prompt": True,
            "strftime_now": _strftime_at(conversation.now),
            **conversation.variables(),
            **self._tokens,
        }
        try:
            return self._template.render(variables)
        except Exception as error:
            raise refused_by_template(error) from error
