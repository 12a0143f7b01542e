"""Who may call what.

Two keys, two sides. An inference key never opens the admin side, an admin key
is never needed for inference. A side without a key is open; binding anything but
loopback without both keys is refused before the server starts.

An open side on loopback is still reachable by every web page the operator looks
at: a page can resolve its own name to 127.0.0.1 (DNS rebinding) or post a form.
So an open side answers only requests whose ``Host`` is a loopback name or
address and which no foreign web page sent (``Origin``). A reverse proxy in front
that passes its own name on needs keys.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterator
from enum import Enum, auto
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from protocol.errors import CodedError, ErrorCode
from supervisor.settings import Settings


class Side(Enum):
    """What a route belongs to."""

    OPEN = auto()
    INFERENCE = auto()
    ADMIN = auto()
    METRICS = auto()


def is_loopback(host: str) -> bool:
    """Whether a bind address or host name without port can only mean this machine."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class BindRefused(Exception):
    """The address is taken, unknown, or not to be served without keys; the message says which."""


def require_keys(settings: Settings) -> None:
    """Refuse to offer an open side to the network."""
    if is_loopback(settings.host) or settings.allow_unauthenticated:
        return
    missing = " and ".join(map(how_to_set, open_sides_of(settings)))
    if missing:
        raise BindRefused(
            f"host {settings.host!r} is reachable from outside: set {missing}, "
            f"or {how_to_set('allow_unauthenticated')} to serve without"
        )


def open_sides_of(settings: Settings) -> dict[str, str]:
    """What has no key, by the name of the setting that is missing."""
    sides = {"admin_key": "/admin", "api_key": "/v1"}
    return {name: side for name, side in sides.items() if getattr(settings, name) is None}


def how_to_set(name: str) -> str:
    return f"--{name.replace('_', '-')} / OPTA_LMX_{name.upper()}"


class Guard:
    """Decides per request; raises ``CodedError`` when it is refused."""

    def __init__(self, settings: Settings) -> None:
        self._loopback_only = is_loopback(settings.host)
        self.use_keys(settings)

    def use_keys(self, settings: Settings) -> None:
        """From now on; a connection that was let in stays."""
        self._admin = _encode(settings.admin_key)
        self._inference = _encode(settings.api_key)

    def check(self, request: HTTPConnection, side: Side) -> None:
        keys = self._keys(side)
        if not keys:
            if self._loopback_only and not (side is Side.OPEN and self._any_key()):
                _refuse_foreign_pages(request)
            return
        # Every pair is compared: the time taken tells nothing about which one matched.
        matches = [
            hmac.compare_digest(offered, key) for offered in _offered(request, side) for key in keys
        ]
        if not any(matches):
            if side is Side.ADMIN:
                raise CodedError(
                    ErrorCode.INVALID_ADMIN_KEY, "missing or wrong admin key (X-Admin-Key)"
                )
            raise CodedError(
                ErrorCode.INVALID_API_KEY, "missing or wrong API key (Authorization: Bearer)"
            )

    def _any_key(self) -> bool:
        return self._admin is not None or self._inference is not None

    def _keys(self, side: Side) -> list[bytes]:
        match side:
            case Side.OPEN:
                keys = []
            case Side.INFERENCE:
                keys = [self._inference]
            case Side.ADMIN:
                keys = [self._admin]
            case Side.METRICS:
                keys = [self._admin, self._inference]
        return [key for key in keys if key is not None]


def _encode(key: str | None) -> bytes | None:
    return None if key is None else key.encode()


def _offered(request: HTTPConnection, side: Side) -> Iterator[bytes]:
    for name, value in request.scope["headers"]:
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            if scheme.lower() == b"bearer":
                yield token.strip()
        elif (name == b"x-admin-key" and side is not Side.INFERENCE) or (
            name == b"x-api-key" and side is not Side.ADMIN
        ):
            yield value


def _refuse_foreign_pages(request: HTTPConnection) -> None:
    host = request.headers.get("host")
    # Only HTTP/1.0 goes without, and no browser speaks that.
    if host is None and request.scope.get("http_version") != "1.0":
        raise CodedError(ErrorCode.HOST_NOT_ALLOWED, "the request has no Host header")
    if host is not None and not is_loopback(_host_name(f"//{host}")):
        raise CodedError(
            ErrorCode.HOST_NOT_ALLOWED,
            f"this server has no key for this, so it answers only to loopback names such as "
            f"localhost, not to {host[:100]!r}; to use another name, set the keys "
            "(OPTA_LMX_ADMIN_KEY, OPTA_LMX_API_KEY)",
        )
    origin = request.headers.get("origin")
    # Other schemes are desktop apps and editor extensions, not web pages.
    if origin is not None and (
        origin == "null"
        or (origin.startswith(("http:", "https:")) and not is_loopback(_host_name(origin)))
    ):
        raise CodedError(
            ErrorCode.HOST_NOT_ALLOWED,
            "this server has no key for this, so it answers no foreign web pages",
        )


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
