"""``/v1/responses/{id}``: responses that are kept, or still under way in the background."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from protocol.errors import CodedError, ErrorCode
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import JSON_TYPE, json_response
from supervisor.gateway.following import event_number, follow
from supervisor.gateway.openai.parameters import invalid_value, unsupported
from supervisor.gateway.openai.responses_background import in_background
from supervisor.gateway.openai.responses_store import Stored
from supervisor.gateway.recordings import Recording
from supervisor.gateway.scheduling import key_digest


class _Kept(msgspec.Struct):
    background: bool


_decoder = msgspec.json.Decoder(_Kept)

_DEFAULT_LIMIT, _MAX_LIMIT = 20, 100


async def get_response(gateway: Gateway, call: Call) -> Response:
    """As it was answered, with all that was to be included then, or as far as it is.

    With ``stream`` the events of one that runs or ran in the background, those after the
    one with the number ``starting_after``.
    """
    recording = in_background(gateway, call)
    stream = call.query_params.get("stream", "false")
    if stream not in ("true", "false"):
        raise invalid_value("stream", f"is {stream!r}, neither true nor false")
    if stream == "false":
        return _state(gateway, call, recording)
    if recording is None:
        _stored(gateway, call)
        raise unsupported("stream", "reading a response as a stream that is not kept as one is")
    after = call.query_params.get("starting_after")
    at = 0 if after is None else event_number("starting_after", after) + 1
    return follow(gateway, call, recording, at, "starting_after")


async def cancel_response(gateway: Gateway, call: Call) -> Response:
    """End one that runs in the background; how it ended. One that has ended stays as it is."""
    recording = in_background(gateway, call)
    if recording is not None:
        recording.cancel()
        await recording.end()
    elif not _decoder.decode(_stored(gateway, call).response).background:
        raise invalid_value("response_id", "is of a response that was not asked for in background")
    return _state(gateway, call, recording)


async def delete_response(gateway: Gateway, call: Call) -> Response:
    """One that still runs in the background ends, too."""
    response_id: str = call.path_params["id"]
    recording = in_background(gateway, call)
    if recording is not None:
        recording.cancel()
        gateway.recordings.forget(recording)
    if not gateway.responses.delete(key_digest(call), response_id) and recording is None:
        raise _not_found(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


async def list_input_items(gateway: Gateway, call: Call) -> Response:
    """All that the model was given, earlier turns included; the latest first, unless
    ``order`` is ``asc``. ``limit`` from 1 to 100, ``after`` is an item's id."""
    items = _stored(gateway, call).input_items
    order = call.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid_value("order", "must be asc or desc")
    if order == "desc":
        items.reverse()
    after = call.query_params.get("after")
    if after is not None:
        places = [i for i, item in enumerate(items) if item.id == after]
        if not places:
            raise invalid_value("after", f"no item {after[:100]!r} here")
        items = items[places[0] + 1 :]
    page = items[: _limit(call.query_params.get("limit"))]
    return json_response(
        {
            "object": "list",
            "data": page,
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": len(page) < len(items),
        }
    )


def _state(gateway: Gateway, call: Call, recording: Recording | None) -> Response:
    if recording is not None and recording.state is not None:
        return Response(recording.state(), media_type=JSON_TYPE)
    return Response(_stored(gateway, call).response, media_type=JSON_TYPE)


def _stored(gateway: Gateway, call: Call) -> Stored:
    response_id: str = call.path_params["id"]
    stored = gateway.responses.get(key_digest(call), response_id)
    if stored is None:
        raise _not_found(response_id)
    return stored


def _not_found(response_id: str) -> CodedError:
    return CodedError(
        ErrorCode.RESPONSE_NOT_FOUND,
        f"there is no response {response_id[:100]!r}: it was not stored, or is not any more",
        param="response_id",
    )


def _limit(value: str | None) -> int:
    if value is None:
        return _DEFAULT_LIMIT
    if not (value.isascii() and value.isdigit() and 1 <= int(value[:10]) <= _MAX_LIMIT):
        raise invalid_value("limit", f"must be a number from 1 to {_MAX_LIMIT}")
    return int(value)
