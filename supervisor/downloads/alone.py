"""A download without a server: the same engine, for the command line."""

from __future__ import annotations

from collections.abc import Callable

from protocol.errors import CodedError, ErrorCode
from supervisor.catalog import hub_cache_dir
from supervisor.downloads.messages import FetchJob, Plan, Progress
from supervisor.downloads.planning import ask_hub, require_disk
from supervisor.downloads.process import engine_environment, run_engine
from supervisor.settings import Settings


async def fetch(
    model_id: str,
    settings: Settings,
    on_plan: Callable[[Plan], None],
    on_progress: Callable[[Progress], None],
) -> Plan:
    """Download a model to its end; who is cancelled ends it. Raises ``CodedError``."""
    if not settings.downloads_enabled:
        raise CodedError(ErrorCode.DOWNLOADS_DISABLED, "downloads_enabled is false")
    cache = settings.hub_cache_dir or hub_cache_dir()
    # Without a mark: a server that starts meanwhile takes it for none of its own.
    environment = engine_environment(settings.hub_endpoint)
    plan = await ask_hub(model_id, cache, environment)
    await require_disk(plan, cache, reserve=settings.download_disk_reserve_bytes)
    on_plan(plan)
    job = FetchJob(plan=plan, cache=str(cache), stall_s=settings.download_stall_s)
    await run_engine(job, environment, on_progress)
    return plan
