"""Constraints compile on a thread of their own, and are told of once."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("llguidance")

from protocol.chat import Constraint, ConstraintKind
from protocol.errors import CodedError, ErrorCode
from worker.backends.base import TokenTable
from worker.compiler import TIME_LIMIT_S, Compiled, ConstraintCompiler
from worker.constraints import MAX_TEXT_BYTES

END = 256
TABLE = TokenTable(
    pieces=[*(bytes([value]) for value in range(256)), b""],
    special={END: "<|end|>"},
    end_tokens=frozenset([END]),
    encode=lambda text: list(text.encode()),
)
GOOD = Constraint(ConstraintKind.REGEX, "[ab]+")
BAD = Constraint(ConstraintKind.REGEX, "(")


@contextmanager
def running(
    read: Callable[[], TokenTable | None] = lambda: TABLE,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[ConstraintCompiler]:
    compiler = ConstraintCompiler(read, 257, clock)
    yield compiler
    compiler.close()


def outcomes(compiler: ConstraintCompiler, number: int) -> dict[int, Compiled]:
    found: dict[int, Compiled] = {}
    while len(found) < number:
        found |= {each.request_id: each for each in compiler.finished(1.0)}
    return found


def failure(compiled: Compiled) -> CodedError:
    assert isinstance(compiled.mask, CodedError)
    return compiled.mask


def test_masks_and_refusals_with_their_requests() -> None:
    with running() as compiler:
        compiler.start(1, GOOD, param="p")
        compiler.start(2, BAD, param="q")
        compiler.start(3, GOOD, param="r")
        found = outcomes(compiler, 3)
        assert not isinstance(found[1].mask, CodedError)
        assert found[1].mask is not found[3].mask
        assert failure(found[2]).param == "q"
        assert compiler.finished() == []


def test_waits_no_longer_than_told() -> None:
    with running() as compiler:
        begun = time.monotonic()
        assert compiler.finished(0.05) == []
        assert 0.04 < time.monotonic() - begun < 5


def test_what_was_cancelled_is_not_told_of() -> None:
    go = threading.Event()

    def read() -> TokenTable:
        go.wait()
        return TABLE

    with running(read) as compiler:
        for request_id in (1, 2):
            compiler.start(request_id, GOOD, param="p")
        compiler.cancel(1)
        compiler.cancel(7)
        go.set()
        assert list(outcomes(compiler, 1)) == [2]


def test_what_takes_too_long_is_refused_and_then_forgotten() -> None:
    go = threading.Event()
    now = 0.0

    def read() -> TokenTable:
        go.wait()
        return TABLE

    with running(read, lambda: now) as compiler:
        compiler.start(1, GOOD, param="p")
        now = TIME_LIMIT_S - 1
        assert compiler.finished() == []
        compiler.start(2, GOOD, param="p")
        now = TIME_LIMIT_S
        (late,) = compiler.finished()
        assert late.request_id == 1
        assert (failure(late).code, failure(late).param) == (ErrorCode.INVALID_VALUE, "p")
        go.set()
        assert list(outcomes(compiler, 1)) == [2]
        assert compiler.finished(0.01) == []


def test_the_vocabulary_is_read_once() -> None:
    reads = []

    def read() -> TokenTable:
        reads.append(threading.current_thread().name)
        return TABLE

    with running(read) as compiler:
        compiler.prepare()
        compiler.prepare()
        compiler.start(1, GOOD, param="p")
        outcomes(compiler, 1)
    assert reads == ["constraints"]


def broken() -> TokenTable:
    raise RuntimeError("no such token")


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda: None, "not known"),
        (broken, "no such token"),
        (lambda: TokenTable([], {}, frozenset(), TABLE.encode), "ends an answer"),
    ],
)
def test_a_vocabulary_that_allows_no_constraint(
    read: Callable[[], TokenTable | None], reason: str
) -> None:
    with running(read) as compiler:
        for request_id in (1, 2):
            compiler.start(request_id, GOOD, param="p")
        for compiled in outcomes(compiler, 2).values():
            assert failure(compiled).code is ErrorCode.UNSUPPORTED_PARAMETER
            assert reason in failure(compiled).message


def chain(
    line: Callable[[int], str], opening: str, closing: str, limit: int = MAX_TEXT_BYTES
) -> str:
    """As many rules as a constraint may have, each of which leads to the next."""
    lines, size = [opening], len(opening) + len(closing)
    while size < limit - 100:
        lines.append(line(len(lines) - 1))
        size += len(lines[-1]) + 1
    return "\n".join([*lines, closing.replace("LAST", str(len(lines) - 1))])


def chained_references() -> Constraint:
    number = 9000
    rules = {f"{n}": {"$ref": f"#/$defs/{n + 1}"} for n in range(number)}
    schema = {"$ref": "#/$defs/0", "$defs": rules | {str(number): {"type": "null"}}}
    return Constraint(ConstraintKind.SCHEMA, json.dumps(schema, separators=(",", ":")))


DEEP = {
    "rules": Constraint(
        ConstraintKind.LARK, chain(lambda n: f'r{n}:"a" r{n + 1}', "start:r0", 'rLAST:"b"')
    ),
    "rules alone": Constraint(
        ConstraintKind.LARK, chain(lambda n: f"r{n}:r{n + 1}", "start:r0", 'rLAST:"b"')
    ),
    "choices": Constraint(
        # Quadratic, if no deeper.
        ConstraintKind.LARK,
        chain(lambda n: f'r{n}:r{n + 1}|"a"', "start:r0", 'rLAST:"b"', MAX_TEXT_BYTES // 4),
    ),
    "terminals": Constraint(
        ConstraintKind.LARK, chain(lambda n: f'T{n}:"a" T{n + 1}', "start:T0", 'TLAST:"b"')
    ),
    "references": chained_references(),
}


@pytest.mark.parametrize("name", DEEP)
def test_the_deepest_grammars_cost_no_more_than_their_request(name: str) -> None:
    with running() as compiler:
        compiler.start(1, DEEP[name], param="p")
        compiled = outcomes(compiler, 1)[1]
        if not isinstance(compiled.mask, CodedError):
            # On a stack of ordinary size.
            compiled.mask.accept(ord("a"))
            compiled.mask.allowed()
        compiler.start(2, GOOD, param="p")
        assert not isinstance(outcomes(compiler, 1)[2].mask, CodedError)
