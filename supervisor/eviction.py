"""Whom to unload so that a model fits: as few as it takes, or nobody.

Pure. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Holder:
    """A loaded model. ``frees``: what its end makes available; ``idle_s``: for how long
    it has had nothing to do, None if it must stay."""

    model_id: str
    frees: int
    idle_s: float | None


def choose(needed: int, available: int, holders: Sequence[Holder]) -> list[Holder] | None:
    """Whom to unload, the least recently used first; None if even all would not be enough.

    None of those chosen could be spared: without it the rest would not be enough.
    """
    short = needed - available
    chosen: list[Holder] = []
    for holder in candidates(holders):
        if short <= 0:
            break
        chosen.append(holder)
        short -= holder.frees
    if short > 0:
        return None
    # One that came late may free so much that others, used more recently than the
    # very first, need not go at all.
    for holder in reversed(chosen):
        if short + holder.frees <= 0:
            short += holder.frees
            chosen.remove(holder)
    return chosen


def candidates(holders: Sequence[Holder]) -> list[Holder]:
    """Those that may be unloaded and whose end frees anything, the longest idle first."""
    able = [holder for holder in holders if holder.idle_s is not None and holder.frees > 0]
    return sorted(able, key=lambda holder: (-(holder.idle_s or 0), holder.model_id))
