"""Loads the configured models when the server starts, unless its last starts went wrong.

A model, or what it does to the machine, may take the server down each time it is loaded. So
starts are counted on disk before anything is loaded, and counted off when the server has run
for a while or ends as it should. After too many it comes up without its models, and says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from protocol.errors import CodedError, ErrorCode
from supervisor import jsonfile
from supervisor.gate import LoadSpec

log = logging.getLogger(__name__)

FILE_NAME = "starts.json"
SCHEMA_VERSION = 1
#: A server that runs for so long after its models are loaded has started well.
SETTLED_S = 60.0

#: Told how the load of a configured model ended; no error: it is routable.
ReportAutoload = Callable[[str, CodedError | None], None]


class _File(msgspec.Struct, kw_only=True):
    """``unclean``: starts in a row of which none has come to a good end."""

    schema_version: int = SCHEMA_VERSION
    unclean: int = 0


class Autoload:
    """Keeps the count of one home, whose lock the caller holds.

    ``safe_start`` says why nothing is loaded, if so: ``limit`` starts before this one ended
    badly (0: it never matters).
    """

    def __init__(self, home: Path, specs: Sequence[LoadSpec], limit: int) -> None:
        self._path = home / FILE_NAME
        self._specs = specs
        found, self._writer = jsonfile.open_state(self._path, _File, schema_version=SCHEMA_VERSION)
        before = found.unclean if found is not None else 0
        self.safe_start: str | None = None
        if limit and before >= limit and specs:
            self.safe_start = (
                f"safe start: the last {before} starts of this server ended badly, so it has not "
                "loaded its models"
            )
            log.error("%s", self.safe_start)
        self._unclean = before + 1
        #: Models that were not loaded, and why.
        self.failures: dict[str, str] = {}

    async def run(
        self,
        load: Callable[[LoadSpec], Awaitable[object]],
        done: Callable[[str], None],
        report: ReportAutoload,
    ) -> None:
        """Load one after the other; ``done`` is called after each, whatever came of it."""
        # The count has to be on disk before the first model can do any harm.
        self._writer.save(_File(unclean=self._unclean))
        await self._writer.flush()
        for spec in self._specs:
            failure: CodedError | None = None
            try:
                if self.safe_start is not None:
                    raise CodedError(ErrorCode.MODEL_NOT_READY, self.safe_start)
                await load(spec)
            except CodedError as error:
                failure = error
            except Exception as error:
                # One model's trouble must not keep the others from being loaded.
                log.exception("%s: not loaded", spec.model_id)
                failure = CodedError(ErrorCode.INTERNAL_ERROR, str(error))
            if failure is not None:
                self.failures[spec.model_id] = f"{failure.message} ({failure.code})"
            done(spec.model_id)
            try:
                report(spec.model_id, failure)
            except OSError as error:
                log.warning("cannot report on %s: %s", spec.model_id, error)
        await asyncio.sleep(SETTLED_S)
        await self.went_well()

    async def went_well(self) -> None:
        """The server has started well, or ends as it should."""
        self._writer.save(_File())
        await self._writer.flush()
