"""A chat as templates expect it, and what is done for templates that know no tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from protocol.chat import ChatMessage, Tool, ToolCall


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template renders. ``options`` are further variables for it. ``now`` is the
    time for it, in epoch seconds; None: that of the clock."""

    messages: Sequence[ChatMessage]
    tools: Sequence[Tool] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    now: float | None = None

    def variables(self) -> dict[str, Any]:
        """By the names that Hugging Face's templates use; without tools there are none."""
        variables = dict(self.options)
        variables["messages"] = [message_fields(message) for message in self.messages]
        if self.tools:
            variables["tools"] = [tool_fields(tool) for tool in self.tools]
        return variables


def message_fields(message: ChatMessage) -> dict[str, Any]:
    """A message for a template; what it has not got is left out."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [_call_fields(call) for call in message.tool_calls]
    return fields


def tool_fields(tool: Tool) -> dict[str, Any]:
    """A tool as in OpenAI's API, which is what templates show to the model."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _call_fields(call: ToolCall) -> dict[str, Any]:
    # Templates write the arguments with ``tojson``: as text they would be quoted twice.
    function = {"name": call.name, "arguments": _parsed(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments) if arguments else {}
    except (ValueError, RecursionError):
        return arguments


# --- templates without tools ----------------------------------------------------------

_INSTRUCTIONS = """\
You may call one or more functions to help with the user's request. The functions:
<tools>
{tools}
</tools>
To call a function, answer with its name and arguments as JSON within these tags:
<tool_call>
{{"name": <function-name>, "arguments": <arguments-object>}}
</tool_call>"""


def knows_tools(template: str) -> bool:
    """Whether a chat template does anything with the tools it is given."""
    return "tools" in template


def spell_out_tools(conversation: Conversation) -> Conversation:
    """The same chat in plain turns, for a template that ignores tools: instructions in
    the system message, calls and results as text, all in the format of Hermes."""
    messages = [_plain(message) for message in conversation.messages]
    if conversation.tools:
        tools = "\n".join(
            json.dumps(tool_fields(tool), ensure_ascii=False) for tool in conversation.tools
        )
        instructions = _INSTRUCTIONS.format(tools=tools)
        if messages and messages[0].role == "system":
            text = f"{messages[0].content}\n\n{instructions}"
            messages[0] = ChatMessage("system", text, messages[0].name)
        else:
            messages.insert(0, ChatMessage("system", instructions))
    return replace(conversation, messages=messages, tools=())


def _plain(message: ChatMessage) -> ChatMessage:
    if message.role == "tool":
        return ChatMessage("user", f"<tool_response>\n{message.content}\n</tool_response>")
    if not message.tool_calls:
        return message
    calls = [
        json.dumps({"name": call.name, "arguments": _parsed(call.arguments)}, ensure_ascii=False)
        for call in message.tool_calls
    ]
    written = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    texts = [message.content, *written] if message.content else written
    return ChatMessage(message.role, "\n".join(texts), message.name)
