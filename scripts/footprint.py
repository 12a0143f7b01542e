"""What the supervisor costs by itself: CPU to its first answer, CPU at rest, memory."""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
import tempfile
import time

import psutil

IDLE_S = 10.0


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "supervisor.cli", "serve", "--port=0", f"--home={home}"]
        started = time.monotonic()
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            port = _port(process)
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            wall = time.monotonic() - started
            watched = psutil.Process(process.pid)
            start_cpu = _cpu_s(watched)
            time.sleep(IDLE_S)
            idle_cpu = _cpu_s(watched) - start_cpu
            memory = watched.memory_info().rss
            process.terminate()
    print(f"start to /healthz     {start_cpu:.2f} s CPU, {wall:.2f} s wall")
    print(f"idle                  {idle_cpu / IDLE_S * 100:.2f} % of one core")
    print(f"memory                {memory / 1e6:.0f} MB")


def _port(process: subprocess.Popen[str]) -> int:
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
            return int(found[1])
    raise SystemExit("the server did not start")


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
