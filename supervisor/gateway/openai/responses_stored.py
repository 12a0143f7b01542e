"""``/v1/responses/{id}``: responses that are kept, and what was given for them."""

from __future__ import annotations

from starlette.responses import Response

from protocol.errors import CodedError, ErrorCode
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import JSON_TYPE, json_response
from supervisor.gateway.openai.parameters import invalid_value, unsupported
from supervisor.gateway.openai.responses_store import Stored
from supervisor.gateway.scheduling import key_digest

_DEFAULT_LIMIT, _MAX_LIMIT = 20, 100


async def get_response(gateway: Gateway, call: Call) -> Response:
    """As it was answered, with all that was to be included then."""
    if call.query_params.get("stream") not in (None, "false"):
        raise unsupported("stream", "reading a stored response as a stream is")
    return Response(_stored(gateway, call).response, media_type=JSON_TYPE)


async def delete_response(gateway: Gateway, call: Call) -> Response:
    response_id: str = call.path_params["id"]
    if not gateway.responses.delete(key_digest(call), response_id):
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
