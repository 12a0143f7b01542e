"""Kills a model's worker again and again while clients stream from it, and counts what they lose.

    PYTHONPATH=. .venv/bin/python scripts/soak.py MODEL [--seconds 600] [--every 5] [--clients 8]

MODEL is a GGUF file, an MLX folder, or ``simulated``. The clients are those of the openai
library. Every answer is compared with what the model says alone and undisturbed; SIGKILL,
SIGSEGV and SIGSTOP take turns. A pause is the longest silence in one answer. How many answers
differ because they were computed in other company is what ``--every 0`` shows, which kills
nobody.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import openai

from tests.support.server import Server, serve, write_script

MODEL = "m"
QUESTIONS = [f"Tell me a story about the number {number}." for number in range(8)]
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP)
PHASES = ("DECODE", "PREFILL")
#: Nothing is quarantined, restarts come at once, and a stopped worker is found out soon.
SETTINGS = {
    "OPTA_LMX_FAILURE_THRESHOLD": "1000000",
    "OPTA_LMX_RESTART_DELAY_CAP_S": "0.05",
    # Who asks while the model restarts waits like those who asked before.
    "OPTA_LMX_LOAD_ON_DEMAND": "true",
    "OPTA_LMX_BEAT_INTERVAL_S": "0.2",
    "OPTA_LMX_WARM_SPARES": "1",
}


@dataclass
class Tally:
    """What the clients have seen; changed by one thread at a time."""

    same: int = 0
    different: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    pauses: list[float] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--every", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=60)
    parser.add_argument("--stall", type=float, default=2.0, help="seconds until a hang")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model
        if path == "simulated":
            tokens = [f"{number} " for number in range(200)]
            path = str(write_script(Path(folder), MODEL, tokens=tokens, step_delay_s=0.02))
        options = ("--enable-simulated", "--max-sequences", str(arguments.clients))
        stall = {f"OPTA_LMX_{phase}_STALL_S": str(arguments.stall) for phase in PHASES}
        with serve(Path(folder) / "home", *options, **SETTINGS, **stall) as server:
            server.load(MODEL, path=path).raise_for_status()
            soak(server, arguments)


def soak(server: Server, arguments: argparse.Namespace) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
    expected = {
        question: answer(client, question, arguments.max_tokens)[0] for question in QUESTIONS
    }
    tally, over = Tally(), threading.Event()

    def ask(number: int) -> None:
        for turn in itertools.count(number):
            if over.is_set():
                return
            question = QUESTIONS[turn % len(QUESTIONS)]
            try:
                text, pause = answer(client, question, arguments.max_tokens)
            except openai.OpenAIError as error:
                with tally.lock:
                    tally.errors[f"{type(error).__name__}: {error}"[:120]] += 1
                continue
            with tally.lock:
                tally.same += text == expected[question]
                tally.different += text != expected[question]
                tally.pauses.append(pause)

    def kill() -> None:
        for number in itertools.cycle(SIGNALS if arguments.every else ()):
            if over.wait(arguments.every):
                return
            view = server.model(MODEL)
            if view["pid"] is not None and view["readiness"]["state"] == "routable":
                os.kill(view["pid"], number)
                tally.kills[number.name] += 1

    with ThreadPoolExecutor(arguments.clients + 1) as pool:
        jobs = [pool.submit(ask, number) for number in range(arguments.clients)]
        jobs.append(pool.submit(kill))
        time.sleep(arguments.seconds)
        over.set()
        for job in jobs:
            job.result()
    report(tally)


def answer(client: openai.OpenAI, question: str, max_tokens: int) -> tuple[str, float]:
    """The text of a greedy answer, and the longest silence in it in seconds."""
    text, longest, before = "", 0.0, time.monotonic()
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        now = time.monotonic()
        longest, before = max(longest, now - before), now
        text += chunk.choices[0].delta.content or ""
    return text, longest


def report(tally: Tally) -> None:
    done = tally.same + tally.different
    print(f"kills      {sum(tally.kills.values())} {dict(tally.kills)}")
    print(f"answers    {done}: {tally.same} as undisturbed, {tally.different} different")
    print(f"errors     {sum(tally.errors.values())} {dict(tally.errors)}")
    hit = sorted(pause for pause in tally.pauses if pause > 0.25)
    if len(hit) > 1:
        p95 = statistics.quantiles(hit, n=20)[-1]
        print(
            f"pauses     {len(hit)} longer than 0.25 s: p50 {statistics.median(hit):.2f}, "
            f"p95 {p95:.2f}, longest {hit[-1]:.2f} s"
        )


if __name__ == "__main__":
    main()
