"""What the gateway alone can do: a simulated worker that says words as fast as it is asked.

Two speeds. "paced" is a token every 10 ms on each stream, as a good machine's model
makes them: the cost of a token when each is relayed by itself. "flat out" is no pause
at all: the relay's limit, with tokens joined where the client or the gateway is behind.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmark.children import Player, running
from benchmark.contenders import MODEL, HttpInstance, queue_for, serve
from benchmark.plan import Plan, Request
from benchmark.probes import cpu_s
from benchmark.summary import (
    GATEWAY,
    LIMIT_MANY_STREAMS,
    LIMIT_ONE_STREAM,
    Samples,
    Verdict,
    judge,
    spread,
)
from benchmark.tables import Table, cell, verdict_table
from benchmark.workloads import Sample, Streams

_PACED, _FLAT_OUT = "paced", "flat out"
_PACED_S = 0.01
_PACED_TOKENS = 300
_SHORT_REQUESTS = 100
_SHORT = "short requests"
_PLAIN, _RECORDED = "opta-lmx", "opta-lmx, recorded"


class _Configuration(NamedTuple):
    speed: str
    workload: Streams
    instance: HttpInstance


def measure(
    repetitions: int,
    streams: list[int],
    tokens: int,
    say: Callable[[str], None],
    *,
    recorded: bool = False,
) -> list[Sample]:
    """Samples of both speeds at each number of streams, and of short requests, in turns.

    ``recorded``: each also of the same streams recorded, right before or after.
    """
    samples: list[Sample] = []
    with ExitStack() as stack:
        client = Player("client")
        stack.enter_context(running(client.child))
        found: list[_Configuration] = []
        for speed, pause, count in (
            (_PACED, _PACED_S, _PACED_TOKENS),
            (_FLAT_OUT, 0.0, tokens),
        ):
            for number in streams:
                workload = Streams(number, count, total_context=0)
                say(f"starting: {speed}, {workload.name}")
                instance = stack.enter_context(_run(client, number, pause))
                Streams(number, 20, total_context=0).measure(instance, 0, Sample("", "", 0))
                found.append(_Configuration(speed, workload, instance))
        for repetition in range(repetitions):
            turn = repetition % len(found)
            # Nobody always comes after the same one.
            for speed, workload, instance in found[turn:] + found[:turn]:
                say(f"{speed}, {workload.name}: {repetition + 1} of {repetitions}")
                pair = [(_PLAIN, workload), (_RECORDED, replace(workload, recorded=True))]
                if repetition % 2:
                    pair.reverse()
                for number, (contender, each) in enumerate(pair):
                    if contender == _RECORDED and not recorded:
                        continue
                    sample = Sample(contender, f"{speed}, {workload.name}", repetition)
                    each.measure(instance, (repetition + 1) * 1000 + 500 * number, sample)
                    samples.append(sample)
            samples.append(_short(found[-1].instance, repetition))
    order = [f"{each.speed}, {each.workload.name}" for each in found] + [_SHORT]
    return sorted(samples, key=lambda sample: order.index(sample.workload))


@contextmanager
def _run(client: Player, streams: int, pause: float) -> Iterator[HttpInstance]:
    with tempfile.TemporaryDirectory(prefix="opta-bench-") as folder:
        script = simulated_model(Path(folder), pause)
        arguments = ["--enable-simulated", f"--model={MODEL}={script}", "--context-length=65536"]
        arguments += [f"--max-sequences={streams}", f"--max-queue={queue_for(streams)}"]
        with serve(*arguments) as server:
            server.await_model(MODEL)
            yield HttpInstance(
                client,
                server.child,
                server.port,
                gateway=[server.child.pid],
                workers=server.workers(),
            )


def simulated_model(folder: Path, step_delay_s: float) -> Path:
    """A model that says one word after the other, without end."""
    script: dict[str, Any] = {"tokens": [" word", " and", " another"], "repeat": True}
    path = folder / "words.sim.json"
    path.write_text(json.dumps({**script, "step_delay_s": step_delay_s, "context_length": 65536}))
    return path


def _short(instance: HttpInstance, repetition: int) -> Sample:
    """Requests for one token, one after the other."""
    sample = Sample("opta-lmx", _SHORT, repetition)
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


def verdicts(samples: list[Sample]) -> list[Verdict]:
    """Of the paced ones: flat out, tokens share a message."""
    found = Samples(samples)
    judged = []
    for number in (1, 8, 32):
        workload = f"{_PACED}, {Streams(number, 1, 0).name}"
        limit = LIMIT_ONE_STREAM if number == 1 else LIMIT_MANY_STREAMS
        promise = f"{workload}: gateway CPU ≤ {limit:.0f} µs/token"
        judged.append(judge(promise, found.range("opta-lmx", workload, GATEWAY), limit))
    return judged


def tables(samples: list[Sample]) -> list[Table]:
    found = Samples(samples)
    columns = ("", "tokens/s", "gateway µs/token", "tokens/event", "first token ms")
    names = ("tokens_per_s", GATEWAY, "tokens_per_piece", "first_token_p50_ms")
    rows = [
        (workload, *(cell(found.range("opta-lmx", workload, name)) for name in names))
        for workload in found.workloads()
        if workload != _SHORT
    ]
    more = [_recorded(found)] if _RECORDED in found.contenders() else []
    short = spread([s.metrics["gateway_us_per_request"] for s in found.of("opta-lmx", _SHORT)])
    note = f"a short request costs the gateway {cell(short, 0)} µs of CPU"
    return [
        Table("The relay by itself: median (range)", columns, rows, [note]),
        *more,
        verdict_table(verdicts(samples)),
    ]


def _recorded(found: Samples) -> Table:
    """What it costs that a client could come back, repetition by repetition."""
    rows = [
        (
            workload,
            cell(found.range(_PLAIN, workload, GATEWAY)),
            cell(found.range(_RECORDED, workload, GATEWAY)),
            cell(found.ratio(workload, GATEWAY, over=_PLAIN, of=_RECORDED), 2),
        )
        for workload in found.workloads()
        if workload != _SHORT
    ]
    columns = ("gateway µs/token", "unrecorded", "recorded", "ratio")
    return Table("A recorded stream beside an unrecorded one: median (range)", columns, rows)
