"""``POST /admin/config/reload``, and what SIGHUP does: new settings for a running server.

All or nothing. Whatever can go wrong does so while they are read; then they take effect in
one go, in which nothing waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

import msgspec
from starlette.responses import Response

from protocol.errors import CodedError, ErrorCode
from supervisor import logs
from supervisor.changes import Change, Changes, changes, in_effect, without_logins
from supervisor.config import ConfigError, names_of
from supervisor.gateway.auth import BindRefused, require_keys
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response
from supervisor.journal import ConfigRefused, ConfigReloaded
from supervisor.names import Names
from supervisor.settings import Settings

RELOAD = "/admin/config/reload"

log = logging.getLogger(__name__)


class Reloaded(msgspec.Struct):
    """The parts of ``Changes``."""

    success: bool
    changed: list[Change]
    applied: list[str]
    needs_restart: list[str]


class _Read(NamedTuple):
    """What was read, and what takes effect of it."""

    asked: Settings
    effective: Settings
    names: Names
    adopt: Callable[[], None]


async def reload_config(gateway: Gateway, _call: Call) -> Response:
    """400 ``invalid_value`` when the settings are wrong: nothing has changed then."""
    done = await reload(gateway)
    return json_response(Reloaded(True, done.changed, done.applied, done.needs_restart))


async def reload(gateway: Gateway) -> Changes:
    """Read the settings as at the start, and go by them. Raises ``invalid_value``."""
    # One after the other: the later one has to see what the first has changed.
    async with gateway.reloading:
        before = gateway.settings
        try:
            new = await asyncio.to_thread(_read, gateway)
        except (ConfigError, BindRefused) as error:
            log.error("the configuration is not reloaded, nothing has changed: %s", error)
            gateway.fleet.journal.add(ConfigRefused(message=without_logins(str(error))))
            raise CodedError(ErrorCode.INVALID_VALUE, str(error)) from error
        new.adopt()
        gateway.settings, gateway.names = new.effective, new.names
        gateway.guard.use_keys(new.effective)
        if new.effective.log_level != before.log_level:
            logs.set_level(new.effective.log_level)
    found = changes(before, new.asked)
    log.info(
        "configuration reloaded; changed: %s; after a restart: %s",
        ", ".join(found.applied) or "nothing",
        ", ".join(found.needs_restart) or "nothing",
    )
    names = [each.name for each in found.changed]
    gateway.fleet.journal.add(ConfigReloaded(changed=names, needs_restart=found.needs_restart))
    return found


def _read(gateway: Gateway) -> _Read:
    """Raises ``ConfigError`` or ``BindRefused``."""
    asked = gateway.reread()
    effective = in_effect(gateway.settings, asked)
    # What would not start is wrong now already; and what is bound stays so.
    require_keys(asked)
    require_keys(effective)
    return _Read(asked, effective, names_of(effective), gateway.fleet.adopting(effective))
