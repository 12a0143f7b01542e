"""The ledger knows a worker again, whatever the clock says; and nobody else."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from supervisor import ledger as ledger_module
from supervisor.ledger import WorkerLedger
from supervisor.marks import home_mark

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="start ticks are Linux's")


@pytest.fixture
def left() -> Iterator[subprocess.Popen[bytes]]:
    """A worker that an earlier server left."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    yield process
    process.kill()
    process.wait()


async def written(home: Path, pid: int) -> dict[str, Any]:
    """The file of a server that runs this worker."""
    ledger = WorkerLedger(home)
    ledger.add(pid)
    await ledger.flush()
    file: dict[str, Any] = json.loads((home / "workers.json").read_bytes())
    return file


def rewrite(home: Path, **changes: object) -> None:
    path = home / "workers.json"
    file = json.loads(path.read_bytes())
    file["workers"][0].update(changes)
    path.write_text(json.dumps(file))


async def test_a_worker_that_was_left_is_killed(
    tmp_path: Path, left: subprocess.Popen[bytes]
) -> None:
    await written(tmp_path, left.pid)
    assert WorkerLedger(tmp_path).sweep() == [left.pid]
    assert left.wait(10) == -signal.SIGKILL


@linux_only
async def test_a_clock_that_was_set_hides_no_worker(
    tmp_path: Path, left: subprocess.Popen[bytes]
) -> None:
    """The system computes the time of a start from the clock of today."""
    file = await written(tmp_path, left.pid)
    rewrite(tmp_path, started_at=file["workers"][0]["started_at"] - 86_400)
    assert WorkerLedger(tmp_path).sweep() == [left.pid]


@linux_only
@pytest.mark.parametrize("change", [{"start_ticks": 7}, {"boot_id": "another"}])
async def test_another_process_of_that_number_is_left_alone(
    tmp_path: Path, left: subprocess.Popen[bytes], change: dict[str, object]
) -> None:
    await written(tmp_path, left.pid)
    rewrite(tmp_path, **change)
    assert WorkerLedger(tmp_path).sweep() == []
    assert left.poll() is None


async def test_the_file_of_an_earlier_version_is_read(
    tmp_path: Path, left: subprocess.Popen[bytes]
) -> None:
    started_at = psutil.Process(left.pid).create_time()
    workers = [{"pid": left.pid, "started_at": started_at}, {"pid": os.getpid(), "started_at": 1.0}]
    path = tmp_path / "workers.json"
    path.write_text(json.dumps({"schema_version": 1, "workers": workers}))
    assert WorkerLedger(tmp_path).sweep() == [left.pid]


async def test_without_ticks_the_time_of_the_start_counts(
    tmp_path: Path, left: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_start_ticks", lambda pid: None)
    await written(tmp_path, left.pid)
    rewrite(tmp_path, started_at=1.0)
    assert WorkerLedger(tmp_path).sweep() == []
    await written(tmp_path, left.pid)
    assert WorkerLedger(tmp_path).sweep() == [left.pid]


@linux_only
def test_start_ticks_of_a_process_with_an_awkward_name(tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as process:
        try:
            # The name changes with the exec.
            ticks = ledger_module._start_ticks(process.pid)
            assert ticks is not None
            since_boot = psutil.Process(process.pid).create_time() - psutil.boot_time()
            assert abs(ticks / os.sysconf("SC_CLK_TCK") - since_boot) < 2
        finally:
            process.kill()


def test_a_home_is_a_folder_and_not_its_path_alone(tmp_path: Path) -> None:
    """As two containers see it, with the same path for each its own folder."""
    home = tmp_path / "home"
    home.mkdir()
    mark = home_mark(home)
    assert home_mark(home) == mark
    home.rename(tmp_path / "elsewhere")
    home.mkdir()
    assert home_mark(home) != mark
    home.rmdir()
    assert home_mark(home) not in {mark, ""}
