"""Incident records: kept, bounded, and silent about what requests say."""

import errno
import json
import platform
from pathlib import Path

import msgspec
import pytest

from protocol.chat import ChatMessage
from protocol.messages import PROTOCOL_VERSION, Generate, Phase, Priority, Sampling
from supervisor import incidents as incidents_module
from supervisor.casefile import CaseFile
from supervisor.incidents import Fingerprints, Incident, IncidentStore, stacks_in

STACKS = """Fatal Python error: Segmentation fault

Current thread 0x00007f (most recent call first):
  File "worker/engine.py", line 80 in step
"""


def case(model: str = "m") -> CaseFile:
    return CaseFile(model=model, generation=2, backend="llama", backend_version="0.3.36")


def opened(file: CaseFile, output: str = "") -> Incident:
    return file.open(
        phase=Phase.DECODE,
        kind="signal",
        code="model_crashed",
        reason="killed by SIGSEGV",
        quarantined=False,
        crash_count=1,
        output=output,
        in_flight=["f1"],
    )


def test_an_incident_tells_what_was_noted() -> None:
    file = case()
    file.note("loaded")
    file.sample(100)
    file.sample(200)
    incident = opened(file, "some words\n" + STACKS)
    assert [moment.what for moment in incident.timeline] == [
        "spawned",
        "loaded",
        "failed: killed by SIGSEGV",
    ]
    assert [sample.bytes for sample in incident.memory] == [100, 200]
    assert incident.stacks == STACKS
    assert (incident.phase, incident.kind, incident.in_flight) == ("decode", "signal", ["f1"])


def test_it_is_completed_when_the_process_is_gone() -> None:
    file = case()
    first = opened(file)
    last = file.close(-11, "late words\n" + STACKS)
    assert last is not None
    assert (last.id, last.exit_status, last.signal) == (first.id, -11, "SIGSEGV")
    assert last.stacks == STACKS
    assert last.timeline[-1].what == "exited with status -11"


def test_a_generation_that_did_not_fail_leaves_none() -> None:
    assert case().close(0, "") is None


def test_output_without_stacks_has_none() -> None:
    assert stacks_in("just words\nThread of thought 0x\n") == ""


@pytest.mark.parametrize("said", ["", "loading 40% ", "words\nmore", "\x00\ufffd"])
def test_stacks_are_found_behind_whatever_was_being_written(said: str) -> None:
    assert stacks_in(said + STACKS) == STACKS
    dumped = "Thread 0x00007f [worker] (most recent call first):\n  File ..."
    assert stacks_in(said + dumped) == dumped


def test_an_incident_names_the_versions_of_what_ran() -> None:
    incident = opened(case())
    assert incident.python_version == platform.python_version()
    assert incident.protocol_version == PROTOCOL_VERSION
    assert platform.machine() in incident.platform


async def test_records_survive_a_restart_newest_first(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path)
    first, second, other = opened(case()), opened(case()), opened(case("other"))
    for incident in (first, second, other):
        store.put(incident)
    await store.flush()
    again = IncidentStore(tmp_path)
    assert {i.id for i in again.list()} == {first.id, second.id, other.id}
    assert {i.id for i in again.list(model="m")} == {first.id, second.id}
    assert again.get(first.id) == first
    assert again.get("nothing") is None


async def test_those_of_one_second_keep_their_order(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path)
    for number in (3, 1, 0, 2):
        # As made within one second: the later, the smaller the random part.
        name = f"20260101T000000Z-0000000{9 - number}"
        incident = msgspec.structs.replace(opened(case()), id=name, timestamp=100 + number / 10)
        store.put(incident)
    await store.flush()
    times = [incident.timestamp for incident in IncidentStore(tmp_path).list()]
    assert times == [100.3, 100.2, 100.1, 100.0]


async def test_records_of_before_have_no_versions(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path)
    store.put(opened(case()))
    await store.flush()
    (path,) = (tmp_path / "incidents").iterdir()
    older = json.loads(path.read_bytes())
    for name in ("python_version", "platform", "protocol_version"):
        del older[name]
    path.write_text(json.dumps(older))
    (incident,) = IncidentStore(tmp_path).list()
    assert incident.python_version == ""


async def test_the_complete_version_is_the_one_on_disk(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path)
    ids = []
    for _ in range(30):
        file = case()
        ids.append(opened(file).id)
        store.put(file._incident)  # type: ignore[arg-type]
        last = file.close(-9, "")
        assert last is not None
        store.put(last)
    await store.flush()
    again = IncidentStore(tmp_path)
    assert all(again.get(i).exit_status == -9 for i in ids)  # type: ignore[union-attr]


async def test_the_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incidents_module, "MAX_INCIDENTS", 3)
    store = IncidentStore(tmp_path)
    made = [opened(case()) for _ in range(6)]
    for incident in made:
        store.put(incident)
        await store.flush()
    assert [i.id for i in store.list()] == [i.id for i in reversed(made[3:])]
    assert len(list((tmp_path / "incidents").iterdir())) == 3


async def test_what_could_not_be_written_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = IncidentStore(tmp_path)
    first, second = opened(case()), opened(case())
    with monkeypatch.context() as disk:

        def full(*_: object) -> None:
            raise OSError("no space left on device")

        disk.setattr("supervisor.jsonfile.write", full)
        store.put(first)
        await store.flush()
    assert IncidentStore(tmp_path).list() == []
    store.put(second)
    await store.flush()
    assert {each.id for each in IncidentStore(tmp_path).list()} == {first.id, second.id}


async def test_garbage_among_them_is_set_aside(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path)
    store.put(opened(case()))
    await store.flush()
    (tmp_path / "incidents" / "20260101T000000Z-00000000.json").write_text("{")
    assert len(IncidentStore(tmp_path).list()) == 1


async def test_a_record_of_a_later_version_is_left_as_it_is(tmp_path: Path) -> None:
    later = tmp_path / "incidents" / "20260101T000000Z-00000000.json"
    later.parent.mkdir()
    later.write_text('{"schema_version": 2, "id": "?"}')
    assert IncidentStore(tmp_path).list() == []
    assert later.exists()


def test_fingerprints_tell_requests_apart_and_not_what_they_say(tmp_path: Path) -> None:
    prints = Fingerprints(tmp_path)
    request = Generate(1, messages=[ChatMessage("user", "a secret")])
    same = Generate(
        2,
        messages=[ChatMessage("user", "a secret")],
        client="ann",
        priority=Priority.HIGH,
        accepted_at=5.0,
    )
    assert prints.of("m", request) == prints.of("m", same)
    assert Fingerprints(tmp_path).of("m", request) == prints.of("m", request)
    others = {
        prints.of("n", request),
        prints.of("m", Generate(1, messages=[ChatMessage("user", "another")])),
        prints.of("m", Generate(1, messages=request.messages, sampling=Sampling(top_k=3))),
    }
    assert len({*others, prints.of("m", request)}) == 4
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert Fingerprints(elsewhere).of("m", request) != prints.of("m", request)
    assert (tmp_path / "fingerprint.key").stat().st_mode & 0o077 == 0


def test_a_key_that_cannot_be_read_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Generate(1, prompt="x")
    before = Fingerprints(tmp_path).of("m", request)
    with monkeypatch.context() as disk:

        def trouble(_: Path) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        disk.setattr(Path, "read_bytes", trouble)
        assert Fingerprints(tmp_path).of("m", request) != before
    assert Fingerprints(tmp_path).of("m", request) == before
