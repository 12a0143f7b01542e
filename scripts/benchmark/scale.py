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
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from benchmark.children import Player, running
from benchmark.contenders import HttpInstance, Served, serve
from benchmark.plan import Failed
from benchmark.probes import Memory, cpu_s, memory
from benchmark.relay import ask_short, simulated_model
from benchmark.summary import Range, Verdict, judge, spread
from benchmark.tables import Table, cell, verdict_table

_IDLE_S = 10.0
#: After a load the supervisor still writes its records.
_SETTLE_S = 3.0
_REQUESTS = 100
IDLE_LIMIT_PERCENT = 1.0
#: By how much a figure may grow from the fewest workers to the most and still be flat.
FLAT = 1.25


class Step(msgspec.Struct):
    """The server with so many workers. Times in ms, CPU in µs or in % of one core."""

    workers: int
    start_ms: Range
    supervisor_idle_percent: Range
    #: Of all of them together.
    workers_idle_percent: Range
    first_token_ms: Range
    gateway_us_per_request: Range
    supervisor: Memory
    worker: Memory


class Scale(msgspec.Struct):
    machine: dict[str, str]
    steps: list[Step]
    #: The workers of one model's file, by how many of them map it.
    shared: dict[str, list[Memory]]
    verdicts: list[Verdict]


def measure(sizes: list[int], repetitions: int, say: Callable[[str], None]) -> list[Step]:
    with tempfile.TemporaryDirectory(prefix="opta-bench-") as name:
        script = simulated_model(Path(name), 0.0)
        client = Player("client")
        with running(client.child), serve("--enable-simulated") as server:
            fleet = _Fleet(server, script)
            return [_measure_size(fleet, client, size, repetitions, say) for size in sizes]


class _Fleet:
    """The models of one server: m0, m1 and so on, each a file of its own."""

    def __init__(self, server: Served, script: Path) -> None:
        self.server = server
        self._script = script
        self.size = 0

    def grow(self, size: int) -> None:
        while self.size < size:
            self.load(f"m{self.size}")
            self.size += 1
        if len(self.server.workers()) != size:
            raise Failed(f"{size} models are loaded, and not as many workers run")

    def load(self, model_id: str) -> float:
        """Milliseconds until it is routable."""
        copy = self._script.parent / f"{model_id}.sim.json"
        shutil.copy(self._script, copy)
        began = time.monotonic()
        self._post("load", {"model_id": model_id, "path": str(copy)})
        return 1e3 * (time.monotonic() - began)

    def unload(self, model_id: str) -> None:
        self._post("unload", {"model_id": model_id})

    def _post(self, what: str, body: dict[str, str]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=120)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"/admin/models/{what}", json.dumps(body), headers)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        if response.status != 200:
            told = answer.decode(errors="replace")[:300]
            raise Failed(f"{what} of {body['model_id']}: {told}")


def _measure_size(
    fleet: _Fleet, client: Player, size: int, repetitions: int, say: Callable[[str], None]
) -> Step:
    say(f"{size} workers")
    # The last of them is loaded again and again.
    fleet.grow(size - 1)
    starts = []
    for repetition in range(repetitions):
        if repetition:
            fleet.unload(f"m{size - 1}")
        starts.append(fleet.load(f"m{size - 1}"))
    fleet.size = size
    server = fleet.server
    supervisor, workers = server.child.pid, server.workers()
    instance = HttpInstance(
        client, server.child, server.port, gateway=[supervisor], workers=workers
    )
    ask_short(instance, "m0")
    chance = random.Random(size)
    costs, waits, idles, workers_idles = [], [], [], []
    time.sleep(_SETTLE_S)
    for _ in range(repetitions):
        models = [f"m{chance.randrange(size)}" for _ in range(_REQUESTS)]
        cpu = cpu_s([supervisor])
        waits.append(statistics.median(ask_short(instance, model) for model in models))
        costs.append(1e6 * (cpu_s([supervisor]) - cpu) / _REQUESTS)
        idle, workers_idle = _idle(supervisor, workers)
        idles.append(idle)
        workers_idles.append(workers_idle)
    return Step(
        workers=size,
        start_ms=_range(starts),
        supervisor_idle_percent=_range(idles),
        workers_idle_percent=_range(workers_idles),
        first_token_ms=_range(waits),
        gateway_us_per_request=_range(costs),
        supervisor=memory(supervisor),
        worker=_typical([memory(pid) for pid in workers]),
    )


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
    """% of one core, of the supervisor and of all workers together."""
    began, used = time.monotonic(), (cpu_s([supervisor]), cpu_s(workers))
    time.sleep(_IDLE_S)
    passed = time.monotonic() - began
    idle = 100 * (cpu_s([supervisor]) - used[0]) / passed
    return idle, 100 * (cpu_s(workers) - used[1]) / passed


def _range(values: Sequence[float]) -> Range:
    found = spread(values)
    assert found is not None
    return found


def _typical(memories: list[Memory]) -> Memory:
    """The worker in the middle by its resident size."""
    return sorted(memories)[len(memories) // 2]


def verdicts(steps: Sequence[Step]) -> list[Verdict]:
    if not steps:
        return []
    first, last = steps[0], steps[-1]
    idle = last.supervisor_idle_percent
    limit = f"{IDLE_LIMIT_PERCENT:.0f} % of a core"
    promise = f"the supervisor's idle CPU with {last.workers} workers ≤ {limit}"
    judged = [judge(promise, idle, IDLE_LIMIT_PERCENT)]
    flat: Sequence[tuple[str, Callable[[Step], Range]]] = (
        ("time to start one more", lambda step: step.start_ms),
        ("gateway CPU of a request", lambda step: step.gateway_us_per_request),
    )
    for what, figure in flat:
        ratio = None
        if len(steps) > 1:
            least = figure(first).median
            found = figure(last)
            ratio = Range(found.median / least, found.low / least, found.high / least)
        promise = f"{what}: with {last.workers} workers ≤ {FLAT} of that with {first.workers}"
        judged.append(judge(promise, ratio, FLAT))
    return judged


def tables(scale: Scale) -> list[Table]:
    columns = (
        *("workers", "start ms", "idle supervisor %", "idle workers %, all", "first token ms"),
        *("gateway µs/request", "supervisor MB", "worker MB rss / pss / unique"),
    )
    rows = [
        (
            str(step.workers),
            cell(step.start_ms, 0),
            cell(step.supervisor_idle_percent, 2),
            cell(step.workers_idle_percent, 2),
            cell(step.first_token_ms),
            cell(step.gateway_us_per_request, 0),
            f"{step.supervisor.rss:.0f}",
            _megabytes(step.worker),
        )
        for step in scale.steps
    ]
    shown = [Table("Simulated workers on one supervisor: median (range)", columns, rows)]
    if scale.shared:
        shown.append(_shared_table(scale.shared))
    return [*shown, verdict_table(scale.verdicts)]


def _shared_table(shared: dict[str, list[Memory]]) -> Table:
    rows = [
        (count, "; ".join(map(_megabytes, memories)), f"{_total(memories):.0f}")
        for count, memories in shared.items()
    ]
    saved = 2 * _total(shared["1"]) - _total(shared["2"])
    note = "what sharing saves is not told by this system: it has no PSS"
    if all(entry.pss is not None for entry in shared["2"]):
        note = f"sharing the file's pages saves {saved:.0f} MB for the second worker"
    columns = ("workers", "MB rss / pss / unique of each", "MB in all")
    return Table("Workers that map the same file", columns, rows, [note])


def _total(memories: list[Memory]) -> float:
    return sum(entry.rss if entry.pss is None else entry.pss for entry in memories)


def _megabytes(entry: Memory) -> str:
    return " / ".join("-" if part is None else f"{part:.0f}" for part in entry)
