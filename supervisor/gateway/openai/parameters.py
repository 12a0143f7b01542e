"""The request fields that chat and text completions share.

The rule for what cannot be honoured: a field that OpenAI documents and that
would change the answer is refused by name (``unsupported_parameter``), never
dropped in silence. ``null`` and values that ask for nothing (``"n": 1``,
``"tools": []``) count as absent. Fields nobody documents are ignored: local
clients send extras of other servers. ``metadata``, ``store``, ``service_tier``
and their like change no answer and are ignored as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, TypeGuard, TypeVar

import msgspec
from msgspec import Meta

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Generate, Sampling
from supervisor.presets import MAX_STOPS, SamplingFields
from supervisor.presets import PositiveInt as PositiveInt
from supervisor.presets import TokenId as TokenId

N = TypeVar("N", int, float)


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Parameters(SamplingFields, kw_only=True):
    """How to generate. Bounds are checked by the decoder."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    #: Whose request it is, if it is a text; see ``gateway.scheduling``.
    user: Any = None
    safety_identifier: Any = None

    def sampling(self) -> Sampling:
        default = Sampling()
        return Sampling(
            temperature=_or(self.temperature, default.temperature),
            top_p=_or(self.top_p, default.top_p),
            top_k=max(0, _or(self.top_k, default.top_k)),
            min_p=_or(self.min_p, default.min_p),
            repetition_penalty=_or(self.repetition_penalty, default.repetition_penalty),
            presence_penalty=_or(self.presence_penalty, default.presence_penalty),
            frequency_penalty=_or(self.frequency_penalty, default.frequency_penalty),
            seed=self.seed,
            logit_bias=self.logit_bias or {},
        )

    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS:
            raise invalid_value("stop", f"at most {MAX_STOPS} stop strings")
        if "" in stops:
            raise invalid_value("stop", "a stop string must not be empty")
        return stops

    @property
    def claims(self) -> tuple[Any, ...]:
        """What may name the client, the more telling first."""
        return self.user, self.safety_identifier

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def several(request: Generate, answers: int) -> list[Generate]:
    """One request for each answer; with a seed, each has its own that follows from it."""
    seed = request.sampling.seed
    if answers == 1 or seed is None:
        return [request] * answers
    return [
        msgspec.structs.replace(
            request,
            # Seeds are signed 64-bit numbers.
            sampling=msgspec.structs.replace(
                request.sampling, seed=(seed + i + 2**63) % 2**64 - 2**63
            ),
        )
        for i in range(answers)
    ]


def _or(value: N | None, default: N) -> N:
    return default if value is None else value


def refuse_unsupported(
    fields: msgspec.Struct, harmless: Mapping[str, Collection[Any]], at: str = ""
) -> None:
    """Raise for the first field of ``harmless`` with a value that is not listed there.

    ``at`` precedes the field's name, where ``fields`` are not the body itself.
    """
    for name, values in harmless.items():
        value = getattr(fields, name)
        if value is not None and value not in values:
            raise unsupported(f"{at}{name}")


def unsupported(param: str, what: str = "this value is") -> CodedError:
    return CodedError(
        ErrorCode.UNSUPPORTED_PARAMETER,
        f"{param}: {what} not supported yet",
        param=param,
    )


def missing(param: str) -> CodedError:
    return CodedError(ErrorCode.MISSING_PARAMETER, f"{param} is required", param=param)


def invalid_value(param: str, message: str) -> CodedError:
    return CodedError(ErrorCode.INVALID_VALUE, f"{param}: {message}", param=param)


def texts_or_tokens(value: str | list[str | int | list[int]], param: str) -> list[str | list[int]]:
    """What may be one text, the token ids of one, or a list of either, as a list."""
    if isinstance(value, str):
        return [value]
    if not value or [] in value:
        raise invalid_value(param, "must not be empty")
    if _all_ids(value):
        return [value]
    if _all_texts(value) or _all_id_lists(value):
        return list(value)
    raise CodedError(
        ErrorCode.INVALID_TYPE,
        f"{param}: must be a string, a list of token ids, or a list of either",
        param=param,
    )


def _all_ids(prompt: Sequence[object]) -> TypeGuard[list[int]]:
    return all(isinstance(item, int) for item in prompt)


def _all_texts(prompt: Sequence[object]) -> TypeGuard[list[str]]:
    return all(isinstance(item, str) for item in prompt)


def _all_id_lists(prompt: Sequence[object]) -> TypeGuard[list[list[int]]]:
    return all(isinstance(item, list) for item in prompt)
