"""``opta-lmx events``: follows a server's events, over its restarts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlencode

from supervisor.client import Client, ClientError

#: Between two tries to reach a server that is gone.
RETRY_S = (0.5, 1.0, 2.0, 5.0)

#: What a stream tells of itself.
HELLO, ERROR = "hello", "error"


class Told(NamedTuple):
    """One event; ``id`` is empty if it has none."""

    id: str
    kind: str
    value: dict[str, Any]


def events(lines: Iterable[str]) -> Iterator[Told]:
    """The events of a stream, without its comments."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if line and name:
            fields[name] = value.removeprefix(" ")
        elif not line and "data" in fields:
            kind = fields.get("event", "message")
            yield Told(fields.get("id", ""), kind, json.loads(fields["data"]))
            fields = {}


def watch(
    client: Client,
    query: Mapping[str, Any],
    say: Callable[[str], None],
    *,
    history: bool = False,
    follow: bool = True,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Told]:
    """The events that there are to come, with ``history`` first those there have been.

    Goes on when the server is back, after the last event that was seen; ``say`` is told what
    is missing. Raises ``ClientError``: it cannot be reached at first, or refuses.
    """
    last, tries = "", 0
    reached = False
    while True:
        asked = dict(query) | ({} if follow else {"follow": "false"})
        if history and not last:
            asked["from"] = "0"
        path = f"/admin/events?{urlencode(asked, doseq=True)}"
        headers = {"last-event-id": last} if last else {}
        try:
            for told in events(client.admin_lines(path, headers)):
                reached, tries = True, 0
                last = told.id or last
                if told.kind == HELLO:
                    _say_what_is_missing(told.value, say, first=history and not headers)
                elif told.kind == ERROR:
                    say(told.value["error"]["message"])
                else:
                    yield told
        except ClientError as error:
            # An answer with a code is the server's own, unless it is on its way out or full.
            if not reached or error.code not in (
                None,
                "server_shutting_down",
                "rate_limit_exceeded",
            ):
                raise
        if not follow:
            return
        if not tries:
            say("the connection has ended; waiting for the server")
        sleep(RETRY_S[min(tries, len(RETRY_S) - 1)])
        tries += 1


def _say_what_is_missing(hello: Mapping[str, Any], say: Callable[[str], None], first: bool) -> None:
    if hello["missing"] == "restarted":
        say("the server has been started anew: what happened at the end of its last run is missing")
    elif hello["missing"] == "gone" and not first:
        say("some events are missing: they are not kept any more")


def line(told: Told) -> str:
    """An event for a person."""
    value = told.value
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value["at"]))
    about = "" if value.get("model") is None else f" {value['model']}:"
    describe = _WORDS.get(told.kind, _plainly)
    return f"{at}{about} {describe(value)}"


def _model_changed(value: Mapping[str, Any]) -> str:
    readiness, was = value["readiness"], value["was"] or "untracked"
    state = "untracked" if readiness is None else readiness["state"]
    if value["unloading"] and readiness is not None:
        state = f"{state}, unloading"
    change = state if state == was else f"{was} -> {state}"
    notes = [f"generation {value['generation']}"] if value["generation"] else []
    if readiness is not None and readiness["crash_count"]:
        notes.append(f"{readiness['crash_count']} failures in the window")
    if readiness is not None and readiness["probation"]:
        notes.append("on probation")
    return f"{change} ({'; '.join([value['reason'], *notes])})"


def _incident(value: Mapping[str, Any]) -> str:
    after = ", quarantined" if value["quarantined"] else ""
    what = f"{value['kind']} in {value['phase']}{after}: {value['reason']}"
    return f"incident {value['incident_id']}: {what}"


def _download(value: Mapping[str, Any]) -> str:
    done, total = value["downloaded_bytes"], value["total_bytes"]
    failure = "" if value["code"] is None else f": {value['message']} ({value['code']})"
    return f"download {value['status']}, {done} of {total} bytes{failure}"


def _evicted(value: Mapping[str, Any]) -> str:
    if value["made_room_for"] is not None:
        return f"unloaded to make room for {value['made_room_for']}"
    return f"unloaded, as it was idle for {value['idle_s']:.0f} s"


def _reloaded(value: Mapping[str, Any]) -> str:
    later = value["needs_restart"]
    after = f"; after a restart: {', '.join(later)}" if later else ""
    return f"configuration reloaded; changed: {', '.join(value['changed']) or 'nothing'}{after}"


def _spare(value: Mapping[str, Any]) -> str:
    why = f": {value['reason']}" if value["reason"] else ""
    return f"spare worker {value['pid']} ({value['backend']}) {value['status']}{why}"


def _plainly(value: Mapping[str, Any]) -> str:
    rest = {name: each for name, each in value.items() if name not in ("event", "at", "model")}
    told = " ".join(f"{name}={json.dumps(each)}" for name, each in rest.items())
    return f"{value['event']} {told}".rstrip()


_WORDS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "server_started": lambda value: f"server {value['version']} started, pid {value['pid']}",
    "server_stopping": lambda _: "server stopping",
    "model_changed": _model_changed,
    "worker_restarting": lambda value: (
        f"worker of generation {value['generation']} is gone, "
        f"the next one comes in {value['delay_s']:g} s"
    ),
    "incident_opened": _incident,
    "request_convicted": lambda value: (
        f"request {value['fingerprint']} is refused from now on (incident {value['incident_id']})"
    ),
    "load_refused": lambda value: f"load refused: {value['message']} ({value['code']})",
    "model_evicted": _evicted,
    "download_changed": _download,
    "config_reloaded": _reloaded,
    "config_refused": lambda value: f"configuration not reloaded: {value['message']}",
    "spare_changed": _spare,
}
