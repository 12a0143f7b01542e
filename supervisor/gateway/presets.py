"""``GET /admin/presets``, and loads that name an alias or a preset."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from operator import itemgetter
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response

from protocol.errors import CodedError, ErrorCode
from supervisor.gate import LoadSpec
from supervisor.gateway.candidates import Candidates
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response
from supervisor.gateway.routing import options_of
from supervisor.names import ANY

T = TypeVar("T")


class PresetView(msgspec.Struct):
    """``parameters`` and ``load`` have what the preset says, and nothing else."""

    name: str
    model: str | tuple[str, ...]
    system_prompt: str | None
    parameters: Mapping[str, Any]
    load: Mapping[str, Any]


class Presets(msgspec.Struct):
    """``count`` is that of the presets."""

    presets: list[PresetView]
    aliases: Mapping[str, str | tuple[str, ...]]
    count: int


async def list_presets(gateway: Gateway, _call: Call) -> Response:
    """As the settings have them, in their order."""
    presets = [
        PresetView(name, each.model, each.system_prompt, each.given(), each.load.options())
        for name, each in gateway.settings.presets.items()
    ]
    return json_response(Presets(presets, gateway.settings.aliases, len(presets)))


async def load_by_name(
    gateway: Gateway, spec: LoadSpec, load: Callable[[LoadSpec], Awaitable[T]]
) -> T:
    """``load`` the model, or the first that can be of those that the name stands for.

    A preset's load options are taken where ``spec`` has none. Raises what ``load`` does.
    """
    name = spec.model_id
    route = gateway.names.routes.get(name)
    if route is None:
        return await load(spec)
    if spec.path is not None or ANY in route.candidates:
        what = "names no model" if ANY in route.candidates else "is an alias or a preset"
        raise CodedError(
            ErrorCode.INVALID_VALUE, f"model_id: {name!r} {what}: it needs an id", param="model_id"
        )

    async def attempt(model_id: str, options: Mapping[str, Any]) -> T:
        return await load(_with_options(spec, model_id, options))

    left = Candidates(name, route.candidates, options_of(route), attempt, itemgetter(0))
    return await left.first()


def only_model(gateway: Gateway, spec: LoadSpec) -> LoadSpec | None:
    """The load of the one model that its name stands for; None if that may be several."""
    route = gateway.names.routes.get(spec.model_id)
    if route is None:
        return spec
    if len(route.candidates) != 1 or ANY in route.candidates:
        return None
    return _with_options(spec, route.candidates[0], options_of(route))


def _with_options(spec: LoadSpec, model_id: str, options: Mapping[str, Any]) -> LoadSpec:
    """A preset's load options, where ``spec`` has none of its own."""
    missing = {key: options[key] for key in options if getattr(spec, key) is None}
    return msgspec.structs.replace(spec, model_id=model_id, **missing)
