"""What a preset consists of: a model by a name of its own, and how it is loaded and asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

#: Stop strings of one request.
MAX_STOPS = 4
#: Variables of a chat template that neither a client nor a preset may set.
RESERVED_OPTIONS = frozenset({"messages", "tools", "add_generation_prompt"})

_INT64 = Meta(ge=-(2**63), le=2**63 - 1)
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Name = Annotated[str, Meta(min_length=1)]
#: A token id, in JSON objects also as a string.
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
PositiveInt = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class SamplingFields(msgspec.Struct, kw_only=True):
    """How to generate, as requests and presets say it. Bounds are checked by the decoder."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    #: -1 is how vLLM's clients say "off".
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    seed: Annotated[int, _INT64] | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    stop: str | list[str] | None = None
    max_tokens: PositiveInt | None = None
    ignore_eos: bool | None = None
    #: False: nothing of the prompt is taken from the prompt cache.
    cache_prompt: bool | None = None


class PresetParameters(
    SamplingFields, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """What a request that does not say otherwise is taken to say."""

    #: Variables of the model's chat template; a request's own come first, one by one.
    chat_template_kwargs: dict[str, Any] | None = None

    def complaint(self) -> str | None:
        """What the decoder cannot see; None when all is well."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or "" in stops:
            return f"stop: at most {MAX_STOPS} stop strings, none of them empty"
        if taken := sorted(RESERVED_OPTIONS & (self.chat_template_kwargs or {}).keys()):
            return f"chat_template_kwargs: {taken[0]!r} is not to be set"
        return None


class PresetLoad(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the model is loaded when a load names the preset, or a request does that loads it."""

    backend: _Name | None = None
    context_length: PositiveInt | None = None
    keep_alive_sec: Annotated[int, Meta(ge=0)] | None = None
    tool_format: _Name | None = None
    draft_model: _Name | None = None

    def options(self) -> Mapping[str, Any]:
        """Those that are given."""
        return {name: value for name, value in _given(self) if value is not None}


class Preset(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """``model`` is an id, an alias, or a list of them, of which the first that can serve does.

    ``system_prompt`` is for requests without one.
    """

    model: str | tuple[str, ...]
    system_prompt: str | None = None
    parameters: PresetParameters = msgspec.field(default_factory=PresetParameters)
    load: PresetLoad = PresetLoad()

    def given(self) -> Mapping[str, Any]:
        """The parameters that are given, by name."""
        return {name: value for name, value in _given(self.parameters) if value is not None}


def _given(struct: msgspec.Struct) -> list[tuple[str, Any]]:
    return [(name, getattr(struct, name)) for name in struct.__struct_fields__]
