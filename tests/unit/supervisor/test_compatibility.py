"""Verdicts over registry records: the latest outcome decides, quarantines hold."""

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.admission import BACKENDS_BY_FORMAT, choose_backend
from supervisor.compatibility import (
    Outcome,
    Recommendation,
    Record,
    failing,
    in_order,
    recommendations,
    standing,
)
from supervisor.regressions import regressions

_ticks = count(1)


def record(
    outcome: Outcome = "pass",
    version: str = "1.0",
    *,
    model: str = "m",
    backend: str = "llama",
    digest: object = "d",
    reason: str = "",
    **metadata: object,
) -> Record:
    return Record(
        model=model,
        backend=backend,
        backend_version=version,
        outcome=outcome,
        reason=reason or outcome,
        metadata={"digest": digest, **metadata},
        timestamp=float(next(_ticks)),
    )


def event(name: str, version: str = "1.0", **more: str) -> Record:
    return record("fail", version, event=name, reason=more.pop("reason", name), **more)


def only(records: list[Record], installed: str | None = "1.0") -> Recommendation:
    (found,) = recommendations(records, {"llama": installed})
    return found


def verdicts(records: list[Record], installed: str | None = "1.0") -> dict[str, str]:
    found = recommendations(records, {"llama": installed})
    return {recommendation.backend_version: recommendation.verdict for recommendation in found}


def test_the_latest_outcome_decides() -> None:
    assert only([record("fail"), record("pass")]).verdict == "allow"
    denied = only([record("pass"), record("fail", reason="segfault", code="model_crashed")])
    assert (denied.verdict, denied.reason, denied.code) == ("deny", "segfault", "model_crashed")
    assert denied.evidence.latest is not None
    assert denied.evidence.latest.reason == "segfault"
    assert (denied.evidence.passes, denied.evidence.failures) == (1, 1)
    assert denied.evidence.last_good_version is None


def test_a_pass_on_probation_does_not_end_a_quarantine() -> None:
    records = [record("fail"), event("quarantine", reason="quarantined: hang"), record("pass")]
    denied = only(records)
    assert (denied.verdict, denied.reason) == ("deny", "quarantined: hang")
    assert only([*records, event("release")]).verdict == "allow"


@pytest.mark.parametrize("order", [("fail", "quarantine"), ("quarantine", "fail")])
def test_a_release_proves_nothing(order: tuple[str, str]) -> None:
    """In whichever order the last failure and the quarantine it caused were written."""
    steps = [record("fail") if name == "fail" else event(name) for name in order]
    assert only(steps).verdict == "deny"
    released = only([record("pass"), *steps, event("release", reason="released by the operator")])
    assert released.verdict == "unproven"
    assert released.reason == "released by the operator; the next canary decides"
    assert (released.evidence.passes, released.evidence.failures) == (1, 1)
    assert only([*steps, event("release"), record("pass")]).verdict == "allow"
    assert only([*steps, event("release"), record("fail")]).verdict == "deny"


def test_an_upgrade_is_unproven_until_its_canary() -> None:
    found = recommendations([record(version="0.9")], {"llama": "0.10"})
    assert [(r.backend_version, r.verdict, r.installed) for r in found] == [
        ("0.9", "allow", False),
        ("0.10", "unproven", True),
    ]
    assert found[1].reason == "was proven on llama 0.9; the next canary decides"
    assert found[1].evidence.latest is None
    assert found[1].evidence.last_good_version == "0.9"
    assert verdicts([record(version="0.9"), record("fail", "0.10")], "0.10") == {
        "0.9": "allow",
        "0.10": "deny",
    }


def test_what_never_passed_is_not_said_to_be_proven() -> None:
    found = recommendations([record("fail", "0.9")], {"llama": "0.10"})
    assert (found[1].verdict, found[1].reason) == (
        "unproven",
        "never proven; the next canary decides",
    )


def test_a_backend_that_is_gone_adds_nothing() -> None:
    assert verdicts([record(version="0.9")], installed=None) == {"0.9": "allow"}


def test_the_last_good_version_is_the_one_to_go_back_to() -> None:
    records = [
        record(version="0.8"),
        record(version="0.9"),
        record("fail", "0.10"),
        record(version="0.11"),
    ]
    found = {r.backend_version: r for r in recommendations(records, {"llama": "0.10"})}
    assert found["0.10"].evidence.last_good_version == "0.9"
    assert found["0.11"].evidence.last_good_version == "0.11"


def test_another_file_is_another_matter() -> None:
    quarantined = [record("fail", digest="old"), event("quarantine", digest="old")]
    assert only([*quarantined, record(digest="new")]).verdict == "allow"
    # That of the old file may be cleared away later.
    assert only([*quarantined, record(digest="new"), event("release", digest="old")]).verdict == (
        "allow"
    )
    assert only([record(digest="old"), record("fail", digest="new")]).evidence.passes == 0


def test_the_newest_file_is_the_same_for_all_versions() -> None:
    """What an earlier version did with another file says nothing about this one."""
    records = [record(version="0.9", digest="old"), record("fail", "0.10", digest="new")]
    earlier, later = recommendations(records, {"llama": "0.10"})
    assert (earlier.backend_version, earlier.verdict) == ("0.9", "unproven")
    assert earlier.evidence.passes == 0
    assert later.verdict == "deny"
    assert later.evidence.last_good_version is None
    again = [*records, record(version="0.9", digest="new")]
    assert verdicts(again, "0.10") == {"0.9": "allow", "0.10": "deny"}
    # A pass of the old file once more makes it the newest.
    assert verdicts([*again, record(version="0.9", digest="old")], "0.10") == {
        "0.9": "allow",
        "0.10": "unproven",
    }


def test_failures_in_service_are_counted_apart() -> None:
    crashed = record("fail", code="model_crashed")
    found = only([record(), crashed, record(), record("fail", code="model_loader_crashed")])
    assert (found.evidence.failures, found.evidence.runtime_failures) == (2, 1)
    # A pass after the respawn allows it again, and does not hide them.
    found = only([record(), crashed, record()])
    assert (found.verdict, found.evidence.runtime_failures) == ("allow", 1)


def test_a_refusal_that_names_no_file_is_about_all() -> None:
    assert only([record(), record("fail", digest=None, code="blocked")]).verdict == "deny"


def test_events_of_a_later_version_change_nothing() -> None:
    allowed = only([record(), event("moved")])
    assert (allowed.verdict, allowed.evidence.failures) == ("allow", 0)


@pytest.mark.parametrize(
    ("given_order", "expected"),
    [
        (["0.10", "0.9", "0.9.1"], ["0.9", "0.9.1", "0.10"]),
        (["0.32.2+mlx0.32.4", "0.32.2+mlx0.31.0"], ["0.32.2+mlx0.31.0", "0.32.2+mlx0.32.4"]),
        (["1.0", "1.0rc1", "1.0.dev3"], ["1.0.dev3", "1.0rc1", "1.0"]),
        (["0.10", "nightly", "0.9"], ["0.10", "nightly", "0.9"]),
        (["1.0", "1"], ["1.0", "1"]),
        (["0.10", "", "0.9"], ["", "0.9", "0.10"]),
        (["9" * 5000, "1"], ["9" * 5000, "1"]),
        ([], []),
    ],
)
def test_versions_in_order(given_order: list[str], expected: list[str]) -> None:
    assert in_order(given_order) == expected


# --- choosing a backend ---

INSTALLED = {"first": "1", "second": "2", "third": None}


@pytest.fixture
def _three_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS_BY_FORMAT, "any", ("first", "second", "third"))


def choose(records: list[Record], requested: str | None = None, digest: str = "d") -> str:
    avoided = failing(records, model="m", digest=digest, installed=INSTALLED)
    return choose_backend("any", requested, INSTALLED, avoided)


@pytest.mark.usefixtures("_three_backends")
def test_a_backend_that_fails_is_not_picked_first() -> None:
    failed = record("fail", "1", backend="first")
    assert choose([]) == "first"
    assert choose([failed]) == "second"
    assert choose([failed], requested="first") == "first"
    assert choose([failed, record("fail", "2", backend="second")]) == "first"
    assert choose([failed, record("pass", "1", backend="first")]) == "first"
    assert choose([failed, event("release", "1", backend="first")]) == "first"


@pytest.mark.usefixtures("_three_backends")
def test_only_failures_of_this_file_and_version_count() -> None:
    assert choose([record("fail", "0.9", backend="first")]) == "first"
    assert choose([record("fail", "1", backend="first", model="other")]) == "first"
    assert choose([record("fail", "1", backend="first", digest="old")]) == "first"
    assert choose([record("fail", "1", backend="first", digest=None)]) == "second"


# --- properties ---

names = st.sampled_from(["a", "b"])
versions = st.sampled_from(["1.0", "1.10", "1.9", "nightly", "", "9" * 5000, "1!2.0+x", "٣"])
anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**400),
    st.floats(allow_nan=True),
    st.sampled_from(["d", "e", "", "quarantine", "release", "other"]),
    st.text(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(), st.integers(), max_size=2),
)
metadata = st.dictionaries(
    st.sampled_from(
        [
            "event",
            "digest",
            "code",
            "canary",
            "completion_tokens",
            "output_digest",
            "tokens_per_s",
            "time_to_first_token_s",
        ]
    ),
    anything,
)
records_from_disk = st.lists(
    st.builds(
        Record,
        model=names,
        backend=names,
        backend_version=versions,
        outcome=st.sampled_from(["pass", "fail"]),
        reason=st.text(),
        metadata=metadata,
        timestamp=st.sampled_from([1.0, 2.0]),
    ),
    max_size=12,
)
installed_backends = st.dictionaries(names, st.none() | versions)


@given(records_from_disk, installed_backends)
def test_whatever_is_on_disk_has_an_answer(
    records: list[Record], installed: dict[str, str | None]
) -> None:
    found = recommendations(records, installed)
    keys = [(r.model, r.backend, r.backend_version) for r in found]
    assert len(keys) == len(set(keys))
    assert {(r.model, r.backend, r.backend_version) for r in records} <= set(keys)
    regressions(records, installed)
    failing(records, model="a", digest="d", installed=installed)


@given(st.data(), records_from_disk, installed_backends)
def test_other_models_and_equal_timestamps_do_not_matter(
    data: st.DataObject, records: list[Record], installed: dict[str, str | None]
) -> None:
    """However the records of several models and backends came in between each other."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for one in records:
        groups.setdefault((one.model, one.backend), []).append(one)
    order = data.draw(st.permutations([(r.model, r.backend) for r in records]))
    shuffled = [groups[key].pop(0) for key in order]
    assert recommendations(shuffled, installed) == recommendations(records, installed)
    assert regressions(shuffled, installed) == regressions(records, installed)


@given(st.lists(st.sampled_from(["pass", "fail", "quarantine", "release"])))
def test_the_latest_decides_and_a_quarantine_holds_until_released(steps: list[str]) -> None:
    history = [
        event(step) if step in ("quarantine", "release") else record(step)  # type: ignore[arg-type]
        for step in steps
    ]
    found = standing(history)
    assert len(found.passes) == steps.count("pass")
    assert found.failures == steps.count("fail")
    marks = [step for step in steps if step in ("quarantine", "release")]
    if marks and marks[-1] == "quarantine":
        assert found.verdict == "deny"
    elif not steps:
        assert found.verdict == "unproven"
    elif steps[-1] == "pass":
        assert found.verdict == "allow"
    elif steps[-1] == "fail":
        assert found.verdict == "deny"
    else:
        assert found.verdict != "deny"
