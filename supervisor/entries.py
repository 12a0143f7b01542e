"""What the table keeps of one unfinished request, and what it becomes without its worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Inquiry, InquiryAnswer, Job
from supervisor.resumption import Lost, NextRun, next_run
from supervisor.stream import RequestStream


@dataclass(slots=True)
class Entry:
    """``sent``: the connected worker has it. ``runs`` counts how often one had it.

    ``asked`` is the request as it came, ``request`` what its next run is. The current one
    has ``begun`` to answer; ``made_before`` is how many tokens there were already.
    ``suspect``: it was in flight when a worker died; ``convicted``: it is to blame for that.
    ``opened_at`` is on the table's clock. ``let_go``: of the table that has it.
    """

    id: int
    asked: Job
    request: Job
    stream: RequestStream
    is_canary: bool
    opened_at: float
    let_go: Callable[[Entry], None]
    sent: bool = False
    begun: bool = False
    runs: int = 0
    made_before: int = 0
    suspect: bool = False
    convicted: bool = False

    @property
    def gained(self) -> int:
        """Tokens that its current run has added; those of a suspect since the crash."""
        return self.stream.completion_tokens - self.made_before

    def run_as(self, request_id: int, *, anew: bool = False) -> bool:
        """Take it from its worker, to run later from where it is; with ``anew`` from its
        beginning, if need be and nobody has seen anything of it. False if it cannot."""
        stream = self.stream
        kept = stream.kept.whole if stream.kept is not None else []
        if kept:
            self.request = msgspec.structs.replace(self.request, resume_tokens=kept)
            if not self.suspect:
                self.made_before = stream.completion_tokens
        elif anew and not stream.delivered:
            stream.restart()
            self.made_before = 0
        else:
            return False
        self.id = request_id
        self.request = msgspec.structs.replace(self.request, request_id=request_id)
        self.sent = self.begun = False
        # It has not been lost.
        self.runs -= 1
        return True


@dataclass(slots=True)
class OpenInquiry:
    """As ``Entry``, of what is answered whole and takes no slot."""

    request: Inquiry
    answer: asyncio.Future[InquiryAnswer]
    sent: bool = False
    runs: int = 0
    is_canary: bool = False
    suspect: bool = False

    def fail(self, error: CodedError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


def prepare_next_run(entry: Entry, alone: bool) -> NextRun:
    """What it is, now that the worker that had the request is gone."""
    stream = entry.stream
    made, kept = stream.completion_tokens, stream.kept.whole if stream.kept is not None else []
    lost = Lost(
        runs=entry.runs,
        made=made,
        gained=entry.gained,
        kept=bool(kept),
        delivered=stream.delivered,
        alone=alone,
    )
    following = next_run(lost)
    if following is NextRun.RESUMED:
        stream.resumes += 1
        entry.made_before = made
        entry.request = msgspec.structs.replace(entry.request, resume_tokens=kept)
    elif following is NextRun.AGAIN:
        stream.restart()
    return following


def blamed(error: CodedError, entry: Entry) -> CodedError:
    """An error of its own for one request, whose worker died with ``error``: how far its
    answer got, and whether that was its own doing."""
    stream = entry.stream
    if entry.convicted:
        error = poisoned(error)
    sent = stream.completion_tokens if stream.delivered else 0
    return CodedError(
        error.code,
        error.message,
        param=error.param,
        retry_after_s=error.retry_after_s,
        details={**error.details, "tokens_sent": sent},
    )


def poisoned(error: CodedError) -> CodedError:
    """What one is told who is to blame for ``error``."""
    return CodedError(
        ErrorCode.REQUEST_POISONED,
        f"{error.message}; it was this request that crashed it, twice, the second time "
        "alone: the same request is refused for an hour",
        details=error.details,
    )


def worker_blocked() -> CodedError:
    return CodedError(
        ErrorCode.RATE_LIMIT_EXCEEDED,
        "the model's worker does not take any more requests now",
        retry_after_s=1.0,
    )
