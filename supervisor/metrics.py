"""Prometheus metrics of one server, in a registry of their own.

Labels stay bounded: ``model`` is the id of a tracked model or empty,
``endpoint`` a route template, ``code`` is ``ok``, a stable error code or
``client_disconnected``. What a model is doing right now is read from the fleet
at scrape time; nothing is counted per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from supervisor.views import ModelView

OK = "ok"
CLIENT_DISCONNECTED = "client_disconnected"

#: The text format that every Prometheus since 2014 reads.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_STATES = ("admitted", "loading", "canary_pending", "routable", "quarantined")
_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

ListModels = Callable[[], Sequence[ModelView]]


#: Clients counted by name; the others together.
MAX_CLIENTS = 100
_LONGEST_CLIENT = 64
ANONYMOUS = "anonymous"
OTHER_CLIENTS = "other"


class Metrics:
    """Counts events; ``render`` is the scrape."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._models = _ModelCollector()
        self._registry.register(self._models)
        self._requests = Counter(
            "opta_lmx_requests",
            "HTTP requests answered",
            ["model", "endpoint", "code"],
            registry=self._registry,
        )
        self._clients = Counter(
            "opta_lmx_client_requests",
            "Requests submitted to a model, by the name that their client gave itself",
            ["client"],
            registry=self._registry,
        )
        self._client_names: set[str] = set()
        self._prompt_tokens = Counter(
            "opta_lmx_prompt_tokens", "Tokens of prompts", ["model"], registry=self._registry
        )
        self._cached_tokens = Counter(
            "opta_lmx_cached_prompt_tokens",
            "Tokens of prompts that were in the KV cache and have not been computed",
            ["model"],
            registry=self._registry,
        )
        self._completion_tokens = Counter(
            "opta_lmx_completion_tokens", "Tokens generated", ["model"], registry=self._registry
        )
        self._first_token = Histogram(
            "opta_lmx_time_to_first_token_seconds",
            "From the request's arrival to the first text of a streamed answer",
            ["model"],
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self._start = Histogram(
            "opta_lmx_time_to_start_seconds",
            "From a request's submission until its prompt is in the KV cache: queue and prefill",
            ["model"],
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self._failures = Counter(
            "opta_lmx_worker_failures",
            "Counted failures of workers",
            ["model", "kind"],
            registry=self._registry,
        )
        self._restarts = Counter(
            "opta_lmx_worker_restarts", "Respawns of workers", ["model"], registry=self._registry
        )
        self._convictions = Counter(
            "opta_lmx_convictions",
            "Requests found to be to blame for a crash",
            ["model"],
            registry=self._registry,
        )
        self._resumed = Counter(
            "opta_lmx_resumed_answers",
            "Answers that went on after a crash of their model, by how they ended",
            ["model", "outcome"],
            registry=self._registry,
        )
        self._recordings = Gauge(
            "opta_lmx_recordings",
            "Streams that are kept for clients to come back to",
            registry=self._registry,
        )
        self._recordings_bytes = Gauge(
            "opta_lmx_recordings_bytes", "Memory of those streams", registry=self._registry
        )
        self._canaries = Counter(
            "opta_lmx_canary",
            "Canary runs by outcome",
            ["model", "outcome"],
            registry=self._registry,
        )

    def watch(self, models: ListModels) -> None:
        """Read the state of models from here at every scrape."""
        self._models.source = models

    def request_ended(self, model: str, endpoint: str, code: str) -> None:
        self._requests.labels(model, endpoint, code).inc()

    def client_request(self, name: str | None) -> None:
        """``name`` is what a client calls itself; past ``MAX_CLIENTS`` new names are one."""
        name = ANONYMOUS if name is None else name[:_LONGEST_CLIENT]
        if name not in self._client_names:
            if len(self._client_names) >= MAX_CLIENTS:
                name = OTHER_CLIENTS
            else:
                self._client_names.add(name)
        self._clients.labels(name).inc()

    def tokens(self, model: str, prompt: int, completion: int, cached: int) -> None:
        """``cached`` is the part of ``prompt`` that was in the KV cache."""
        self._prompt_tokens.labels(model).inc(prompt)
        self._completion_tokens.labels(model).inc(completion)
        self._cached_tokens.labels(model).inc(cached)

    def started(self, model: str, seconds: float) -> None:
        self._start.labels(model).observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        self._first_token.labels(model).observe(seconds)

    def resumed(self, model: str, *, completed: bool) -> None:
        self._resumed.labels(model, "completed" if completed else "failed").inc()

    def worker_failed(self, model: str, kind: str) -> None:
        self._failures.labels(model, kind).inc()

    def worker_restarted(self, model: str) -> None:
        self._restarts.labels(model).inc()

    def convicted(self, model: str) -> None:
        self._convictions.labels(model).inc()

    def canary_ended(self, model: str, outcome: str) -> None:
        self._canaries.labels(model, outcome).inc()

    def totals(self) -> dict[str, int]:
        """What was counted since the start, of all models together."""
        return {
            "requests": _total(self._requests),
            "requests_ok": _total(self._requests, code=OK),
            "prompt_tokens": _total(self._prompt_tokens),
            "completion_tokens": _total(self._completion_tokens),
            "worker_failures": _total(self._failures),
            "worker_restarts": _total(self._restarts),
            "answers_resumed": _total(self._resumed, outcome="completed"),
            "requests_convicted": _total(self._convictions),
        }

    def watch_recordings(self, count: Callable[[], int], size: Callable[[], int]) -> None:
        """Tell, at every scrape, of the streams that are kept, and of their bytes."""
        self._recordings.set_function(count)
        self._recordings_bytes.set_function(size)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def value(self, name: str, labels: dict[str, str] | None = None) -> float | None:
        """One sample by its full name, None when it was never counted."""
        return self._registry.get_sample_value(name, labels or {})


def _total(counter: Counter, **labels: str) -> int:
    return round(
        sum(
            sample.value
            for metric in counter.collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and labels.items() <= sample.labels.items()
        )
    )


class _ModelCollector(Collector):
    """Gauges made of the fleet's views at the moment of the scrape."""

    source: ListModels | None = None

    def collect(self) -> Iterator[Metric]:
        in_flight = GaugeMetricFamily(
            "opta_lmx_in_flight", "Requests a worker is running", labels=["model"]
        )
        queued = GaugeMetricFamily(
            "opta_lmx_queued", "Requests waiting for a slot or a restart", labels=["model"]
        )
        memory = GaugeMetricFamily(
            "opta_lmx_worker_memory_bytes", "Memory of the model's worker", labels=["model"]
        )
        state = GaugeMetricFamily(
            "opta_lmx_model_state", "1 for the state a model is in", labels=["model", "state"]
        )
        for view in self.source() if self.source is not None else ():
            in_flight.add_metric([view.id], view.in_flight)
            queued.add_metric([view.id], view.queued)
            if view.memory_gb is not None:
                memory.add_metric([view.id], view.memory_gb * 1e9)
            for name in _STATES:
                state.add_metric([view.id, name], float(view.readiness.state == name))
        yield from (in_flight, queued, memory, state)
