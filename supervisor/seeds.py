"""Every answer that is drawn has a seed, so that it can be drawn again."""

from __future__ import annotations

import random

import msgspec

from protocol.messages import Sampling


def seeded(sampling: Sampling) -> Sampling:
    """With a seed, where it takes one: what runs again is then the same answer."""
    if sampling.seed is not None or sampling.temperature <= 0:
        return sampling
    return msgspec.structs.replace(sampling, seed=random.getrandbits(63))
