"""Chat templates are programs from strangers: what they may do, and what their errors become."""

from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest

from protocol.chat import ChatMessage
from protocol.errors import ErrorCode
from worker.backends.base import PromptRefused
from worker.chat.conversation import Conversation
from worker.chat.template import BrokenTemplate, ChatTemplate

HELLO = [ChatMessage("user", "hello")]


def render(source: str, messages: list[ChatMessage] = HELLO) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    return template.render(Conversation(messages))


def test_messages_tokens_and_the_generation_prompt_are_there() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}:{{ m['content'] }}]{% endfor %}"
        "{% if add_generation_prompt %}go{{ eos_token }}{% endif %}"
    )
    assert render(source) == "<s>[user:hello]go</s>"


def test_name_is_undefined_unless_given() -> None:
    source = "{{ messages[0].name is defined }}"
    assert render(source) == "False"
    assert render(source, [ChatMessage("user", "hi", "ann")]) == "True"


def test_tools_and_documents_are_undefined() -> None:
    assert render("{{ tools is defined }} {{ documents is defined }}") == "False False"


def test_block_lines_leave_no_whitespace() -> None:
    assert render("{% if true %}\n  {% set x = 1 %}\nyes\n{% endif %}\n") == "yes\n"


def test_tojson_does_not_escape_html_or_unicode() -> None:
    assert render("""{{ {"a": "<b> & 'é'"} | tojson }}""") == """{"a": "<b> & 'é'"}"""


def test_tojson_keeps_order_and_takes_indent() -> None:
    assert render('{{ {"b": 1, "a": 2} | tojson(indent=1) }}') == '{\n "b": 1,\n "a": 2\n}'


def test_loop_controls_work() -> None:
    assert (
        render("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "012"
    )


def test_generation_tag_is_transparent() -> None:
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "ahellob"


def test_strftime_now_formats_the_date() -> None:
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10


def test_now_is_when_the_request_was_accepted() -> None:
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}", {})
    accepted_at = 1_700_000_000.25
    told = template.render(Conversation(HELLO, now=accepted_at))
    assert told == template.render(Conversation(HELLO, now=accepted_at))
    assert datetime.fromisoformat(told).timestamp() == accepted_at
    assert told != template.render(Conversation(HELLO))


def test_now_is_the_same_in_macros_and_all_over_the_template() -> None:
    source = (
        "{% macro now() %}{{ strftime_now('%H:%M:%S.%f') }}{% endmacro %}"
        "{{ now() }} {{ strftime_now('%H:%M:%S.%f') }}"
    )
    first, second = render(source).split()
    assert first == second


def test_complaint_of_the_template_reaches_the_client() -> None:
    with pytest.raises(PromptRefused, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.code == ErrorCode.INVALID_VALUE
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ nothing.at.all }}",
        "{{ range(10 ** 9) | list }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_errors_while_rendering_are_the_requests_fault(source: str) -> None:
    with pytest.raises(PromptRefused):
        render(source)


@pytest.mark.parametrize("source", ["{% if %}", "{{ ", "{% nosuchtag %}", "{{ x | nosuchfilter }}"])
def test_broken_source_is_found_at_once(source: str) -> None:
    with pytest.raises(BrokenTemplate, match="broken"):
        ChatTemplate(source, {})


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__']['open'] }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__base__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
    "{{ lipsum.__globals__['os'].popen('touch PWNED').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ '%s' | format(raise_exception.__code__) }}",
    "{{ raise_exception | attr('__globals__') }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("source", ATTACKS)
def test_sandbox_holds(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # What the sandbox hides raises, or is undefined and prints as nothing.
    with suppress(PromptRefused):
        assert render(source) == ""
    assert not list(tmp_path.iterdir())


def test_message_text_is_never_a_template() -> None:
    assert (
        render("{{ messages[0].content }}", [ChatMessage("user", "{{ 7 * 7 }}")]) == "{{ 7 * 7 }}"
    )
