"""The whole server at one look: what it promises, holds and has done, and what is wrong.

Every look is cheap, and none waits for a disk that does not answer.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from supervisor import jsonfile
from supervisor.actor import Actor
from supervisor.autoload import Autoload
from supervisor.footprint import available_bytes, total_bytes
from supervisor.health import Facts, Health, assess
from supervisor.marks import still_running
from supervisor.services import Services
from supervisor.views import ModelView

#: For so long the home folder's disk may take.
_PATIENCE_S = 1.0


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes. ``promised``: what the models may take, with what may still come; ``measured``:
    what their workers hold."""

    total_bytes: int
    available_bytes: int
    low_water_bytes: int
    budget_bytes: int | None
    promised_bytes: int
    measured_bytes: int


class _Home(msgspec.Struct, frozen=True):
    """What is seen of the home folder."""

    free: int | None = None
    set_aside: Sequence[str] = ()


class Overview:
    """Looks at what their owners change on the event loop.

    ``installed`` gives the versions of the backends.
    """

    def __init__(
        self,
        actors: Mapping[str, Actor],
        services: Services,
        models: Callable[[], Sequence[ModelView]],
        configured: Autoload,
        installed: Callable[[], Awaitable[dict[str, str | None]]],
    ) -> None:
        self._actors = actors
        self._services = services
        self._models = models
        self._configured = configured
        self._installed = installed
        self._look: asyncio.Future[_Home] | None = None

    async def health(self, lag_s: float) -> Health:
        """``lag_s``: for how long the event loop was held up lately."""
        home = await self._home()
        settings = self._services.settings
        return assess(
            Facts(
                models=self._models(),
                available=available_bytes(),
                low_water=settings.memory_low_water_bytes,
                home_free=home.free,
                failed_loads=self._configured.failures,
                safe_start=self._configured.safe_start,
                set_aside=home.set_aside,
                unwritten=jsonfile.unwritten(settings.home),
                lag=lag_s,
                left=still_running(self._services.left_behind),
            )
        )

    async def installed(self) -> dict[str, str | None]:
        """Versions of the backends, None for one that is not installed."""
        return await self._installed()

    def memory(self) -> Memory:
        settings = self._services.settings
        measured = (view.memory_gb or 0.0 for view in self._models())
        return Memory(
            total_bytes=total_bytes(),
            available_bytes=available_bytes(),
            low_water_bytes=settings.memory_low_water_bytes,
            budget_bytes=settings.memory_budget_bytes,
            promised_bytes=sum(actor.promised for actor in self._actors.values()),
            measured_bytes=round(sum(measured) * 1e9),
        )

    async def _home(self) -> _Home:
        """What the disk says, if it does so in time: one question to it is open at most."""
        if (look := self._look) is None:
            home = self._services.settings.home
            self._look = look = asyncio.ensure_future(asyncio.to_thread(_look_at, home))
        await asyncio.wait({look}, timeout=_PATIENCE_S)
        if not look.done():
            return _Home()
        if self._look is look:
            self._look = None
        return look.result()


def _look_at(home: Path) -> _Home:
    try:
        aside = sorted(path.name for path in home.glob(f"*{jsonfile.ASIDE}*"))
        aside += sorted(path.name for path in home.glob(f"incidents/*{jsonfile.ASIDE}*"))
        return _Home(shutil.disk_usage(home).free, aside)
    except OSError:
        return _Home()
