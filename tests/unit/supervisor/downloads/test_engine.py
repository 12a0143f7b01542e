"""What an engine does, against a hub on loopback with all that goes wrong with one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from protocol.errors import CodedError
from supervisor import modelfiles
from supervisor.downloads import engine, fetch, hub
from supervisor.downloads.cache import RepoFolder
from supervisor.downloads.messages import FetchJob, Note, Plan, PlanJob, Progress, Report
from tests.support.hub import API, Fault, Hub, running

SIZE = 400_000
WEIGHTS = os.urandom(SIZE)
NAME = "m-Q8_0.gguf"
TOKEN = "hf_a_secret"


@pytest.fixture(scope="module")
def shared() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture
def there(shared: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    shared.repos.clear()
    shared.served.clear()
    shared.requests.clear()
    shared.add("org/m", {NAME: WEIGHTS, "README.md": b"hello"}, small=frozenset({"README.md"}))
    monkeypatch.setattr(constants, "ENDPOINT", shared.url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", shared.url + template)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield shared
    close_session()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(fetch, "sleep", waited.append)
    monkeypatch.setattr(hub, "sleep", waited.append)
    return waited


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Report]:
    reports: list[Report] = []
    monkeypatch.setattr(engine, "tell", reports.append)
    return reports


def plan(cache: Path, model_id: str = "org/m") -> Plan:
    found = engine.do(PlanJob(model_id=model_id, cache=str(cache), formats=["mlx", "gguf"]))
    assert isinstance(found, Plan)
    return found


def bring(cache: Path, ask: Plan | None = None, stall_s: float = 5.0) -> None:
    engine.do(FetchJob(plan=ask or plan(cache), cache=str(cache), stall_s=stall_s))


def refusal(cache: Path, model_id: str = "org/m") -> CodedError:
    with pytest.raises(CodedError) as caught:
        bring(cache, plan(cache, model_id))
    return caught.value


def content(cache: Path, model_id: str = "org/m:m-Q8_0") -> bytes:
    return modelfiles.find(model_id, cache, cache).read_bytes()


def test_a_plan_is_exact_and_fetches_nothing(there: Hub, tmp_path: Path) -> None:
    found = plan(tmp_path)
    assert found.model_id == "org/m:m-Q8_0"
    assert found.revision == there.repos["org/m"].revision
    assert (found.total_bytes, found.missing_bytes) == (SIZE, SIZE)
    assert not there.served
    assert not list(tmp_path.iterdir())


def test_a_model_arrives_whole_in_the_layout_of_other_tools(
    there: Hub, tmp_path: Path, told: list[Report]
) -> None:
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    bring(tmp_path)
    assert content(tmp_path) == WEIGHTS
    assert there.served[NAME] == [(0, SIZE)]
    assert told[-1] == Progress(0, SIZE, verifying=True)
    assert plan(tmp_path).missing_bytes == 0
    # It is the hub's own library that finds it.
    path = try_to_load_from_cache("org/m", NAME, cache_dir=tmp_path)
    assert isinstance(path, str)
    assert Path(path).read_bytes() == WEIGHTS
    (repo,) = scan_cache_dir(tmp_path).repos
    assert (repo.repo_id, repo.size_on_disk) == ("org/m", SIZE)
    # The content network is no place for the key.
    assert there.tokens["hub"] == {TOKEN}
    assert there.tokens["cdn"] == {None}


def test_a_folder_of_small_and_large_files_arrives(
    there: Hub, tmp_path: Path, told: list[Report]
) -> None:
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "tokenizer.json": b"[]"}
    there.add("org/f", files, small=frozenset({"config.json", "tokenizer.json"}))
    bring(tmp_path, plan(tmp_path, "org/f"))
    folder = modelfiles.find("org/f", tmp_path, tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize(
    "fault",
    [
        Fault(after=100_000),
        Fault(after=100_000, stall_s=0.6),
        Fault(500),
        Fault(503, retry_after="1"),
        Fault(429, retry_after="3"),
        Fault(403),  # of the content network: its link is too old
        Fault(after=0),
    ],
)
def test_what_passes_is_waited_out_and_continued(
    there: Hub, tmp_path: Path, told: list[Report], fault: Fault
) -> None:
    there.fail(NAME, fault)
    bring(tmp_path, stall_s=0.3)
    assert content(tmp_path) == WEIGHTS
    # Each byte has come once.
    assert there.bytes_of(NAME) == SIZE
    notes = [report.text for report in told if isinstance(report, Note)]
    assert len(notes) == 1
    assert TOKEN not in str(told)


def test_the_hub_says_how_long_to_wait(
    there: Hub, tmp_path: Path, told: list[Report], waits: list[float]
) -> None:
    there.fail(API, Fault(429, retry_after="2"))
    there.fail(NAME, Fault(429, retry_after="7"), Fault(429, retry_after="90000"), Fault(503))
    bring(tmp_path)
    assert waits == [2.0, 7.0, fetch.MAX_WAIT_S, pytest.approx(2.0)]


@pytest.mark.usefixtures("waits")
def test_what_does_not_pass_is_given_up_and_kept(
    there: Hub, tmp_path: Path, told: list[Report]
) -> None:
    there.fail(NAME, Fault(after=100_000), *[Fault(503)] * fetch.MAX_ATTEMPTS)
    error = refusal(tmp_path)
    assert error.code == "download_failed"
    assert NAME in error.message
    with pytest.raises(CodedError, match="no model"):
        content(tmp_path)
    assert plan(tmp_path).missing_bytes == SIZE - 100_000
    bring(tmp_path)
    assert there.served[NAME] == [(0, 100_000), (100_000, SIZE)]
    assert content(tmp_path) == WEIGHTS


@pytest.mark.parametrize("begun", [b"", WEIGHTS[:1000]])
def test_a_wrong_file_is_deleted_and_named_and_no_model_is_seen(
    there: Hub, tmp_path: Path, told: list[Report], begun: bytes
) -> None:
    there.add("org/bad", {NAME: WEIGHTS}, wrong=frozenset({NAME}))
    ask = plan(tmp_path, "org/bad")
    folder = RepoFolder(tmp_path, "org/bad")
    if begun:
        path = folder.incomplete(ask.files[0].etag)
        path.parent.mkdir(parents=True)
        path.write_bytes(begun)
    error = refusal(tmp_path, "org/bad")
    assert (error.code, NAME in error.message) == ("download_failed", True)
    assert not list((folder.path / "blobs").iterdir())
    with pytest.raises(CodedError, match="no model"):
        content(tmp_path, "org/bad:m-Q8_0")


def test_a_damaged_beginning_is_found_out(there: Hub, tmp_path: Path, told: list[Report]) -> None:
    ask = plan(tmp_path)
    path = RepoFolder(tmp_path, "org/m").incomplete(ask.files[0].etag)
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(1000))
    assert refusal(tmp_path).code == "download_failed"
    bring(tmp_path)
    assert content(tmp_path) == WEIGHTS


def test_a_small_file_is_verified_by_its_git_id(
    there: Hub, tmp_path: Path, told: list[Report]
) -> None:
    small = frozenset({"config.json"})
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    there.add("org/s", files, small=small, wrong=small)
    error = refusal(tmp_path, "org/s")
    assert (error.code, "config.json" in error.message) == ("download_failed", True)


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize(
    ("faults", "code"),
    [
        ([Fault(403)], "hub_access_denied"),
        ([Fault(401, "GatedRepo")], "hub_access_denied"),
        ([Fault(404, "RepoNotFound")], "model_not_found"),
        ([Fault(401)], "hub_access_denied"),
        # The hub's answer to nobody for what is private, or is not there.
        ([Fault(401, "RepoNotFound")], "model_not_found"),
        ([Fault(418)], "hub_unavailable"),
        ([Fault(503)] * 3, "hub_unavailable"),
        ([Fault(429)] * 3, "hub_unavailable"),
    ],
)
def test_why_the_hub_does_not_tell(
    there: Hub, tmp_path: Path, faults: list[Fault], code: str
) -> None:
    there.fail(API, *faults)
    error = refusal(tmp_path)
    assert error.code == code
    assert TOKEN not in error.message
    assert not there.faults[API]


@pytest.mark.usefixtures("waits")
def test_a_hub_that_is_not_there(
    there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    error = refusal(tmp_path)
    assert error.code == "hub_unavailable"
    assert "127.0.0.1:9" in error.message


def test_gated_models_are_refused_before_anything_is_fetched(
    there: Hub, tmp_path: Path, told: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    there.add("org/gated", {NAME: WEIGHTS}, token="another")
    error = refusal(tmp_path, "org/gated")
    assert error.code == "hub_access_denied"
    assert f"{there.url}/org/gated" in error.message
    assert "HF_TOKEN" in error.message
    assert not there.served
    monkeypatch.setenv("HF_TOKEN", "another")
    bring(tmp_path, plan(tmp_path, "org/gated"))
    assert content(tmp_path, "org/gated:m-Q8_0") == WEIGHTS


def test_access_that_ends_under_way_is_told(there: Hub, tmp_path: Path) -> None:
    there.add("org/gated", {NAME: WEIGHTS}, token=TOKEN)
    ask = plan(tmp_path, "org/gated")
    there.add("org/gated", {NAME: WEIGHTS}, token="another")
    with pytest.raises(CodedError) as caught:
        bring(tmp_path, ask)
    assert caught.value.code == "hub_access_denied"


def test_models_of_one_repository_stay_beside_each_other(
    there: Hub, tmp_path: Path, told: list[Report]
) -> None:
    first = {"m-Q4_0.gguf": b"four", "m-Q8_0.gguf": b"eight"}
    there.add("org/two", first)
    bring(tmp_path, plan(tmp_path, "org/two:q4_0"))
    # Another revision: the file that is here already is still the same.
    there.add("org/two", {**first, "README.md": b"news"})
    bring(tmp_path, plan(tmp_path, "org/two:q8_0"))
    assert content(tmp_path, "org/two:m-Q4_0") == b"four"
    assert content(tmp_path, "org/two:m-Q8_0") == b"eight"
    assert there.bytes_of("m-Q4_0.gguf") == 4


def test_a_host_without_ranges_gives_all_of_it_again(
    there: Hub, tmp_path: Path, told: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(there, "ranges", False)
    there.fail(NAME, Fault(after=100_000))
    bring(tmp_path)
    assert content(tmp_path) == WEIGHTS
    assert there.served[NAME] == [(0, 100_000), (0, SIZE)]


def test_a_large_file_comes_in_parts(
    there: Hub, tmp_path: Path, told: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MAX_RANGE_BYTES", 150_000)
    bring(tmp_path)
    assert content(tmp_path) == WEIGHTS
    assert there.served[NAME] == [(0, 150_000), (150_000, 300_000), (300_000, SIZE)]
    assert not [report for report in told if isinstance(report, Note)]


@pytest.mark.parametrize("name", ["../m.gguf", "/m.gguf", "a//m.gguf", "m\n.gguf"])
def test_names_that_lead_elsewhere_are_not_there(there: Hub, tmp_path: Path, name: str) -> None:
    there.add("org/odd", {name: WEIGHTS})
    with pytest.raises(CodedError) as caught:
        plan(tmp_path, "org/odd")
    assert caught.value.code == "model_unsupported_backend"


def test_a_full_disk_is_told_by_its_name() -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    assert engine.failed(error).code == "insufficient_disk"
    assert engine.failed(PermissionError(errno.EACCES, "no")).code == "download_failed"
