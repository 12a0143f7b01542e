"""What the table keeps of one unfinished request, and what it becomes without its worker."""

from __future__ import annotations

import asyncio
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
    ``opened_at`` is on the table's clock.
    """

    asked: Job
    request: Job
    stream: RequestStream
    is_canary: bool
    opened_at: float
    sent: bool = False
    begun: bool = False
    runs: int = 0
    made_before: int = 0


@dataclass(slots=True)
class OpenInquiry:
    """As ``Entry``, of what is answered whole and takes no slot."""

    request: Inquiry
    answer: asyncio.Future[InquiryAnswer]
    sent: bool = False
    runs: int = 0
    is_canary: bool = False

    def fail(self, error: CodedError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


def prepare_next_run(entry: Entry, alone: bool) -> bool:
    """Whether there is one, now that the worker that had the request is gone."""
    stream = entry.stream
    made, kept = stream.completion_tokens, stream.kept.whole if stream.kept is not None else []
    lost = Lost(
        runs=entry.runs,
        made=made,
        gained=made - entry.made_before,
        kept=bool(kept),
        delivered=stream.delivered,
        alone=alone,
    )
    match next_run(lost):
        case NextRun.RESUMED:
            stream.resumes += 1
            entry.made_before = made
            entry.request = msgspec.structs.replace(entry.request, resume_tokens=kept)
        case NextRun.AGAIN:
            stream.restart()
        case NextRun.NONE:
            return False
    return True


def with_tokens_sent(error: CodedError, stream: RequestStream) -> CodedError:
    """An error of its own for one request: how far its answer got."""
    sent = stream.completion_tokens if stream.delivered else 0
    return CodedError(
        error.code,
        error.message,
        param=error.param,
        retry_after_s=error.retry_after_s,
        details={**error.details, "tokens_sent": sent},
    )


def worker_blocked() -> CodedError:
    return CodedError(
        ErrorCode.RATE_LIMIT_EXCEEDED,
        "the model's worker does not take any more requests now",
        retry_after_s=1.0,
    )
