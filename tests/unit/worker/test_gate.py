"""Reasoning is free; what comes after it is constrained."""

from worker.gate import GatedMask


class Recorder:
    """Allows token 1, and remembers what was accepted."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed(self) -> bytes:
        return b"\x02"

    def accept(self, token: int) -> None:
        self.accepted.append(token)


PIECES = [b"</", b"think", b">", b"x", b"</think>", b"<"]


def gated(inner: Recorder) -> GatedMask:
    return GatedMask(inner, b"</think>", lambda token: PIECES[token], len(PIECES))


def test_everything_goes_until_the_closer() -> None:
    inner = Recorder()
    mask = gated(inner)
    for token in (3, 5, 3):
        assert mask.allowed() == b"\xff"
        mask.accept(token)
    mask.accept(4)
    assert mask.allowed() == b"\x02"
    mask.accept(1)
    assert inner.accepted == [1]


def test_a_closer_in_pieces_is_found() -> None:
    mask = gated(Recorder())
    for token in (0, 1, 2):
        assert mask.allowed() == b"\xff"
        mask.accept(token)
    assert mask.allowed() == b"\x02"
