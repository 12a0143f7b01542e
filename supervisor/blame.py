"""Whose doing the death of a worker was, as far as that can be told from outside."""

from __future__ import annotations

from dataclasses import replace

from supervisor.generation import Generation
from supervisor.lifecycle import CellFailed, WorkerExited, WorkerFailed
from supervisor.requests import RequestTable

Failure = WorkerFailed | WorkerExited | CellFailed


def attributed(
    failure: Failure,
    generation: Generation | None,
    requests: RequestTable,
    last_crash: float | None,
) -> Failure:
    """With whether it is by the request that is behind the last crash that counts, too."""
    if last_crash is None or was_killed_from_outside(generation):
        return failure
    return replace(failure, again=requests.guilty_since() == last_crash)


def was_killed_from_outside(generation: Generation | None) -> bool:
    """Whether nobody who ran there can have done it."""
    return generation is not None and generation.killed_from_outside
