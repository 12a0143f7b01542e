"""What the draw of one token depends on: the seed and the position, and when there is one."""

from __future__ import annotations

#: Greedy below: the likeliest token is drawn anyway, until in float32 the logits
#: divided by the temperature are infinite and any token is.
LOWEST_TEMPERATURE = 1e-6

_MASK64 = (1 << 64) - 1


def position_seed(seed: int, position: int) -> int:
    """A 64-bit seed for the token at ``position`` of an answer (splitmix64)."""
    mixed = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
    return mixed ^ (mixed >> 31)
