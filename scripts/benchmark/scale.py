"""One supervisor with many workers: what each costs when idle, and whether size shows.

The many are simulated, so that what is seen is the supervisor's share and the floor
under any worker. Two more servers load a real model, once and twice, to see what the
file's pages cost when two workers map them.
"""

from __future__ import annotations

import http.client
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from benchmark.children import Player, running
from benchmark.contenders import HttpInstance, serve
from benchmark.plan import Failed
from benchmark.probes import Memory, cpu_s, memory
from benchmark.relay import ask_short, simulated_model
from benchmark.report import print_table

_IDLE_S = 10.0
#: After a load the supervisor still writes its records.
_SETTLE_S = 3.0
_REQUESTS = 100
IDLE_LIMIT_PERCENT = 1.0


class Step(msgspec.Struct):
    """The server with so many workers. Times in ms, CPU in µs or in % of one core."""

    workers: int
    start_ms: float
    supervisor_idle_percent: float
    worker_idle_percent: float
    first_token_ms: float
    gateway_us_per_request: float
    supervisor: Memory
    worker: Memory


class Scale(msgspec.Struct):
    machine: dict[str, str]
    steps: list[Step]
    #: The workers of one model's file, by how many of them map it.
    shared: dict[str, list[Memory]]


def measure(sizes: list[int], say: Callable[[str], None]) -> list[Step]:
    steps = []
    chance = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="opta-bench-") as name:
        script = simulated_model(Path(name), 0.0)
        client = Player("client")
        with running(client.child), serve("--enable-simulated") as server:
            supervisor = server.child.pid
            loaded = 0
            for size in sizes:
                say(f"{size} workers")
                starts = []
                while loaded < size:
                    copy = Path(name) / f"m{loaded}.sim.json"
                    shutil.copy(script, copy)
                    began = time.monotonic()
                    _load(server.port, f"m{loaded}", copy)
                    starts.append(1e3 * (time.monotonic() - began))
                    loaded += 1
                workers = server.workers()
                if len(workers) != size:
                    raise Failed(f"{size} models are loaded and {len(workers)} workers run")
                instance = HttpInstance(
                    client, server.child, server.port, gateway=[supervisor], workers=workers
                )
                ask_short(instance, "m0")
                cpu = cpu_s([supervisor])
                models = [f"m{chance.randrange(size)}" for _ in range(_REQUESTS)]
                waits = [ask_short(instance, model) for model in models]
                cpu = cpu_s([supervisor]) - cpu
                idle, worker_idle = _idle(supervisor, workers)
                steps.append(
                    Step(
                        workers=size,
                        start_ms=statistics.median(starts),
                        supervisor_idle_percent=idle,
                        worker_idle_percent=worker_idle,
                        first_token_ms=statistics.median(waits),
                        gateway_us_per_request=1e6 * cpu / _REQUESTS,
                        supervisor=memory(supervisor),
                        worker=_typical([memory(pid) for pid in workers]),
                    )
                )
    return steps


def measure_shared(model: Path, say: Callable[[str], None]) -> dict[str, list[Memory]]:
    """The workers' memory with the file mapped by one and by two."""
    found = {}
    for count in (1, 2):
        say(f"{model.name} in {count} worker{'s' if count > 1 else ''}")
        arguments = [f"--model=m{number}={model}" for number in range(count)]
        with serve(*arguments) as server:
            for number in range(count):
                server.await_model(f"m{number}")
            found[str(count)] = [memory(pid) for pid in server.workers()]
    return found


def _idle(supervisor: int, workers: list[int]) -> tuple[float, float]:
    """% of one core, of the supervisor and of one worker."""
    time.sleep(_SETTLE_S)
    began, used = time.monotonic(), (cpu_s([supervisor]), cpu_s(workers))
    time.sleep(_IDLE_S)
    passed = time.monotonic() - began
    idle = 100 * (cpu_s([supervisor]) - used[0]) / passed
    return idle, 100 * (cpu_s(workers) - used[1]) / passed / len(workers)


def _load(port: int, model_id: str, path: Path) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = json.dumps({"model_id": model_id, "path": str(path)})
    connection.request("POST", "/admin/models/load", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    if response.status != 200:
        raise Failed(f"loading {model_id}: {answer.decode(errors='replace')[:300]}")


def _typical(memories: list[Memory]) -> Memory:
    """The worker in the middle by its resident size."""
    return sorted(memories)[len(memories) // 2]


def show(scale: Scale, console: Console) -> None:
    table = Table()
    for heading in (
        *("workers", "start ms", "idle supervisor %", "idle worker %", "first token ms"),
        *("gateway µs/request", "supervisor MB", "worker MB rss / pss / unique"),
    ):
        table.add_column(heading, justify="right")
    for step in scale.steps:
        table.add_row(
            str(step.workers),
            f"{step.start_ms:.0f}",
            f"{step.supervisor_idle_percent:.2f}",
            f"{step.worker_idle_percent:.2f}",
            f"{step.first_token_ms:.1f}",
            f"{step.gateway_us_per_request:.0f}",
            f"{step.supervisor.rss:.0f}",
            _megabytes(step.worker),
        )
    print_table(console, "Simulated workers on one supervisor", table)
    if scale.steps:
        last = scale.steps[-1]
        word = "ok" if last.supervisor_idle_percent < IDLE_LIMIT_PERCENT else "SHORT"
        console.print(
            f"idle CPU of the supervisor with {last.workers} workers < "
            f"{IDLE_LIMIT_PERCENT:.0f} % of a core: {last.supervisor_idle_percent:.2f} %: {word}"
        )
    if scale.shared:
        _show_shared(scale.shared, console)


def _show_shared(shared: dict[str, list[Memory]], console: Console) -> None:
    table = Table()
    for heading in ("workers", "MB rss / pss / unique of each", "MB in all"):
        table.add_column(heading)
    for count, memories in shared.items():
        each = "; ".join(map(_megabytes, memories))
        table.add_row(count, each, f"{_total(memories):.0f}")
    print_table(console, "Workers that map the same file", table)
    saved = 2 * _total(shared["1"]) - _total(shared["2"])
    if all(entry.pss is not None for entry in shared["2"]):
        console.print(f"sharing the file's pages saves {saved:.0f} MB for the second worker")
    else:
        console.print("what sharing saves is not told by this system: it has no PSS")


def _total(memories: list[Memory]) -> float:
    return sum(entry.rss if entry.pss is None else entry.pss for entry in memories)


def _megabytes(entry: Memory) -> str:
    return " / ".join("-" if part is None else f"{part:.0f}" for part in entry)
