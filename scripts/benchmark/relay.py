"""What the gateway alone can do: a simulated worker that says words as fast as it is asked.

Two speeds. "paced" is a token every 10 ms on each stream, as a good machine's model
makes them: the cost of a token when each is relayed by itself. "flat out" is no pause
at all: the relay's limit, with tokens joined where the client or the gateway is behind.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmark.children import Player, running
from benchmark.contenders import MODEL, HttpInstance, serve
from benchmark.plan import Plan, Request
from benchmark.probes import cpu_s
from benchmark.report import print_table
from benchmark.summary import Range, spread
from benchmark.workloads import Sample, Streams

_PACED_S = 0.01
_SHORT_REQUESTS = 100


def measure(
    repetitions: int, streams: list[int], tokens: int, say: Callable[[str], None]
) -> list[Sample]:
    """Samples of both speeds at each number of streams, and of short requests."""
    samples: list[Sample] = []
    for speed, pause, count in (("paced", _PACED_S, 300), ("flat out", 0.0, tokens)):
        for number in streams:
            say(f"{speed}, {number} streams")
            workload = Streams(number, count, total_context=0)
            with tempfile.TemporaryDirectory(prefix="opta-bench-") as folder:
                script = simulated_model(Path(folder), pause)
                arguments = ["--enable-simulated", f"--model={MODEL}={script}"]
                arguments += [f"--max-sequences={number}", "--context-length=65536"]
                client = Player("client")
                with running(client.child), serve(*arguments) as server:
                    server.await_model(MODEL)
                    instance = HttpInstance(
                        client,
                        server.child,
                        server.port,
                        gateway=[server.child.pid],
                        workers=server.workers(),
                    )
                    workload.measure(instance, 0, Sample("", "", 0))
                    for repetition in range(repetitions):
                        sample = Sample("opta-lmx", f"{speed}, {workload.name}", repetition)
                        workload.measure(instance, (repetition + 1) * 1000, sample)
                        samples.append(sample)
                    if speed == "flat out" and number == 1:
                        samples += [_short(instance, number) for number in range(repetitions)]
    return samples


def simulated_model(folder: Path, step_delay_s: float) -> Path:
    """A model that says one word after the other, without end."""
    script: dict[str, Any] = {"tokens": [" word", " and", " another"], "repeat": True}
    path = folder / "words.sim.json"
    path.write_text(json.dumps({**script, "step_delay_s": step_delay_s, "context_length": 65536}))
    return path


def _short(instance: HttpInstance, repetition: int) -> Sample:
    """Requests for one token, one after the other."""
    sample = Sample("opta-lmx", "short requests", repetition)
    began = cpu_s(instance.gateway)
    waits = [ask_short(instance, MODEL) for _ in range(_SHORT_REQUESTS)]
    sample.metrics["gateway_us_per_request"] = (
        1e6 * (cpu_s(instance.gateway) - began) / _SHORT_REQUESTS
    )
    sample.first_tokens_ms = waits
    return sample


def ask_short(instance: HttpInstance, model: str) -> float:
    """Milliseconds until the one token of a short answer."""
    body = {"messages": [{"role": "user", "content": "word?"}], "stream": True}
    request = Request({**body, "model": model, "max_tokens": 1})
    (answer,) = instance.play(Plan([request], timeout_s=30))
    return 1e3 * (answer.pieces[0] - answer.sent)


def show(samples: list[Sample], console: Console) -> None:
    table = Table()
    for heading in ("", "tokens/s", "gateway µs/token", "tokens/event", "first token ms"):
        table.add_column(heading, justify="right" if heading else "left")
    names = ("tokens_per_s", "gateway_us_per_token", "tokens_per_piece", "first_token_p50_ms")
    for workload in dict.fromkeys(sample.workload for sample in samples):
        chosen = [sample for sample in samples if sample.workload == workload]
        if workload == "short requests":
            continue
        ranges = [spread([s.metrics[name] for s in chosen]) for name in names]
        table.add_row(workload, *(_cell(found) for found in ranges))
    print_table(console, "The relay by itself: median (range)", table)
    short = [s for s in samples if s.workload == "short requests"]
    if cost := spread([s.metrics["gateway_us_per_request"] for s in short]):
        console.print(f"a short request costs the gateway {_cell(cost)} µs of CPU")


def _cell(found: Range | None) -> str:
    if found is None:
        return "-"
    digits = 0 if found.median >= 1000 else 1
    return f"{found.median:,.{digits}f} ({found.low:,.{digits}f} to {found.high:,.{digits}f})"
