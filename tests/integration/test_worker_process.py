"""A child of ours: its end is seen however it is watched, and it holds nobody up."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from protocol.handshake import WorkerBoot
from supervisor import process
from supervisor.process import OUTPUT_TAIL_BYTES, WorkerProcess
from tests.support.server import alive, await_gone

BOOT = WorkerBoot(
    data_endpoint="",
    beat_endpoint="",
    nonce="",
    generation=1,
    backend="simulated",
    parent_pid=0,
    death_fd=0,
    beat_interval_s=1.0,
    quiet_beat_interval_s=1.0,
)
WAIT_S = 10.0


class Child(WorkerProcess):
    """Runs a shell script in the place of a worker."""

    def __init__(self, death_fd: int) -> None:
        self.gone = asyncio.Event()
        super().__init__(BOOT, death_fd, on_exit=self.gone.set, name="child", mark="child")

    async def ended(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await self.gone.wait()

    async def says(self, word: str) -> str:
        for _ in range(1000):
            if word in self.output_tail:
                break
            await asyncio.sleep(0.01)
        return self.output_tail


Spawn = Callable[[str], Child]


@pytest.fixture
async def spawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Spawn]:
    """Spawn a script; whatever is left of it at the end is killed."""
    program = tmp_path / "child"
    monkeypatch.setattr("supervisor.process.sys.executable", str(program))
    read, write = os.pipe()
    children = []

    def spawn(script: str) -> Child:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o700)
        children.append(Child(read))
        return children[-1]

    yield spawn
    os.close(read)
    os.close(write)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await child.ended()


def without_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_pid: int) -> int:
        raise OSError("no pidfd here")

    monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)


@pytest.mark.parametrize("watch", ["pidfd", "thread"])
async def test_a_death_takes_the_helpers_of_its_group_along(
    spawn: Spawn, monkeypatch: pytest.MonkeyPatch, watch: str
) -> None:
    if watch == "thread":
        without_pidfd(monkeypatch)
    child = spawn("sleep 600 & echo helper $! .; kill -9 $$")
    await child.ended()
    assert child.exit_status == -signal.SIGKILL
    await_gone([int((await child.says("helper")).split()[1])], 2.0)


@pytest.mark.parametrize("watch", ["pidfd", "thread"])
async def test_a_death_is_seen_within_50_ms(
    spawn: Spawn, monkeypatch: pytest.MonkeyPatch, watch: str
) -> None:
    if watch == "thread":
        without_pidfd(monkeypatch)
    took = []
    for _ in range(3):
        child = spawn("exec sleep 600")
        await asyncio.sleep(0.1)
        killed_at = time.monotonic()
        os.kill(child.pid, signal.SIGTERM)
        await child.ended()
        took.append(time.monotonic() - killed_at)
        assert child.exit_status == -signal.SIGTERM
    assert min(took) < 0.05


@pytest.mark.parametrize("broken", ["watch", "thread"])
async def test_a_child_that_cannot_be_watched_is_none(
    spawn: Spawn, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    before = {child.pid for child in psutil.Process().children()}
    descriptors = psutil.Process().num_fds()
    with monkeypatch.context() as patched:
        if broken == "thread":
            without_pidfd(patched)
            patched.setattr(threading.Thread, "start", refuse)
        else:
            patched.setattr(WorkerProcess, "_watch", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            spawn("exec sleep 600")
    assert {child.pid for child in psutil.Process().children()} == before
    assert psutil.Process().num_fds() == descriptors


async def test_who_survives_sigkill_is_waited_for_no_longer_than_the_limit(
    spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = spawn("exec sleep 600")
    monkeypatch.setattr(process, "KILL_TIMEOUT_S", 0.1)
    monkeypatch.setattr(child, "_signal", lambda number: None)
    async with asyncio.timeout(WAIT_S):
        assert not await child.stop(grace_s=0.1, broken=True)
    assert child.exit_status is None
    os.kill(child.pid, signal.SIGKILL)
    await child.ended()
    assert await child.stop(grace_s=0.1, broken=True)


async def test_a_flood_is_read_a_bounded_piece_at_a_time(
    spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = spawn("echo ready; exec sleep 600")
    await child.says("ready")
    sizes = []

    def endless(_: int, size: int) -> bytes:
        sizes.append(size)
        return b"x" * size

    with monkeypatch.context() as patched:
        patched.setattr("supervisor.process.os.read", endless)
        child._read_output()
    assert sizes == [OUTPUT_TAIL_BYTES]


async def test_to_be_asked_for_its_stacks_ends_no_child_that_is_not_ready(spawn: Spawn) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    child = spawn("echo ready; exec sleep 600")
    assert signal.getsignal(signal.SIGUSR1) == before
    await child.says("ready")
    child.dump_stacks()
    await asyncio.sleep(0.2)
    assert alive(child.pid)


def await_zombie(pid: int) -> None:
    """Without a turn of the event loop, which would reap it."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


async def test_a_process_that_is_on_its_way_out_is_dead(
    spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is closed already: a request is not refused for that, but runs again."""
    child = spawn("echo ready; exec sleep 600")
    await child.says("ready")
    assert not child.is_dead()
    os.kill(child.pid, signal.SIGKILL)
    await_zombie(child.pid)
    with monkeypatch.context() as patched:
        # Between the two there is no state of its own.
        patched.setattr(psutil.Process, "status", lambda _: psutil.STATUS_RUNNING)
        assert child.is_dead()
