"""The formats of tool calls that are known, and which one a chat template uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from worker.chat.answer import Answer, Call, Handler
from worker.chat.literals import FUNCTION_GEMMA, GEMMA4, Notation
from worker.chat.parsing import Steps
from worker.chat.tool_formats import calls_in_code, harmony, json_calls, sections, xml


@dataclass(frozen=True)
class Format:
    """How a family of models writes tool calls.

    ``markers``: texts of special tokens that the detokeniser has to show to the parser.
    ``openers``: what a call begins with, and what reads on from there; ``bare``: the
    same for what is a call only at the beginning of an answer. ``interrupts``: the
    openers are tokens of their own, so that a call is one even where the model forgot
    to end its reasoning. ``whole`` reads the answer instead, reasoning included.
    """

    name: str
    markers: tuple[str, ...]
    openers: Mapping[str, Handler] = field(default_factory=dict)
    bare: Mapping[str, Handler] = field(default_factory=dict)
    interrupts: bool = False
    whole: Handler | None = None


def _tagged(name: str, *dialects: xml.Tags) -> Format:
    """Tags in a section, whose opener models forget now and then."""
    openers: dict[str, Handler] = {
        tags.section: partial(xml.tagged_calls, tags=tags) for tags in dialects
    }
    openers[dialects[0].call] = partial(xml.tagged_calls, tags=dialects[0], inside=True)
    markers = (part for tags in dialects for part in (tags.section, tags.section_end))
    return Format(name, tuple(markers), openers)


def _in_section(
    name: str,
    section: tuple[str, str],
    call: str,
    read: Callable[[Answer, Call], Steps[None]],
    *markers: str,
) -> Format:
    inside = partial(sections.read_section, opener=call, closer=section[1], read=read)
    openers: dict[str, Handler] = {section[0]: inside, call: partial(inside, inside=True)}
    return Format(name, (*section, call, *markers), openers, interrupts=True)


def _gemma(name: str, opener: str, closer: str, notation: Notation) -> Format:
    handler = partial(calls_in_code.gemma_call, notation=notation, closer=closer)
    return Format(name, (opener, closer, *notation.quotes), {opener: handler})


_TAG = (xml.QWEN3_CODER.section, xml.QWEN3_CODER.section_end)
_IN_TAG: Mapping[str, Handler] = {_TAG[0]: xml.tool_call_tag}
_BARE_FUNCTION = {
    xml.QWEN3_CODER.call: partial(xml.tagged_calls, tags=xml.QWEN3_CODER, inside=True)
}
PYTHON_TAGS = {
    "<|tool_call_start|>": "<|tool_call_end|>",
    "<|python_start|>": "<|python_end|>",
}
_MISTRAL = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")

HERMES = Format("hermes", _TAG, _IN_TAG)

FORMATS: Mapping[str, Format] = {
    each.name: each
    for each in (
        HERMES,
        Format("qwen3-coder", _TAG, {**_IN_TAG, **_BARE_FUNCTION}),
        Format("glm", (*_TAG, *xml.GLM_MARKERS), _IN_TAG),
        _tagged("seed", xml.SEED),
        _tagged("minimax", xml.MINIMAX),
        _tagged("dsml", xml.DSML, xml.DSML_V4),
        Format(
            "llama3",
            ("<|python_tag|>",),
            {"<|python_tag|>": calls_in_code.python_tag},
            bare={"{": json_calls.bare_objects},
        ),
        Format(
            "pythonic",
            tuple(tag for tags in PYTHON_TAGS.items() for tag in tags),
            {
                opener: partial(calls_in_code.python_list_in_tags, closer=closer)
                for opener, closer in PYTHON_TAGS.items()
            },
            bare={"[": partial(calls_in_code.python_list, bare=True)},
        ),
        Format("mistral", _MISTRAL, {"[TOOL_CALLS]": json_calls.mistral}),
        # Read alike, but they differ in what a model is made to write.
        Format("mistral-args", _MISTRAL, {"[TOOL_CALLS]": json_calls.mistral}),
        _in_section(
            "deepseek",
            (sections.DEEPSEEK_SECTION, sections.DEEPSEEK_SECTION_END),
            sections.DEEPSEEK_CALL,
            sections.read_deepseek_call,
            sections.DEEPSEEK_ARGUMENTS,
            sections.DEEPSEEK_CALL_END,
        ),
        _in_section(
            "kimi-k2",
            (sections.KIMI_SECTION, sections.KIMI_SECTION_END),
            sections.KIMI_CALL,
            sections.read_kimi_call,
            sections.KIMI_ARGUMENTS,
            sections.KIMI_CALL_END,
        ),
        _gemma("function-gemma", "<start_function_call>", "<end_function_call>", FUNCTION_GEMMA),
        _gemma("gemma4", "<|tool_call>", "<tool_call|>", GEMMA4),
        Format("harmony", harmony.MARKERS, whole=harmony.read_harmony),
    )
}

#: What gives a template away, the most telling first: all of the texts on the left.
_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|message|>"), "harmony"),
    (("<minimax:tool_call>",), "minimax"),
    (("<|tool_call>", "<tool_call|>"), "gemma4"),
    (("<start_function_call>",), "function-gemma"),
    (("<arg_key>",), "glm"),
    (("｜DSML｜",), "dsml"),
    ((sections.DEEPSEEK_SECTION,), "deepseek"),
    ((sections.KIMI_SECTION,), "kimi-k2"),
    (("<|tool_call_start|>",), "pythonic"),
    (("<|tool_list_start|>",), "pythonic"),
    (("<|python_start|>",), "pythonic"),
    (("[func_name1(",), "pythonic"),
    (("<seed:tool_call>",), "seed"),
    (("<function=", "<parameter="), "qwen3-coder"),
    (("[TOOL_CALLS]", "[ARGS]"), "mistral-args"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<tool_call>",), "hermes"),
    (("<function=",), "qwen3-coder"),
    (("<|python_tag|>",), "llama3"),
    (('{"name": function name, "parameters"',), "llama3"),
)


def choose_format(template_source: str, override: str | None = None) -> Format:
    """The format of a chat template's calls; Hermes' if it is unknown or there are none.

    ``override`` is a name in ``FORMATS``; ``ValueError`` for any other.
    """
    if override is not None:
        if override not in FORMATS:
            known = ", ".join(sorted(FORMATS))
            raise ValueError(f"unknown tool format {override!r}: not one of {known}")
        return FORMATS[override]
    for signs, name in _SIGNS:
        if all(sign in template_source for sign in signs):
            return FORMATS[name]
    return HERMES
