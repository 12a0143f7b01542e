"""Following a server's events from outside, over its restarts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import pytest

from supervisor.client import Client, ClientError, NoServer
from supervisor.journal import KINDS, DownloadChanged, Happening, IncidentOpened, ModelChanged
from supervisor.views import ReadinessView
from supervisor.watching import Told, events, line, watch


def block(kind: str, event_id: str = "", **value: object) -> list[str]:
    data = json.dumps({"event": kind, "at": 0.0, "model": None, **value})
    return [*([f"id: {event_id}"] if event_id else []), f"event: {kind}", f"data: {data}", ""]


class FakeClient(Client):
    """Answers each connection with what comes next: lines, or an error at their end."""

    def __init__(self, *answers: list[str] | ClientError) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[str, Mapping[str, str]]] = []

    def admin_lines(self, path: str, headers: Mapping[str, str]) -> Iterator[str]:
        self.asked.append((path, headers))
        if not self._answers:
            raise KeyboardInterrupt
        answer = self._answers.pop(0)
        if isinstance(answer, ClientError):
            raise answer
        yield from answer


def watched(
    client: FakeClient, query: Mapping[str, Any] | None = None, **options: Any
) -> tuple[list[str], list[str], list[float]]:
    """The ids that are told, what is said, and the waits, until nothing is left to answer."""
    told: list[str] = []
    said: list[str] = []
    waits: list[float] = []

    def follow() -> None:
        for each in watch(client, query or {}, said.append, sleep=waits.append, **options):
            told.append(each.id)

    with pytest.raises(KeyboardInterrupt):
        follow()
    return told, said, waits


HELLO = block("hello", "s-4", missing=None, first="s-0", start_id="s")


def test_comments_and_unknown_fields_are_no_events() -> None:
    lines = [": resumed", "", "retry: 5", "", "id: s-1", ": alive", "event: a", 'data: {"x":1}', ""]
    assert list(events(lines)) == [Told("s-1", "a", {"x": 1})]
    # What breaks off is none either.
    assert list(events(["event: a", 'data: {"x":1}'])) == []


def test_it_goes_on_after_the_last_event_when_the_server_is_back() -> None:
    gone, breaks = NoServer("no server"), ClientError("broken")
    client = FakeClient(
        [*HELLO, *block("a", "s-5")],
        gone,
        gone,
        [*block("hello", "s-5", missing=None, first="s-0", start_id="s"), *block("b", "s-6")],
        breaks,
        [*block("hello", missing="restarted", first="t-0", start_id="t"), *block("c", "t-0")],
    )
    told, said, waits = watched(client, {"model": "m", "kind": ["a", "b"]})
    assert told == ["s-5", "s-6", "t-0"]
    assert [headers.get("last-event-id") for _, headers in client.asked] == [
        *(None, "s-5", "s-5", "s-5", "s-6", "s-6", "t-0"),
    ]
    assert client.asked[0][0] == "/admin/events?model=m&kind=a&kind=b"
    assert waits == [0.5, 1.0, 2.0, 0.5, 1.0, 0.5]
    assert [text for text in said if "anew" in text] == [said[2]]
    assert sum("waiting for the server" in text for text in said) == 3


def test_an_id_to_go_on_from_is_known_before_the_first_event() -> None:
    client = FakeClient(HELLO)
    assert watched(client)[0] == []
    assert client.asked[1][1] == {"last-event-id": "s-4"}


def test_what_is_missing_is_said_but_not_of_what_was_before_us() -> None:
    gone = block("hello", "s-9", missing="gone", first="s-10", start_id="s")
    client = FakeClient(gone, gone)
    _, said, _ = watched(client, history=True)
    assert client.asked[0][0] == "/admin/events?from=0"
    assert [text for text in said if "missing" in text] == [
        "some events are missing: they are not kept any more"
    ]


def test_a_refusal_is_not_tried_again() -> None:
    client = FakeClient(ClientError("wrong key", "invalid_admin_key"))
    with pytest.raises(ClientError, match="wrong key"):
        list(watch(client, {}, print))
    client = FakeClient(HELLO, ClientError("wrong key", "invalid_admin_key"))
    with pytest.raises(ClientError, match="wrong key"):
        list(watch(client, {}, lambda _: None, sleep=lambda _: None))
    # A server that is not there at first is told at once, as by every command.
    with pytest.raises(NoServer):
        list(watch(FakeClient(NoServer("no server")), {}, print))


def test_without_following_it_ends() -> None:
    client = FakeClient([*HELLO, *block("a", "s-5")])
    told = list(watch(client, {}, print, history=True, follow=False))
    assert [each.kind for each in told] == ["a"]
    assert client.asked[0][0] == "/admin/events?follow=false&from=0"


def as_line(event: Happening) -> str:
    value = msgspec.json.decode(msgspec.json.encode(event))
    return line(Told("s-1", value["event"], value))[len("1970-01-01 00:00:00 ") :]


def test_events_read_like_sentences() -> None:
    readiness = ReadinessView(state="loading", reason="signal 9", crash_count=2, updated_at=0.0)
    changed = ModelChanged(
        at=0.0,
        model="org/m",
        was="routable",
        readiness=readiness,
        reason="signal 9",
        generation=3,
        unloading=False,
    )
    assert as_line(changed) == (
        "org/m: routable -> loading (signal 9; generation 3; 2 failures in the window)"
    )
    gone = msgspec.structs.replace(changed, readiness=None, reason="unloading")
    assert as_line(gone) == "org/m: routable -> untracked (unloading; generation 3)"
    incident = IncidentOpened(
        at=0.0,
        model="org/m",
        incident_id="i-1",
        kind="signal",
        phase="decode",
        code="model_crashed",
        reason="killed by SIGSEGV",
        generation=3,
        quarantined=True,
        crash_count=3,
    )
    assert as_line(incident) == (
        "org/m: incident i-1: signal in decode, quarantined: killed by SIGSEGV"
    )
    failed = DownloadChanged(
        at=0.0,
        model="org/m",
        download_id="dl-1",
        status="failed",
        downloaded_bytes=1,
        total_bytes=2,
        code="download_failed",
        message="cut",
    )
    assert as_line(failed) == "org/m: download failed, 1 of 2 bytes: cut (download_failed)"


def test_every_kind_of_event_can_be_told() -> None:
    """Also by a later server, with fields that are not known here."""
    seen = set()
    plain = {"str": "x", "int": 1, "float": 1.0, "bool": False, "list[str]": ["x"]}
    for kind in Happening.__args__:
        fields = {name: plain.get(each) for name, each in kind.__annotations__.items()}
        fields |= {"made_room_for": "x"} if "made_room_for" in fields else {}
        event = kind(model="m", **fields)
        told = as_line(event)
        assert told.startswith("m: ")
        seen.add(kind.__struct_config__.tag)
    assert seen == set(KINDS)
    assert line(Told("", "new_kind", {"event": "new_kind", "at": 0.0, "model": None, "x": 1})) == (
        line(Told("", "new_kind", {"event": "new_kind", "at": 0.0, "x": 1}))
    )
