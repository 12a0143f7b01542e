"""The journal: numbered events, as many of the newest as there is room for."""

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from supervisor.journal import (
    KINDS,
    MAX_TEXT_CHARS,
    REFUSAL_INTERVAL_S,
    ConfigRefused,
    Journal,
    LoadRefused,
    ModelChanged,
    ModelEvicted,
    ServerStopping,
)
from supervisor.views import ReadinessView


def told(journal: Journal) -> list[dict[str, Any]]:
    return [
        msgspec.json.decode(journal.at(number).data) for number in range(journal.first, journal.end)
    ]


@given(count=st.integers(0, 30), room=st.integers(1, 10))
def test_the_newest_are_kept_under_their_numbers(count: int, room: int) -> None:
    journal = Journal(room)
    for number in range(count):
        journal.add(ModelEvicted(model=str(number)))
    assert (journal.first, journal.end) == (max(0, count - room), count)
    for number in range(journal.first, journal.end):
        assert journal.at(number).model == str(number)


def test_an_event_is_one_line_of_json_with_its_kind_and_time() -> None:
    journal = Journal()
    journal.add(LoadRefused(at=5.0, model="m", code="model_incomplete", message="two\nlines"))
    assert told(journal) == [
        {
            "event": "load_refused",
            "at": 5.0,
            "model": "m",
            "code": "model_incomplete",
            "message": "two\nlines",
        }
    ]
    assert b"\n" not in journal.at(0).data
    assert journal.at(0)[:2] == ("load_refused", "m")
    assert "load_refused" in KINDS


def test_long_texts_are_cut_and_half_characters_replaced() -> None:
    journal = Journal()
    readiness = ReadinessView(
        state="loading", reason="\udc80" + "x" * 5000, crash_count=1, updated_at=1.0
    )
    journal.add(
        ModelChanged(
            model="\ud800",
            was=None,
            readiness=readiness,
            reason="y" * 5000,
            generation=1,
            unloading=False,
        )
    )
    (event,) = told(journal)
    assert event["event"] == "model_changed"
    assert event["model"] == "?"
    assert event["reason"] == "y" * MAX_TEXT_CHARS
    assert event["readiness"]["reason"] == "?" + "x" * (MAX_TEXT_CHARS - 1)


def test_the_same_refusal_is_told_once_a_minute() -> None:
    journal = Journal()

    def refuse(at: float, model: str = "m", code: str = "insufficient_memory") -> None:
        journal.add(LoadRefused(at=at, model=model, code=code, message=f"at {at}"))

    refuse(0.0)
    refuse(1.0)
    refuse(2.0, model="other")
    refuse(3.0, code="model_incomplete")
    refuse(REFUSAL_INTERVAL_S - 0.1)
    refuse(REFUSAL_INTERVAL_S)
    assert [event["at"] for event in told(journal)] == [0.0, 2.0, 3.0, REFUSAL_INTERVAL_S]


def test_who_listens_is_woken_until_they_leave() -> None:
    journal = Journal()
    woken: list[str] = []

    def first() -> None:
        woken.append("first")

    def second() -> None:
        woken.append("second")

    journal.listen(first)
    journal.listen(second)
    journal.add(ConfigRefused(message="x"))
    assert sorted(woken) == ["first", "second"]
    journal.leave(first)
    journal.leave(first)
    journal.add(ConfigRefused(message="x"))
    assert sorted(woken) == ["first", "second", "second"]


def test_the_stop_is_the_last_event() -> None:
    journal = Journal()
    journal.close()
    journal.close()
    journal.add(ConfigRefused(message="x"))
    assert journal.closed
    assert [event["event"] for event in told(journal)] == ["server_stopping"]
    assert ServerStopping.__struct_config__.tag == "server_stopping"


def test_two_starts_have_two_names() -> None:
    assert Journal().start_id != Journal().start_id
