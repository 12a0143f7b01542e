"""Before a download: what the hub has, what is missing here, and whether the disk holds it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from protocol.errors import CodedError, ErrorCode
from supervisor import admission, runtimes
from supervisor.downloads.cache import free_bytes
from supervisor.downloads.messages import Plan, PlanJob
from supervisor.downloads.process import run_engine

#: Best first: a repository's own format before the quantisations beside it.
FORMATS = ("mlx", "gguf")
#: An engine must have told its plan by then.
_TIMEOUT_S = 90.0


async def ask_hub(
    model_id: str, cache: Path, environment: Mapping[str, str], backend: str | None = None
) -> Plan:
    """What the hub has of a model that a backend here (or this one) can run. ``CodedError``."""
    installed = await asyncio.to_thread(runtimes.installed_backends, simulated=False)
    usable = {name for name, version in installed.items() if version is not None}
    if backend is not None:
        usable &= {backend}
    formats = [name for name in FORMATS if usable & {*admission.BACKENDS_BY_FORMAT[name]}]
    job = PlanJob(model_id=model_id, cache=str(cache), formats=formats)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            plan = await run_engine(job, environment)
    except TimeoutError:
        raise CodedError(
            ErrorCode.HUB_UNAVAILABLE, f"the hub does not tell in time what {model_id} is"
        ) from None
    assert plan is not None
    return plan


async def require_disk(plan: Plan, cache: Path, *, reserve: int, others: int = 0) -> int:
    """The free bytes. ``others`` are those that other downloads will still take.

    Raises ``insufficient_disk`` when the rest of the plan does not fit beside them and the
    ``reserve``.
    """
    try:
        free = await asyncio.to_thread(free_bytes, cache)
    except OSError as error:
        raise CodedError(
            ErrorCode.DOWNLOAD_FAILED, f"{cache} cannot be used: {error.strerror or error}"
        ) from error
    needed = plan.missing_bytes
    if needed and needed > free - others - reserve:
        raise CodedError(
            ErrorCode.INSUFFICIENT_DISK,
            f"{plan.model_id} needs {needed / 1e9:.2f} GB more in {cache}, where "
            f"{free / 1e9:.2f} GB are free, of which {others / 1e9:.2f} GB are for other "
            f"downloads and {reserve / 1e9:.2f} GB are kept free",
            details={"needed_bytes": needed, "free_bytes": free},
        )
    return free
