"""Who gets which download: asked, joined, queued, cancelled, refused. The engine is played."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import msgspec
import pytest

from protocol.errors import CodedError, ErrorCode
from supervisor.downloads import downloads as room
from supervisor.downloads import planning
from supervisor.downloads.consent import LIFETIME_S, Question, Questions
from supervisor.downloads.downloads import Asked, Downloads
from supervisor.downloads.messages import FetchJob, Job, Plan, PlanJob, PlannedFile, Progress
from supervisor.downloads.operation import Operation
from supervisor.gate import LoadSpec
from supervisor.journal import Journal
from supervisor.settings import ModelSetting, Settings
from supervisor.views import LoadResult
from tests.support.fake_fleet import readiness

NOT_FOUND = CodedError(ErrorCode.MODEL_NOT_FOUND, "no such model here")
INCOMPLETE = CodedError(ErrorCode.MODEL_INCOMPLETE, "half of it")
SIZE = 100


class Played:
    """An engine that does what the test says, and a fleet that only takes loads."""

    def __init__(self) -> None:
        self.fetching: list[str] = []
        self.ended: list[str] = []
        self.may_end = asyncio.Event()
        self.failure: CodedError | None = None
        self.plan_failure: CodedError | None = None
        self.present = 0
        self.loads: list[LoadSpec] = []
        self.load_failure: CodedError | None = None
        self.plans = 0

    async def run(
        self,
        job: Job,
        environment: Mapping[str, str],
        on_progress: Callable[[Progress], None] = lambda _progress: None,
    ) -> Plan | None:
        if isinstance(job, PlanJob):
            self.plans += 1
            if self.plan_failure is not None:
                raise self.plan_failure
            return plan(job.model_id, self.present)
        assert isinstance(job, FetchJob)
        name = job.plan.model_id
        self.fetching.append(name)
        try:
            on_progress(Progress(0, SIZE // 2))
            await self.may_end.wait()
            if self.failure is not None:
                raise self.failure
            on_progress(Progress(0, SIZE))
        finally:
            self.ended.append(name)
        return None

    async def load(self, spec: LoadSpec) -> LoadResult:
        self.loads.append(spec)
        if self.load_failure is not None:
            raise self.load_failure
        return LoadResult(
            success=True,
            model_id=spec.model_id,
            memory_after_load_gb=None,
            time_to_load_ms=1.0,
            readiness=readiness(),
        )


def plan(model_id: str, on_disk: int = 0) -> Plan:
    repo = model_id.partition(":")[0]
    files = [PlannedFile("model.safetensors", SIZE, "etag", lfs=True, on_disk=on_disk)]
    return Plan(model_id=model_id, repo=repo, revision="r", files=files)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()
    monkeypatch.setattr(room, "run_engine", played.run)
    monkeypatch.setattr(planning, "run_engine", played.run)
    monkeypatch.setattr(planning, "free_bytes", lambda _path: 1000)
    return played


def make(
    home: Path, played: Played, journal: Journal | None = None, **settings: object
) -> Downloads:
    given = {"hub_cache_dir": home / "cache", "download_disk_reserve_bytes": 0, **settings}
    chosen = Settings(home=home, **given)  # type: ignore[arg-type]
    return Downloads(chosen, "mark:", played.load, journal or Journal())


@pytest.fixture
async def downloads(tmp_path: Path, played: Played) -> AsyncIterator[Downloads]:
    downloads = make(tmp_path, played)
    yield downloads
    await downloads.stop()


async def started(operation: Operation, status: str = "downloading") -> None:
    async with asyncio.timeout(5):
        while operation.status != status:
            await operation.changed()


async def offered(
    downloads: Downloads, model_id: str = "org/m", *, consent: bool = False, **options: object
) -> LoadSpec | Operation | Asked:
    spec = LoadSpec(model_id=model_id, **options)  # type: ignore[arg-type]
    return await downloads.offer(NOT_FOUND, spec, consent=consent)


async def refused(awaitable: object) -> str:
    with pytest.raises(CodedError) as caught:
        await awaitable  # type: ignore[misc]
    return caught.value.code


async def test_a_yes_begins_what_was_asked_for(downloads: Downloads, played: Played) -> None:
    asked = await offered(downloads, context_length=7)
    assert isinstance(asked, Asked)
    assert (asked.plan.missing_bytes, asked.free_bytes) == (SIZE, 1000)
    assert not downloads.views()
    operation = await downloads.confirm(asked.token)
    played.may_end.set()
    await operation.end()
    assert played.loads == [LoadSpec(model_id="org/m", context_length=7)]
    assert downloads.view(operation.id).status == "done"
    assert operation.result is not None
    assert await refused(downloads.confirm(asked.token)) == "invalid_confirmation_token"


async def test_its_beginning_and_its_end_are_events(tmp_path: Path, played: Played) -> None:
    journal = Journal()
    downloads = make(tmp_path, played, journal)
    operation = await downloads.fetch("org/m")
    await started(operation)
    await downloads.cancel(operation.id)
    await downloads.stop()
    told = [msgspec.json.decode(journal.at(number).data) for number in range(journal.end)]
    assert {(event["event"], event["model"]) for event in told} == {("download_changed", "org/m")}
    assert [event["status"] for event in told] == ["queued", "downloading", "cancelled"]
    assert [event["code"] for event in told] == [None, None, "download_cancelled"]
    assert told[0]["download_id"] == operation.id


async def test_who_asks_for_the_same_joins(downloads: Downloads, played: Played) -> None:
    first = await downloads.fetch("org/m")
    await started(first)
    assert await downloads.fetch("org/m") is first
    # A load joins as well, and is done afterwards.
    assert await offered(downloads, backend="mlx") is first
    conflict = await refused(offered(downloads, backend="llama"))
    assert conflict == "model_conflict"
    played.may_end.set()
    await first.end()
    assert played.fetching == ["org/m"]
    assert [spec.backend for spec in played.loads] == ["mlx"]


async def test_further_ones_wait(tmp_path: Path, played: Played) -> None:
    downloads = make(tmp_path, played, max_downloads=1)
    first = await downloads.fetch("org/a")
    second = await downloads.fetch("org/b")
    await started(first)
    assert second.view().status == "queued"
    await downloads.cancel(first.id)
    await started(second)
    # Who waits in the queue can be called off as well.
    third = await downloads.fetch("org/c")
    assert (await downloads.cancel(third.id)).status == "cancelled"
    played.may_end.set()
    await second.end()
    assert played.fetching == ["org/a", "org/b"]
    assert [view.model_id for view in downloads.views()] == ["org/b", "org/c", "org/a"]
    await downloads.stop()


async def test_a_cancelled_one_ends_its_engine_and_can_be_asked_for_again(
    downloads: Downloads, played: Played
) -> None:
    operation = await downloads.fetch("org/m")
    await started(operation)
    waiting = asyncio.create_task(operation.end())
    view = await downloads.cancel(operation.id)
    assert (view.status, view.downloaded_bytes) == ("cancelled", SIZE // 2)
    assert view.error is not None
    assert view.error.code == await refused(waiting) == "download_cancelled"
    assert played.ended == ["org/m"]
    assert (await downloads.cancel(operation.id)).status == "cancelled"
    again = await downloads.fetch("org/m")
    assert again.id == operation.id
    played.may_end.set()
    await again.end()
    assert await refused(downloads.cancel(again.id)) == "model_conflict"
    assert await refused(downloads.cancel("dl-nothing")) == "download_not_found"


@pytest.mark.parametrize("where", ["download", "load"])
async def test_a_failure_is_kept_with_its_code(
    downloads: Downloads, played: Played, where: str
) -> None:
    failure = CodedError(ErrorCode.MODEL_CANARY_FAILED, "it says nothing")
    if where == "load":
        played.load_failure = failure
    else:
        played.failure = failure
    played.may_end.set()
    operation = await offered(downloads, consent=True)
    assert isinstance(operation, Operation)
    assert await refused(operation.end()) == "model_canary_failed"
    view = downloads.view(operation.id)
    assert view.status == "failed"
    assert view.error is not None
    assert (view.error.code, view.error.message) == ("model_canary_failed", "it says nothing")
    assert bool(played.loads) == (where == "load")


async def test_disk_is_counted_with_what_others_will_take(
    downloads: Downloads, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "free_bytes", lambda _path: 150)
    first = await downloads.fetch("org/a")
    await started(first)
    # Half of the first is written: 50 of the 150 are still its.
    second = await downloads.fetch("org/b")
    with pytest.raises(CodedError) as caught:
        await downloads.fetch("org/c")
    assert caught.value.code == "insufficient_disk"
    assert caught.value.details == {"needed_bytes": SIZE, "free_bytes": 150}
    assert await refused(offered(downloads, "org/c")) == "insufficient_disk"
    await downloads.cancel(second.id)
    assert (await downloads.fetch("org/c")).id != second.id


async def test_the_reserve_stays_free(tmp_path: Path, played: Played) -> None:
    downloads = make(tmp_path, played, download_disk_reserve_bytes=901)
    assert await refused(downloads.fetch("org/m")) == "insufficient_disk"
    played.present = 1
    assert (await downloads.fetch("org/m")).plan.missing_bytes == SIZE - 1
    await downloads.stop()


async def test_without_downloads_ids_of_the_hub_are_refused_by_name(
    tmp_path: Path, played: Played
) -> None:
    downloads = make(tmp_path, played, downloads_enabled=False)
    assert await refused(offered(downloads, consent=True)) == "downloads_disabled"
    assert await refused(offered(downloads)) == "downloads_disabled"
    assert await refused(downloads.fetch("org/m")) == "downloads_disabled"
    assert await refused(offered(downloads, "plain", consent=True)) == "model_not_found"
    assert played.plans == 0


async def test_what_a_download_does_not_help_is_refused_as_before(
    tmp_path: Path, played: Played
) -> None:
    mine = ModelSetting(path="/gone.gguf", id="org/mine")
    downloads = make(tmp_path, played, models=(mine,))
    assert await refused(offered(downloads, "plain")) == "model_not_found"
    assert await refused(offered(downloads, "org/m", path="/x.gguf")) == "model_not_found"
    assert await refused(offered(downloads, "org/mine")) == "model_not_found"
    crash = CodedError(ErrorCode.MODEL_CRASHED, "it crashed")
    spec = LoadSpec(model_id="org/m")
    assert await refused(downloads.offer(crash, spec, consent=True)) == "model_crashed"
    assert await refused(downloads.fetch("plain")) == "invalid_value"
    # In the models folder it is its owner's.
    (tmp_path / "models" / "org" / "m").mkdir(parents=True)
    assert await refused(downloads.offer(INCOMPLETE, spec, consent=True)) == "model_incomplete"
    assert played.plans == 0


async def test_half_a_model_in_the_cache_is_completed_where_the_hub_can_be_asked(
    downloads: Downloads, played: Played
) -> None:
    spec = LoadSpec(model_id="org/m")
    assert isinstance(await downloads.offer(INCOMPLETE, spec, consent=False), Asked)
    played.plan_failure = CodedError(ErrorCode.HUB_UNAVAILABLE, "nobody there")
    assert await refused(downloads.offer(INCOMPLETE, spec, consent=False)) == "model_incomplete"
    assert await refused(downloads.offer(NOT_FOUND, spec, consent=False)) == "hub_unavailable"


async def test_there_is_no_question_about_nothing(downloads: Downloads, played: Played) -> None:
    played.present = SIZE
    assert isinstance(await offered(downloads), Operation)


async def test_the_next_server_tells_what_was_interrupted(tmp_path: Path, played: Played) -> None:
    downloads = make(tmp_path, played)
    played.may_end.set()
    whole = await downloads.fetch("org/whole")
    await whole.end()
    played.may_end.clear()
    half = await downloads.fetch("org/half")
    await started(half)
    waiting = asyncio.create_task(half.end())
    # As a kill leaves it: on disk it is under way.
    await downloads._records.flush()
    later = make(tmp_path, played)
    assert later.view(whole.id).status == "done"
    view = later.view(half.id)
    assert view.status == "failed"
    assert view.error is not None
    assert (view.error.code, "interrupted" in view.error.message) == ("download_failed", True)
    assert len(played.fetching) == 2
    await downloads.stop()
    assert await refused(waiting) == "download_failed"
    assert await refused(downloads.fetch("org/late")) == "server_shutting_down"


def test_tokens_end_after_ten_minutes() -> None:
    now = 0.0
    questions = Questions(clock=lambda: now)
    question = Question(plan("org/m"), LoadSpec(model_id="org/m"))
    first = questions.ask(question)
    now = LIFETIME_S - 1
    second = questions.ask(question)
    assert questions.take(first) == question
    now = 2 * LIFETIME_S
    for token in (first, second, ""):
        with pytest.raises(CodedError, match="10 minutes"):
            questions.take(token)


def test_questions_do_not_pile_up() -> None:
    questions = Questions(clock=lambda: 0.0)
    question = Question(plan("org/m"), LoadSpec(model_id="org/m"))
    tokens = [questions.ask(question) for _ in range(1000)]
    assert questions.take(tokens[-1]) == question
    with pytest.raises(CodedError):
        questions.take(tokens[0])
