"""What a chat template gets to see, and what becomes of tools where it ignores them."""

import json

from protocol.chat import ChatMessage, Tool, ToolCall
from worker.chat.conversation import Conversation, knows_tools, spell_out_tools

TOOL = Tool("f", "does f", {"type": "object", "properties": {"a": {"type": "integer"}}})
CALL = ToolCall("call_1", "f", '{"a": 1}')


def test_messages_have_what_they_have() -> None:
    chat = Conversation(
        [
            ChatMessage("user", "hi", "ann"),
            ChatMessage("assistant", "", tool_calls=[CALL], reasoning="hm"),
            ChatMessage("tool", "2", "f", tool_call_id="call_1"),
        ]
    )
    assert chat.variables() == {
        "messages": [
            {"role": "user", "content": "hi", "name": "ann"},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "hm",
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "f", "arguments": {"a": 1}},
                    }
                ],
            },
            {"role": "tool", "content": "2", "name": "f", "tool_call_id": "call_1"},
        ]
    }


def test_tools_look_as_in_openais_api() -> None:
    chat = Conversation([], [TOOL, Tool("g")], {"enable_thinking": False})
    variables = chat.variables()
    assert variables["enable_thinking"] is False
    assert variables["tools"][0]["function"]["description"] == "does f"
    assert variables["tools"][1] == {
        "type": "function",
        "function": {"name": "g", "parameters": {"type": "object", "properties": {}}},
    }


def test_arguments_that_are_no_json_stay_text() -> None:
    chat = Conversation([ChatMessage("assistant", "", tool_calls=[ToolCall("1", "f", "{")])])
    [message] = chat.variables()["messages"]
    assert message["tool_calls"][0]["function"]["arguments"] == "{"


def test_options_do_not_replace_the_messages() -> None:
    assert Conversation([], (), {"messages": "mine"}).variables()["messages"] == []


def test_templates_that_know_tools() -> None:
    assert knows_tools("{% if tools %}")
    assert not knows_tools("{% for message in messages %}")


def test_tools_are_spelt_out_in_the_system_message() -> None:
    asked = ChatMessage("user", "hi")
    for messages in ([asked], [ChatMessage("system", "Be brief."), asked]):
        plain = spell_out_tools(Conversation(messages, [TOOL]))
        assert not plain.tools
        assert plain.messages[0].role == "system"
        assert plain.messages[0].content.startswith("Be brief." if len(messages) > 1 else "You")
        line = plain.messages[0].content.split("<tools>\n")[1].split("\n</tools>")[0]
        assert json.loads(line)["function"]["name"] == "f"
        assert plain.messages[-1] == asked


def test_calls_and_results_are_spelt_out() -> None:
    messages = [
        ChatMessage("assistant", "see:", tool_calls=[CALL]),
        ChatMessage("tool", "2", tool_call_id="call_1"),
    ]
    assert spell_out_tools(Conversation(messages)).messages == [
        ChatMessage(
            "assistant",
            'see:\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
        ),
        ChatMessage("user", "<tool_response>\n2\n</tool_response>"),
    ]


def test_arguments_that_are_nested_without_end_stay_text() -> None:
    deep = "[" * 100_000
    chat = Conversation([ChatMessage("assistant", "", tool_calls=[ToolCall("1", "f", deep)])])
    [message] = chat.variables()["messages"]
    assert message["tool_calls"][0]["function"]["arguments"] == deep
    assert deep in spell_out_tools(chat).messages[0].content
