"""What a model's state means for those who may wait for it, unload it, or stop its worker."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Generate
from supervisor.gate import ModelSpec
from supervisor.lifecycle import Readiness, State
from supervisor.line import Delivery
from supervisor.memory_lessons import MemoryLessons
from supervisor.memory_share import MemoryShare
from supervisor.modelfiles import SIMULATED_TRAITS, ModelFiles
from supervisor.quarantine import Account, Policy
from supervisor.requests import RequestTable
from supervisor.standing import GRANTED_S, Standing
from supervisor.traffic import Traffic

FILES = ModelFiles(Path("/m/x.sim.json"), "simulated", SIMULATED_TRAITS, 1, "digest")
SPEC = ModelSpec("m", FILES, "simulated", "1", None, None, None)
POLICY = Policy(threshold=3, window_s=600.0, delay_cap_s=60.0, decay_s=600.0)
ROUTABLE = State(Readiness.ROUTABLE, "canary passed", 0.0, Account(), 1, worker_alive=True)
QUARANTINED = replace(ROUTABLE, readiness=Readiness.QUARANTINED)


@dataclass
class Rig:
    """A standing whose state is set from outside, as by an actor."""

    standing: Standing
    requests: RequestTable
    traffic: Traffic
    sent: list[object] = field(default_factory=list)

    def send(self, message: object) -> Delivery:
        self.sent.append(message)
        return Delivery.SENT

    def become(self, state: State | None) -> Standing:
        self.standing._state = state
        return self.standing


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    requests = RequestTable(max_stream_buffer_bytes=1000)
    traffic = Traffic(requests)
    share = MemoryShare(SPEC, MemoryLessons(tmp_path))
    rig = Rig(Standing(SPEC, traffic, share, POLICY), requests, traffic)
    requests.connect(rig.send)
    requests.resume()
    return rig


def answers(standing: Standing) -> set[str]:
    names = ("tracked", "rests", "stays", "ending", "leaving", "dying")
    told = {name for name in names if getattr(standing, name)}
    return told | {"routable"} if standing.is_routable() else told


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (None, set()),
        (replace(ROUTABLE, readiness=Readiness.LOADING), {"tracked", "stays"}),
        (ROUTABLE, {"tracked", "stays", "routable"}),
        (replace(ROUTABLE, unloading=True), {"tracked", "ending", "leaving", "dying"}),
        (
            replace(ROUTABLE, readiness=Readiness.LOADING, failed=True),
            {"tracked", "stays", "dying"},
        ),
        (
            replace(QUARANTINED, failed=True),
            {"tracked", "rests", "ending", "leaving", "dying"},
        ),
        (replace(QUARANTINED, worker_alive=False), {"tracked", "rests"}),
    ],
    ids=["untracked", "loading", "routable", "unloading", "failed", "quarantined", "resting"],
)
def test_what_a_state_means(rig: Rig, state: State | None, expected: set[str]) -> None:
    assert answers(rig.become(state)) == expected


async def test_who_is_drained_is_leaving_already(rig: Rig) -> None:
    standing = rig.become(ROUTABLE)
    rig.traffic.submit(Generate(0, prompt="a"), limit=1, streaming=True, may_resume=True)
    drain = asyncio.create_task(rig.traffic.drain(60, lambda: True))
    await asyncio.sleep(0)
    assert answers(standing) == {"tracked", "leaving", "routable"}
    assert standing.idle_s() is None
    drain.cancel()
    await asyncio.wait({drain})
    assert answers(standing) == {"tracked", "stays", "routable"}


def test_an_untracked_model_has_no_state(rig: Rig) -> None:
    with pytest.raises(CodedError) as error:
        rig.become(None).readiness()
    assert error.value.code is ErrorCode.MODEL_NOT_FOUND
    assert rig.standing.promised == 0


def test_only_who_takes_traffic_and_has_proved_itself_is_idle(rig: Rig) -> None:
    assert rig.become(ROUTABLE).idle_s() is not None
    assert rig.become(replace(ROUTABLE, readiness=Readiness.LOADING)).idle_s() is None
    assert rig.become(replace(ROUTABLE, probation=True)).idle_s() is None
    rig.become(ROUTABLE)
    stream = rig.traffic.submit(Generate(0, prompt="a"), limit=1, streaming=True, may_resume=True)
    assert rig.standing.idle_s() is None
    stream.close()
    assert rig.standing.idle_s() is not None


def test_whoever_asked_for_it_has_a_moment_to_use_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing = rig.become(ROUTABLE)
    assert standing.evictable_s is None
    since = rig.requests.idle_since
    monkeypatch.setattr("supervisor.traffic.time.monotonic", lambda: since + GRANTED_S)
    assert standing.evictable_s == pytest.approx(GRANTED_S)
    for spec in (replace(SPEC, pinned=True), replace(SPEC, keep_alive_sec=0)):
        standing.spec = spec
        assert standing.evictable_s is None
    standing.spec = SPEC
    monkeypatch.undo()
    rig.traffic.count = 1
    assert standing.evictable_s is not None


def worker_of(standing: Standing) -> tuple[int, int] | None:
    return standing.worker


def test_a_worker_is_there_until_its_process_has_ended(rig: Rig) -> None:
    standing = rig.become(ROUTABLE)
    assert worker_of(standing) is None
    assert standing.footprint(1, 100) is None
    samples: list[int] = []
    generation: Any = SimpleNamespace(
        number=1, pid=7, exit_status=None, case=SimpleNamespace(sample=samples.append)
    )
    standing._generation = generation
    assert worker_of(standing) == (1, 7)
    assert standing.footprint(2, 100) is None
    footprint = standing.footprint(1, 100)
    assert footprint is not None
    assert (footprint.size, samples) == (100, [100])
    generation.exit_status = -9
    assert worker_of(standing) is None
