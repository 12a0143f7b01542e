"""Who looks on while something breaks: the watcher of the victim, and the bystanders."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.chaos.harness.wire import ask_on, chat_body, connect, content_of, stream

#: How often the victim's state is asked for: the resolution of what is measured.
WATCH_INTERVAL_S = 0.005

#: The counting bystander's vocabulary: each token is its number.
COUNT = 2000
COUNTING_SCRIPT: dict[str, object] = {
    "tokens": [f"{n} " for n in range(COUNT)],
    "repeat": True,
    "step_delay_s": 0.01,
    "context_length": 100_000_000,
}

#: A greedy answer of a real bystander, small enough to be given many times.
GREEDY: dict[str, object] = {"temperature": 0, "max_tokens": 120, "ignore_eos": True}
GREEDY_PROMPT = "Tell me about the sea."
_BETWEEN_ANSWERS_S = 0.1


@dataclass(frozen=True)
class Sighting:
    """One answer of ``GET /admin/models/ID``; ``state`` is empty when it is not tracked.

    It was asked for at ``asked_at``, and there at ``at``.
    """

    at: float
    asked_at: float = 0.0
    state: str = ""
    generation: int = 0
    failures: int = 0
    pid: int | None = None
    memory_gb: float = 0.0
    in_flight: int = 0


class Watcher(threading.Thread):
    """Looks at one model all the time, as an impatient operator would."""

    def __init__(self, port: int, model_id: str) -> None:
        super().__init__(daemon=True)
        self._connection = connect(port, timeout_s=5.0)
        self._path = f"/admin/models/{model_id}"
        self._over = threading.Event()
        self.sightings: list[Sighting] = []
        #: Every worker there was, with the most memory it had.
        self.workers: dict[int, float] = {}
        self.start()

    def run(self) -> None:
        while not self._over.wait(WATCH_INTERVAL_S):
            asked_at = time.monotonic()
            try:
                status, view = ask_on(self._connection, "GET", self._path)
            except (OSError, http.client.HTTPException):
                self._connection.close()
                continue
            self._see(asked_at, view if status == 200 else None)

    def _see(self, asked_at: float, view: dict[str, Any] | None) -> None:
        now = time.monotonic()
        if view is None:
            self.sightings.append(Sighting(now, asked_at))
            return
        readiness = view["readiness"]
        seen = Sighting(
            at=now,
            asked_at=asked_at,
            state=readiness["state"],
            generation=view["generation"],
            failures=readiness["crash_count"],
            pid=view["pid"],
            memory_gb=view["memory_gb"] or 0.0,
            in_flight=view["in_flight"],
        )
        self.sightings.append(seen)
        if seen.pid is not None:
            self.workers[seen.pid] = max(self.workers.get(seen.pid, 0.0), seen.memory_gb)

    @property
    def last(self) -> Sighting:
        return self.sightings[-1] if self.sightings else Sighting(0.0)

    def first(
        self, wanted: Callable[[Sighting], bool], *, since: float = 0.0, timeout_s: float
    ) -> Sighting | None:
        """The first sighting since then that is wanted; waits for it. None: it never came."""
        deadline = time.monotonic() + timeout_s
        looked_at = 0
        while True:
            late = time.monotonic() >= deadline
            new = self.sightings[looked_at:]
            looked_at += len(new)
            for sighting in new:
                if sighting.at >= since and wanted(sighting):
                    return sighting
            if late:
                return None
            time.sleep(WATCH_INTERVAL_S)

    def last_asked_before(self, seen: Sighting) -> float:
        """When the sighting before this one was asked for; what it told was true then."""
        index = self.sightings.index(seen)
        return self.sightings[index - 1].asked_at if index else 0.0

    def stop(self) -> None:
        self._over.set()
        self.join(10)
        self._connection.close()


class Bystander(threading.Thread):
    """A client of a healthy model; ``gaps_s`` is how long it waited for each piece of text."""

    def __init__(self, port: int, model_id: str) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._model_id = model_id
        self._over = threading.Event()
        self._begun = threading.Event()
        self._waiting_since = time.monotonic()
        self.gaps_s: list[float] = []
        self.lost = 0
        self.trouble = ""
        self.start()

    def run(self) -> None:
        try:
            self.read()
        except (OSError, http.client.HTTPException) as error:
            self.trouble = f"its stream broke: {error!r}"
        finally:
            self._begun.set()

    def read(self) -> None:
        raise NotImplementedError

    def arrived(self) -> None:
        now = time.monotonic()
        if self._begun.is_set():
            self.gaps_s.append(now - self._waiting_since)
        self._waiting_since = now

    def begun(self) -> bool:
        """Wait for its first text."""
        return self._begun.wait(20) and not self.trouble

    def stop(self) -> None:
        """End it and count up. It gives up by itself when nothing comes any more."""
        self._over.set()
        self.join(60)
        if self.is_alive():
            self.trouble = "it waits for ever"


class CountingBystander(Bystander):
    """One endless stream of numbers: a lost or doubled token is a wrong number."""

    def read(self) -> None:
        text: list[str] = []
        with contextlib.closing(stream(self._port, chat_body(self._model_id, "Hi"))) as payloads:
            for payload in payloads:
                if '"error"' in payload or payload == "[DONE]":
                    self.trouble = f"its stream ended: {payload}"
                    break
                if piece := content_of(payload):
                    self.arrived()
                    self._begun.set()
                    text.append(piece)
                if self._over.is_set():
                    break
        numbers = [int(number) for number in "".join(text).split()]
        self.lost = sum(number != n % COUNT for n, number in enumerate(numbers))


class GreedyBystander(Bystander):
    """The same greedy answer again and again, each time the same text."""

    def __init__(self, port: int, model_id: str, expected: str) -> None:
        self._expected = expected
        super().__init__(port, model_id)

    def read(self) -> None:
        body = chat_body(self._model_id, GREEDY_PROMPT, **GREEDY)
        while not self._over.wait(_BETWEEN_ANSWERS_S):
            self._waiting_since = time.monotonic()
            text = ""
            for payload in stream(self._port, body):
                if '"error"' in payload:
                    self.trouble = f"it was refused: {payload}"
                    return
                if piece := content_of(payload):
                    self.arrived()
                    self._begun.set()
                    text += piece
            self.lost += text != self._expected
