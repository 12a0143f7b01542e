"""What a request says about how it should run: whose it is, in which lane, until when,
and whether it goes on after a crash.

The worker's queue takes turns among clients, so who is one has to be guessed from
what there is. It is only ever a guess: it decides about turns, never about access.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, NamedTuple

from starlette.requests import Request

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Priority

PRIORITY_HEADER = "X-Priority"
TIMEOUT_HEADER = "X-Request-Timeout"
RESUME_HEADER = "X-Resume"
#: The client's own name for what it may come back to.
CONVERSATION_HEADER = "X-Conversation-Id"
#: Headers by which a client names itself; the second is that of OpenClaw's agents.
CLIENT_HEADERS = ("X-Client-Id", "X-OpenClaw-Agent-Id")

#: Longest ``X-Request-Timeout``, in seconds: a day.
MAX_TIMEOUT_S = 86_400.0

_CONVERSATION = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9}")


class Terms(NamedTuple):
    """``timeout_s`` counts from ``arrived`` (``time.perf_counter``); None: no deadline.

    ``client`` names the client for the queue, ``client_name`` is what it calls itself.
    ``resume``: its answers may go on when their worker dies.
    """

    client: str
    priority: Priority
    timeout_s: float | None
    arrived: float
    client_name: str | None = None
    resume: bool = True


def terms_of(
    request: Request, arrived: float, *, api_key: str | None, claims: tuple[Any, ...] = ()
) -> Terms:
    """See ``client_of``. Raises ``invalid_value`` with the header's name as ``param``."""
    client = client_of(request, api_key=api_key, claims=claims)
    name = _header_name(request) or _claimed_name(claims)
    timeout_s, resume = _timeout_s(request), _resume(request)
    _check_conversation(request)
    return Terms(client, _priority(request), timeout_s, arrived, name, resume)


def client_of(request: Request, *, api_key: str | None, claims: tuple[Any, ...] = ()) -> str:
    """Name a request's client: a short digest, equal for the same client.

    The first of these that there is: one of ``CLIENT_HEADERS``; of ``claims``, the body's fields
    for this, the first that is a text; the key that was presented, unless it is
    ``api_key``, the server's own, which all clients share; the address and the
    program's name (``User-Agent``): on one machine everybody has the same address.
    """
    if named := _header_name(request):
        return _digest("header", named)
    if claimed := _claimed_name(claims):
        return _digest("body", claimed)
    if (key := presented_key(request)) and key != api_key:
        return _digest("key", key)
    host = request.client.host if request.client is not None else ""
    return _digest("address", f"{host}\0{request.headers.get('user-agent', '')}")


def _header_name(request: Request) -> str | None:
    return next((name for each in CLIENT_HEADERS if (name := request.headers.get(each))), None)


def _claimed_name(claims: tuple[Any, ...]) -> str | None:
    return next((claim for claim in claims if isinstance(claim, str) and claim), None)


def _digest(kind: str, value: str) -> str:
    # A key must not travel further than it has to, and a name can be of any length.
    text = f"{kind}\0{value}".encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=12).hexdigest()


def presented_key(request: Request) -> str:
    """The key that came with a request, right or not; empty without one."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and (token := token.strip()):
        return token
    return request.headers.get("x-api-key", "")


def key_digest(request: Request) -> str:
    """Names the key that came with a request; requests without one are of one name."""
    return _digest("key", presented_key(request))


def _priority(request: Request) -> Priority:
    value = request.headers.get(PRIORITY_HEADER)
    if value is None:
        return Priority.NORMAL
    try:
        return Priority(value.strip().lower())
    except ValueError:
        lanes = ", ".join(Priority)
        raise _invalid(PRIORITY_HEADER, f"one of {lanes}", value) from None


def _timeout_s(request: Request) -> float | None:
    value = request.headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    seconds = float(value) if _SECONDS.fullmatch(value.strip()) else 0.0
    if not 0 < seconds <= MAX_TIMEOUT_S:
        what = f"a number of seconds above 0, at most {MAX_TIMEOUT_S:.0f}"
        raise _invalid(TIMEOUT_HEADER, what, value)
    return seconds


def _resume(request: Request) -> bool:
    value = request.headers.get(RESUME_HEADER, "auto")
    if (word := value.strip().lower()) not in {"auto", "never"}:
        raise _invalid(RESUME_HEADER, "auto or never", value)
    return word == "auto"


def _check_conversation(request: Request) -> None:
    value = request.headers.get(CONVERSATION_HEADER)
    if value is not None and not _CONVERSATION.fullmatch(value):
        what = "1 to 128 letters, digits, dots, hyphens or underscores"
        raise _invalid(CONVERSATION_HEADER, what, value)


def _invalid(header: str, what: str, value: str) -> CodedError:
    return CodedError(
        ErrorCode.INVALID_VALUE, f"{header}: must be {what}, not {value[:50]!r}", param=header
    )
