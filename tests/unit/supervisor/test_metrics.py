"""What is counted, and that two servers in one process don't share it."""

from __future__ import annotations

from supervisor.metrics import Metrics
from tests.support.fake_fleet import view


def test_events_of_workers() -> None:
    metrics = Metrics()
    metrics.worker_failed("m", "signal")
    metrics.worker_failed("m", "signal")
    metrics.worker_restarted("m")
    metrics.canary_ended("m", "pass")
    labels = {"model": "m"}
    failures = metrics.value("opta_lmx_worker_failures_total", {**labels, "kind": "signal"})
    assert failures == 2
    assert metrics.value("opta_lmx_worker_restarts_total", labels) == 1
    assert metrics.value("opta_lmx_canary_total", {**labels, "outcome": "pass"}) == 1


def test_tokens_and_starts() -> None:
    metrics = Metrics()
    metrics.tokens("m", prompt=10, completion=3, cached=4)
    metrics.tokens("m", prompt=10, completion=3, cached=0)
    metrics.started("m", 0.2)
    labels = {"model": "m"}
    assert metrics.value("opta_lmx_prompt_tokens_total", labels) == 20
    assert metrics.value("opta_lmx_cached_prompt_tokens_total", labels) == 4
    assert metrics.value("opta_lmx_completion_tokens_total", labels) == 6
    assert metrics.value("opta_lmx_time_to_start_seconds_sum", labels) == 0.2


def test_registries_are_apart() -> None:
    one, other = Metrics(), Metrics()
    one.worker_restarted("m")
    assert other.value("opta_lmx_worker_restarts_total", {"model": "m"}) is None


def test_models_are_read_at_the_scrape() -> None:
    metrics = Metrics()
    assert b"opta_lmx_model_state" in metrics.render()
    views = [view("a", "loading", memory_gb=None)]
    metrics.watch(lambda: views)
    state = {"model": "a", "state": "loading"}
    assert metrics.value("opta_lmx_model_state", state) == 1
    assert metrics.value("opta_lmx_worker_memory_bytes", {"model": "a"}) is None
    views[0] = view("a", memory_gb=1.5)
    assert metrics.value("opta_lmx_model_state", state) == 0
    assert metrics.value("opta_lmx_worker_memory_bytes", {"model": "a"}) == 1.5e9


def test_a_hostile_id_does_not_break_the_format() -> None:
    metrics = Metrics()
    metrics.watch(lambda: [view('a"\n\\b')])
    assert b'model="a\\"\\n\\\\b"' in metrics.render()
