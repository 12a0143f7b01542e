"""Who may have one more of a model's places: running and waiting together are bounded.

Pure. The queue takes turns among clients, but only among those that are in it: were the
bound simply first come, first served, one that always has more to ask would keep all
others out for ever.
"""

from __future__ import annotations

from protocol.errors import CodedError, ErrorCode

#: A client may hold this many times what is free. Alone it gets four fifths of all places;
#: two such get four ninths each, n of them 4/(4n + 1): something is left for the next.
GREED = 4


def may_enter(own: int, taken: int, limit: int) -> bool:
    """Whether a client that has ``own`` of the ``taken`` places gets one more of ``limit``."""
    return own < GREED * (limit - taken)


def most_of_one(limit: int) -> int:
    """How many places a client can get when nobody else has any."""
    own = 0
    while may_enter(own, own, limit):
        own += 1
    return own


def no_place(own: int, taken: int, limit: int, retry_after_s: float) -> CodedError:
    """The refusal of one that ``may_enter`` not."""
    if taken >= limit:
        reason = f"the model has {taken} requests in hand already (limit {limit})"
    else:
        reason = (
            f"{own} of the model's {taken} requests in hand are this client's; "
            f"the last of {limit} places are for others"
        )
    return CodedError(ErrorCode.RATE_LIMIT_EXCEEDED, reason, retry_after_s=retry_after_s)
