"""Whom to stop when memory runs short: the one that grew, before the kernel picks a victim.

Pure. Sizes are bytes. A worker's baseline is what it held when it became routable,
or what its files hold while it loads; what it holds beyond that is its own growth.
Pressure that comes from outside is nobody's fault here: then nobody is stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Growth below either is no growth: caches and scratch buffers come and go.
MIN_GROWTH_BYTES = 64 * 1024 * 1024
MIN_GROWTH_FRACTION = 0.1


@dataclass(frozen=True, slots=True)
class Footprint:
    """One worker's memory; ``limit`` None: it has none of its own."""

    model_id: str
    generation: int
    size: int
    baseline: int
    limit: int | None

    @property
    def growth(self) -> int:
        return self.size - self.baseline

    @property
    def has_grown(self) -> bool:
        return self.growth >= max(MIN_GROWTH_BYTES, self.baseline * MIN_GROWTH_FRACTION)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Stop this worker, for this reason."""

    model_id: str
    generation: int
    reason: str


def judge(footprints: Sequence[Footprint], *, available: int, low_water: int) -> list[Verdict]:
    """The workers to stop now.

    Each one over its own limit; and, while the host has less than ``low_water``
    available and nobody is stopped already, the one that grew most, if any has grown.
    Among equals the order of ``footprints`` decides, so that the same figures give the
    same answer.
    """
    verdicts = [
        Verdict(
            f.model_id,
            f.generation,
            f"memory {_show(f.size)} is over its limit of {_show(f.limit)}",
        )
        for f in footprints
        if f.limit is not None and f.size > f.limit
    ]
    grown = [f for f in footprints if f.has_grown]
    if verdicts or available >= low_water or not grown:
        return verdicts
    worst = max(grown, key=lambda f: f.growth)
    reason = (
        f"the host has {_show(available)} of memory left (low-water mark {_show(low_water)}), "
        f"and this model grew most: by {_show(worst.growth)} to {_show(worst.size)}"
    )
    return [Verdict(worst.model_id, worst.generation, reason)]


def _show(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
