"""Request bodies: bounded reading, and JSON into structs with OpenAI's error parameters."""

from __future__ import annotations

import asyncio
import re
from typing import TypeVar

import msgspec
from starlette.requests import Request

from protocol.errors import CodedError, ErrorCode
from supervisor.settings import Settings

T = TypeVar("T")

#: How msgspec ends its messages: `` - at `$.messages[0].role` `` or `` - at `key` in `$.map` ``.
_AT = re.compile(r" - at (?:`(?:key|\w+)` in )?`\$\.?(?P<path>[^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<field>.*)`$", re.DOTALL)
_WRONG_TYPE = re.compile(r"^Expected `[^`]*`, got `[^`]*`")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class ClientDisconnected(CodedError):
    """The client went away: nobody will read an answer, and nobody is to blame."""

    def __init__(self) -> None:
        super().__init__(ErrorCode.INTERNAL_ERROR, "the client disconnected")


async def read_body(request: Request, settings: Settings) -> bytes:
    """Return the whole body of at most ``max_body_bytes``.

    Raises ``request_too_large`` as soon as the announced or the received size
    passes the limit, without reading on; ``request_timeout`` when nothing comes
    for ``body_timeout_s``; and ``ClientDisconnected``.
    """
    limit = settings.max_body_bytes
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise _too_large(limit)
    pieces: list[bytes] = []
    size = 0
    while True:
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                message = await request.receive()
        except TimeoutError:
            raise CodedError(
                ErrorCode.REQUEST_TIMEOUT,
                f"the rest of the body did not come: nothing for {settings.body_timeout_s:g} s",
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit:
            raise _too_large(limit)
        pieces.append(piece)
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def read_json(request: Request, decoder: msgspec.json.Decoder[T], settings: Settings) -> T:
    """Read a body and decode it, or raise a ``CodedError`` that names what is wrong."""
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise CodedError(
            ErrorCode.UNSUPPORTED_MEDIA_TYPE,
            f"send the body as it is, not with content-encoding {encoding[:100]}",
        )
    media_type = request.headers.get("content-type")
    if media_type is not None and not _is_json(media_type):
        raise CodedError(
            ErrorCode.UNSUPPORTED_MEDIA_TYPE,
            f"send the body as application/json, not {media_type[:100]}",
        )
    return decode(await read_body(request, settings), decoder)


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        # msgspec skips fields it doesn't know without looking into their strings.
        if not body.isascii():
            body.decode()
            body = body.removeprefix(_BYTE_ORDER_MARK)
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except UnicodeDecodeError as error:
        raise CodedError(ErrorCode.INVALID_JSON, "the body is not valid UTF-8") from error
    except msgspec.DecodeError as error:
        raise CodedError(ErrorCode.INVALID_JSON, f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise CodedError(ErrorCode.INVALID_JSON, "the body is nested too deeply") from error


def _invalid(text: str) -> CodedError:
    at = _AT.search(text)
    # Values of a map are at "map[...]", keys at "map": both are the map's.
    path = at["path"].replace("[...]", "") if at else ""
    what = text[: at.start()] if at else text
    missing = _MISSING.match(what)
    if missing:
        param = f"{path}.{missing['field']}" if path else missing["field"]
        return CodedError(ErrorCode.MISSING_PARAMETER, f"{param} is required", param=param)
    unknown = _UNKNOWN.match(what)
    if unknown:
        param = f"{path}.{unknown['field']}" if path else unknown["field"]
        return CodedError(
            ErrorCode.UNSUPPORTED_PARAMETER, f"{param[:100]}: no such field", param=param[:100]
        )
    if not path:
        return CodedError(ErrorCode.INVALID_TYPE, "the body must be a JSON object")
    code = ErrorCode.INVALID_TYPE if _WRONG_TYPE.match(what) else ErrorCode.INVALID_VALUE
    what = what.replace("`", "")
    return CodedError(code, f"{path}: {what[0].lower()}{what[1:]}", param=path)


def _is_json(media_type: str) -> bool:
    essence = media_type.partition(";")[0].strip().lower()
    return essence == "application/json" or essence.endswith("+json")


def _too_large(limit: int) -> CodedError:
    return CodedError(ErrorCode.BODY_TOO_LARGE, f"the body is larger than {limit} bytes")
