"""``POST /admin/models/probe``: which backend runs this model here."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.responses import Response

from supervisor.gate import LoadSpec
from supervisor.gateway.admin import check_names
from supervisor.gateway.body import read_json
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response
from supervisor.gateway.presence import while_there
from supervisor.probe import TIMEOUT_S, ProbeSpec

_Name = Annotated[str, Meta(min_length=1)]


class ProbeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Without ``backends``: all that read the model's format. ``timeout_s`` is for each."""

    model_id: _Name
    path: _Name | None = None
    backends: Annotated[list[_Name], Meta(min_length=1, max_length=16)] | None = None
    context_length: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    allow_unsupported_runtime: bool | None = None
    timeout_s: Annotated[float, Meta(gt=0, le=86400)] | None = None


_decoder = msgspec.json.Decoder(ProbeRequest)


async def probe_model(gateway: Gateway, call: Call) -> Response:
    """200 however it ends: what fails is an answer, too. Who leaves calls the probe off."""
    request = await read_json(call, _decoder, gateway.settings)
    check_names(request.model_id, request.path)
    spec = ProbeSpec(
        load=LoadSpec(
            model_id=request.model_id,
            path=request.path,
            allow_unsupported_runtime=bool(request.allow_unsupported_runtime),
            context_length=request.context_length,
        ),
        backends=tuple(request.backends or ()),
        timeout_s=TIMEOUT_S if request.timeout_s is None else request.timeout_s,
    )
    return json_response(await while_there(call.receive, gateway.fleet.probe(spec)))
