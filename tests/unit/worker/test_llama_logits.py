"""Masks on a row of logits, of any number of tokens."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

numpy = pytest.importorskip("numpy")
pytest.importorskip("llama_cpp")

from worker.backends.llama_logits import apply_mask  # noqa: E402


class Fixed:
    """A mask of these bytes."""

    def __init__(self, bits: bytes) -> None:
        self.bits = bits

    def allowed(self) -> bytes:
        return self.bits

    def accept(self, token: int) -> None:
        raise NotImplementedError


@given(
    size=st.integers(1, 40),
    bits=st.binary(max_size=8),
    banned=st.sets(st.integers(0, 39), max_size=5),
)
def test_what_is_allowed_stays_and_nothing_else(size: int, bits: bytes, banned: set[int]) -> None:
    banned = {token for token in banned if token < size}
    logits = numpy.arange(size, dtype=numpy.float32)
    left = {
        token
        for token in range(min(size, len(bits) * 8))
        if bits[token // 8] >> token % 8 & 1 and token not in banned
    }
    assert apply_mask(logits, Fixed(bits), banned) is bool(left)
    assert logits.tolist() == [float(n) if n in left else -math.inf for n in range(size)]
