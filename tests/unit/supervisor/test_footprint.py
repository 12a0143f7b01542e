"""What a process costs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.footprint import FootprintMeter


def test_a_process_is_measured_again_and_again_and_then_gone() -> None:
    meter = FootprintMeter()
    first = meter.measure([os.getpid()])
    assert first[os.getpid()] > 1_000_000
    assert meter.measure([os.getpid(), 2**22 + 1]) == meter.measure([os.getpid()])


#: Maps the file and touches as many megabytes of it as the lines of stdin say.
SHARER = """
import mmap, sys
file = open(sys.argv[1], "rb")
pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
for line in sys.stdin:
    for at in range(0, int(line) << 20, 4096):
        pages[at]
    print("touched", flush=True)
"""


class Sharer:
    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SHARER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def touch(self, megabytes: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(megabytes, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def sharers(tmp_path: Path) -> Iterator[tuple[Sharer, Sharer]]:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 4096 * 64)
    pair = Sharer(path), Sharer(path)
    yield pair
    for sharer in pair:
        sharer.end()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux splits shared pages")
def test_what_another_shared_is_ones_own_when_it_has_gone(sharers: tuple[Sharer, Sharer]) -> None:
    one, other = sharers
    one.touch(64)
    other.touch(64)
    meter = FootprintMeter()
    shared = meter.measure([one.pid, other.pid])[one.pid]
    other.end()
    assert meter.measure([one.pid])[one.pid] > shared + 30_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux splits shared pages")
def test_what_another_maps_as_well_is_split(sharers: tuple[Sharer, Sharer]) -> None:
    one, other = sharers
    one.touch(64)
    other.touch(1)
    meter = FootprintMeter()
    alone = meter.measure([one.pid, other.pid])[one.pid]
    other.touch(64)
    assert meter.measure([one.pid, other.pid])[one.pid] < alone - 30_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux splits shared pages")
def test_an_exact_look_is_none_of_the_estimates(sharers: tuple[Sharer, Sharer]) -> None:
    one, other = sharers
    one.touch(60)
    other.touch(64)
    meter = FootprintMeter()
    pids = [one.pid, other.pid]
    meter.measure(pids)
    one.touch(63)
    estimated = meter.measure(pids)[one.pid]
    exact = meter.measure(pids, exactly=True)[one.pid]
    # Half of the three megabytes is the other's.
    assert exact < estimated - 1_000_000
