"""What a newer backend version made worse, and what only looks like it."""

from typing import Any

import pytest

from supervisor.compatibility import Outcome, Record
from supervisor.regressions import FIRST_TOKEN_FLOOR_S, Regression, regressions

MODEL = "m"


def passed(version: str, **metadata: object) -> Record:
    measured: dict[str, object] = {
        "digest": "file",
        "canary": "count",
        "completion_tokens": 16,
        "output_digest": "one two three",
        "tokens_per_s": 100.0,
        "time_to_first_token_s": 0.2,
    }
    return _record("pass", version, "canary passed", {**measured, **metadata})


def failed(version: str, reason: str = "segfault", digest: str | None = "file") -> Record:
    return _record("fail", version, reason, {"digest": digest, "code": "model_crashed"})


def event(name: str, version: str) -> Record:
    return _record("fail", version, name, {"digest": "file", "event": name})


def _record(outcome: Outcome, version: str, reason: str, metadata: dict[str, Any]) -> Record:
    return Record(
        model=MODEL,
        backend="llama",
        backend_version=version,
        outcome=outcome,
        reason=reason,
        metadata=metadata,
        timestamp=0.0,
    )


def found(*records: Record, installed: str | None = None) -> list[Regression]:
    return regressions(records, {"llama": installed})


def kinds(*records: Record, installed: str | None = None) -> list[tuple[str, str, str]]:
    return [
        (r.kind, r.last_good_version, r.backend_version)
        for r in found(*records, installed=installed)
    ]


def test_passed_before_and_fails_now() -> None:
    (regression,) = found(passed("0.9"), passed("0.10"), failed("0.11"), installed="0.11")
    assert (regression.kind, regression.last_good_version) == ("fails", "0.10")
    assert regression.installed
    assert regression.reason == "passed on 0.10, fails on 0.11: segfault"
    assert regression.before.record.outcome == "pass"
    assert regression.after.record.reason == "segfault"


def test_a_version_is_no_worse_than_itself() -> None:
    assert found(passed("1"), failed("1")) == []
    assert found(failed("1"), failed("2")) == []
    assert found(passed("1"), failed("2"), passed("2")) == []
    assert found(failed("1"), passed("2")) == []


def test_versions_count_and_not_the_time() -> None:
    """The older version was tried again after the newer one."""
    assert kinds(failed("0.10"), passed("0.9")) == [("fails", "0.9", "0.10")]
    assert kinds(passed("0.10"), failed("0.9")) == []
    assert kinds(passed("nightly"), failed("0.9")) == [("fails", "nightly", "0.9")]


def test_a_version_that_ended_in_failure_was_not_good() -> None:
    assert kinds(passed("1"), passed("2"), failed("2"), failed("3")) == [("fails", "1", "3")]
    quarantined = [passed("1"), failed("1"), event("quarantine", "1"), event("release", "1")]
    assert kinds(*quarantined, failed("2")) == []


def test_a_release_does_not_make_it_good() -> None:
    records = [passed("1"), failed("2"), event("quarantine", "2"), event("release", "2")]
    assert kinds(*records) == [("fails", "1", "2")]


def test_another_file_is_not_compared() -> None:
    assert found(passed("1"), failed("2", digest="other")) == []
    assert found(passed("1"), failed("2", digest=None)) == []
    assert found(passed("1"), passed("2", digest="other", output_digest="x")) == []
    assert found(passed("1", digest=None), passed("2", digest=None, output_digest="x")) == []


def test_what_is_looked_at_is_the_version_in_use_and_later_ones() -> None:
    history = [passed("1"), failed("2"), passed("3"), failed("4")]
    assert kinds(*history, installed="3") == [("fails", "3", "4")]
    assert kinds(*history, installed="4") == [("fails", "3", "4")]
    assert kinds(*history, installed="2") == [("fails", "1", "2"), ("fails", "3", "4")]
    assert kinds(*history, installed="5") == [("fails", "3", "4")]
    assert not found(*history, installed="5")[0].installed


def test_another_output() -> None:
    (regression,) = found(passed("1"), passed("2", output_digest="changed"))
    assert regression.kind == "output_changed"
    assert regression.before.record.metadata["output_digest"] == "one two three"
    assert regression.after.record.metadata["output_digest"] == "changed"
    # The version in between gave the new output already; the one before it is named.
    assert kinds(
        passed("1"), passed("2", output_digest="changed"), passed("3", output_digest="changed")
    ) == [("output_changed", "1", "3")]


@pytest.mark.parametrize(
    "difference",
    [{"canary": "other"}, {"canary": None}, {"completion_tokens": 12}, {"output_digest": 7}],
)
def test_outputs_of_different_canaries_are_not_compared(difference: dict[str, object]) -> None:
    changed = {"output_digest": "changed", "tokens_per_s": 1.0, **difference}
    if "output_digest" in difference:
        changed["tokens_per_s"] = 100.0
    assert found(passed("1"), passed("2", **changed)) == []


def test_the_newest_canary_that_both_have_is_compared() -> None:
    strict = {"canary": "count further", "completion_tokens": 64, "output_digest": "longer"}
    records = [passed("1"), passed("2", output_digest="changed"), passed("2", **strict)]
    assert kinds(*records) == [("output_changed", "1", "2")]


def test_an_output_that_varies_proves_nothing() -> None:
    varying = [passed("1"), passed("1", output_digest="also")]
    assert found(*varying, passed("2", output_digest="changed")) == []
    assert found(passed("1"), passed("2"), passed("2", output_digest="changed")) == []


@pytest.mark.parametrize(
    ("times", "tokens_per_s", "slower"),
    [
        (3, 69.0, True),
        (3, 71.0, False),
        # One cold start after an upgrade is not much to go by.
        (1, 69.0, False),
        (1, 49.0, True),
        (2, 51.0, False),
    ],
)
def test_fewer_tokens_per_second(times: int, tokens_per_s: float, slower: bool) -> None:
    before = [passed("1")] * 3
    after = [passed("2", tokens_per_s=tokens_per_s)] * times
    assert bool(found(*before, *after)) is slower
    # The same when it is the earlier version of which little is known.
    assert bool(found(*before[:times], *[after[0]] * 3)) is slower


@pytest.mark.parametrize(
    ("times", "earlier_s", "later_s", "slower"),
    [
        (3, 0.2, 0.31, True),
        (3, 0.2, 0.29, False),
        (1, 0.2, 0.31, False),
        (1, 0.2, 0.41, True),
        (3, 0.01, 0.01 + FIRST_TOKEN_FLOOR_S * 0.9, False),
        (3, 0.01, 0.01 + FIRST_TOKEN_FLOOR_S * 1.1, True),
    ],
)
def test_a_later_first_token(times: int, earlier_s: float, later_s: float, slower: bool) -> None:
    before = [passed("1", time_to_first_token_s=earlier_s)] * 3
    after = [passed("2", time_to_first_token_s=later_s)] * times
    assert bool(found(*before, *after)) is slower


def test_medians_of_the_last_passes_are_compared() -> None:
    before = [passed("1", tokens_per_s=1000.0)] * 20 + [passed("1")] * 10
    assert found(*before, *[passed("2", tokens_per_s=90.0)] * 3) == []
    outlier = [passed("2", tokens_per_s=rate) for rate in (95.0, 1.0, 96.0)]
    assert found(*before, *outlier) == []
    (regression,) = found(*before, *[passed("2", tokens_per_s=60.0)] * 4)
    assert regression.kind == "slower"
    assert regression.reason == "60.0 tokens/s, was 100.0 on 1"
    assert (regression.before.tokens_per_s, regression.before.samples) == (100.0, 10)
    assert (regression.after.tokens_per_s, regression.after.samples) == (60.0, 4)


def test_slowness_that_creeps_in_is_seen_from_afar() -> None:
    steps = [
        passed(str(version), tokens_per_s=rate)
        for version, rate in enumerate((100.0, 80.0, 64.0))
        for _ in range(3)
    ]
    assert kinds(*steps) == [("slower", "0", "2")]


def test_each_way_of_being_worse_is_told() -> None:
    records = [passed("1"), passed("2", output_digest="x", tokens_per_s=1.0), failed("2")]
    assert kinds(*records) == [
        ("fails", "1", "2"),
        ("output_changed", "1", "2"),
        ("slower", "1", "2"),
    ]


@pytest.mark.parametrize("value", [None, "fast", 0, -5, True, 10**400, float("nan"), [1]])
def test_measurements_that_are_none_are_left_out(value: object) -> None:
    odd = passed("2", tokens_per_s=value, time_to_first_token_s=value)
    assert found(passed("1"), odd) == []


# --- failures in service ---


def served(version: str, passes: int, crashes: int) -> list[Record]:
    """So many runs, the last of them still in service, so many of which ended in a failure."""
    return [failed(version)] * crashes + [passed(version)] * passes


def test_a_version_that_passes_and_fails_in_service() -> None:
    """Each respawn's canary passes: it is allowed, and worse all the same."""
    before, after = served("1", passes=4, crashes=0), served("2", passes=6, crashes=5)
    (regression,) = found(*before, *after, installed="2")
    assert (regression.kind, regression.last_good_version) == ("crashes", "1")
    assert regression.reason == (
        "failed in service 5 times in 6 runs, was 0 in 4 on 1; the last time: segfault"
    )
    assert regression.after.record.reason == "segfault"
    assert regression.before.record.outcome == "pass"
    assert (regression.after.passes, regression.after.runtime_failures) == (6, 5)
    assert (regression.before.passes, regression.before.runtime_failures) == (4, 0)


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [
        # One quiet run of the earlier version, for weeks perhaps.
        ((1, 0), (4, 3), True),
        ((1, 0), (3, 2), False),
        ((1, 0), (30, 3), False),
        ((50, 0), (30, 3), True),
        # It was no better before.
        ((10, 5), (10, 9), False),
        ((10, 3), (10, 6), False),
        ((10, 3), (10, 7), True),
        ((10, 9), (4, 3), False),
    ],
)
def test_markedly_more_failures_in_service(
    before: tuple[int, int], after: tuple[int, int], worse: bool
) -> None:
    regressed = kinds(*served("1", *before), *served("2", *after))
    assert regressed == ([("crashes", "1", "2")] if worse else [])


def test_a_probe_is_no_time_in_service() -> None:
    """It passes, and nothing can befall it afterwards."""
    probes = [passed("2", probe=True)] * 20
    (regression,) = found(*served("1", 4, 0), *served("2", 4, 3), *probes)
    assert regression.kind == "crashes"
    assert (regression.after.passes, regression.after.runtime_failures) == (4, 3)
