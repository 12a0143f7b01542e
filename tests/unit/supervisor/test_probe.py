"""Who is tried, one after the other; what is recommended, and what stays on record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from protocol.errors import CodedError, ErrorCode
from supervisor import probe
from supervisor.admission import BlockRule
from supervisor.canary import CanaryReport
from supervisor.compatibility import failing, recommendations
from supervisor.gate import Gate, LoadSpec, ModelSpec
from supervisor.metrics import Metrics
from supervisor.probe import Prober, ProbeSpec, recommend
from supervisor.quarantine import Account, FailureKind
from supervisor.runtimes import SIMULATED_VERSION
from supervisor.services import Services, open_services
from supervisor.settings import Settings
from supervisor.trial import NAME, Ended
from supervisor.views import BackendProbe, ProbeResult
from tests.support.server import write_script

REPORT = CanaryReport("asked", 0.5, 100.0, "said", 5, 16)
PASSED = Ended("canary passed", telling=True, report=REPORT, parts_s={"load": 1.25}, memory_gb=0.5)
CRASHED = Ended(
    "killed by SIGSEGV",
    ErrorCode.MODEL_LOADER_CRASHED,
    FailureKind.SIGNAL,
    telling=True,
    output_tail="Segmentation fault",
)
BLOCK = BlockRule({"format": "simulated"}, "simulated", "", "known to crash")


class Scene:
    """A prober over a real gate and registry; ``ended`` is how every trial ends."""

    def __init__(self, services: Services, *rules: BlockRule) -> None:
        self.services = services
        self.gate = Gate(services.settings, services.registry, rules)
        self.prober = Prober(lambda: self.gate, services, reserve=self._reserve)
        self.ended: Ended | None = PASSED
        self.refusal: CodedError | None = None
        self.strict: list[bool] = []
        self.told: list[str] = []
        self.begun = asyncio.Event()
        self.may_leave = asyncio.Event()
        self.may_leave.set()

    @asynccontextmanager
    async def _reserve(self, model: ModelSpec) -> AsyncIterator[None]:
        if self.refusal is not None:
            raise self.refusal
        self.told.append(f"reserved for {model.model_id}")
        try:
            yield
        finally:
            self.told.append("given back")

    async def probe(self, model_id: str = "m", **options: object) -> ProbeResult:
        load = LoadSpec(
            model_id=model_id,
            allow_unsupported_runtime=bool(options.pop("allow_unsupported_runtime", False)),
        )
        async with asyncio.timeout(10):
            return await self.prober.probe(ProbeSpec(load=load, **options))  # type: ignore[arg-type]


@pytest.fixture
async def services(tmp_path: Path) -> AsyncIterator[Services]:
    (tmp_path / "models").mkdir()
    write_script(tmp_path / "models", "m")
    services = open_services(Settings(home=tmp_path, enable_simulated=True), Metrics())
    yield services
    await services.flush()
    services.close()


@pytest.fixture
def scene(services: Services, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return staged(Scene(services), monkeypatch)


def staged(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Scene:
    class ScriptedTrial:
        def __init__(self, spec: ModelSpec, services: Services, *, strict: bool) -> None:
            assert services is scene.services
            scene.strict.append(strict)
            self.worker = object()

        async def run(self, timeout_s: float) -> Ended:
            assert scene.prober.trials.keys() == {NAME}
            scene.told.append("begun")
            scene.begun.set()
            try:
                if scene.ended is None:
                    await asyncio.Event().wait()
            finally:
                await scene.may_leave.wait()
            assert scene.ended is not None
            return scene.ended

    monkeypatch.setattr(probe, "Trial", ScriptedTrial)
    return scene


async def test_a_pass_is_told_and_recorded_as_a_load_records_it(scene: Scene) -> None:
    answer = await scene.probe()
    assert answer == ProbeResult(
        model_id="m",
        results=[
            BackendProbe(
                backend="simulated",
                backend_version=SIMULATED_VERSION,
                outcome="pass",
                reason="canary passed",
                time_to_load_ms=1250.0,
                time_to_first_token_s=0.5,
                tokens_per_s=100.0,
                memory_gb=0.5,
            )
        ],
        recommended="simulated",
        reason=f"simulated {SIMULATED_VERSION} passed, 100 tokens/s",
    )
    (record,) = scene.services.registry.records
    assert (record.outcome, record.reason, record.is_probe) == ("pass", "canary passed", True)
    assert record.metadata["tokens_per_s"] == 100.0
    assert record.metadata["load_s"] == 1.25
    assert record.digest
    (verdict,) = recommendations([record], await scene.gate.installed())
    assert verdict.verdict == "allow"
    assert scene.prober.trials == {}


async def test_a_failure_is_recorded_with_its_last_output_and_not_counted(scene: Scene) -> None:
    scene.ended = CRASHED
    answer = await scene.probe()
    assert answer.recommended is None
    assert answer.reason == "no backend passed: simulated: killed by SIGSEGV"
    (record,) = scene.services.registry.records
    assert (record.outcome, record.reason, record.is_probe) == ("fail", "killed by SIGSEGV", True)
    assert record.metadata["code"] == "model_loader_crashed"
    assert record.metadata["kind"] == "signal"
    assert record.metadata["output_tail"] == "Segmentation fault"
    assert scene.services.accounts.all_quarantined() == []
    assert scene.services.incidents.list(model="m", limit=1) == []
    installed = await scene.gate.installed()
    assert record.digest
    denied = failing([record], model="m", digest=record.digest, installed=installed)
    assert denied == {"simulated"}


async def test_what_tells_nothing_of_the_model_is_not_on_record(scene: Scene) -> None:
    scene.ended = Ended("not through within the 1 s", ErrorCode.MODEL_LOAD_TIMEOUT)
    (result,) = (await scene.probe()).results
    assert (result.outcome, result.code) == ("fail", "model_load_timeout")
    assert list(scene.services.registry.records) == []


async def test_memory_is_reserved_around_the_trial(scene: Scene) -> None:
    await scene.probe()
    assert scene.told == ["reserved for m", "begun", "given back"]


async def test_what_does_not_fit_is_not_tried(scene: Scene) -> None:
    scene.refusal = CodedError(ErrorCode.INSUFFICIENT_MEMORY, "needs 5 GB")
    (result,) = (await scene.probe()).results
    assert (result.outcome, result.code) == ("skipped", "insufficient_memory")
    assert result.reason == "needs 5 GB"
    assert scene.told == []


async def test_a_blocklisted_backend_is_tried_only_when_told_so(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = staged(Scene(services, BLOCK), monkeypatch)
    (result,) = (await scene.probe()).results
    assert (result.outcome, result.code) == ("skipped", "model_unsupported_backend")
    assert result.backend_version == SIMULATED_VERSION
    assert "known to crash" in result.reason
    assert scene.told == []
    (result,) = (await scene.probe(allow_unsupported_runtime=True)).results
    assert result.outcome == "pass"


async def test_only_the_backends_that_were_named_are_tried_each_once(scene: Scene) -> None:
    answer = await scene.probe(backends=("llama", "simulated", "llama"))
    assert [(r.backend, r.outcome) for r in answer.results] == [
        ("llama", "skipped"),
        ("simulated", "pass"),
    ]
    assert "does not read simulated models" in answer.results[0].reason


async def test_wrong_requests_end_before_anything_is_tried(scene: Scene) -> None:
    for model_id, backends, code in (
        ("nobody", (), ErrorCode.MODEL_NOT_FOUND),
        ("m", ("simulated", "lama"), ErrorCode.MODEL_UNSUPPORTED_BACKEND),
    ):
        with pytest.raises(CodedError) as raised:
            await scene.probe(model_id, backends=backends)
        assert raised.value.code is code
    assert scene.told == []
    assert list(scene.services.registry.records) == []


async def test_a_quarantined_model_is_tried_as_on_probation(scene: Scene) -> None:
    model = await scene.gate.admit(LoadSpec(model_id="m"))
    account = Account(times=(1e12,), streak=3, quarantined=True, quarantines=1)
    scene.services.accounts.put(model.account_key, account)
    answer = await scene.probe()
    assert scene.strict == [True]
    assert answer.recommended == "simulated"
    assert "quarantine has to be released" in answer.reason
    assert scene.services.accounts.get(model.account_key) == account


async def test_one_probe_at_a_time(scene: Scene) -> None:
    scene.ended = None
    first = asyncio.create_task(scene.probe())
    await scene.begun.wait()
    with pytest.raises(CodedError) as raised:
        await scene.probe()
    assert raised.value.code is ErrorCode.MODEL_CONFLICT
    assert raised.value.retry_after_s
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_another_probe_waits_for_the_worker_of_one_that_was_called_off(scene: Scene) -> None:
    scene.ended = None
    scene.may_leave.clear()
    first = asyncio.create_task(scene.probe())
    await scene.begun.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(CodedError) as raised:
        await scene.probe()
    assert raised.value.code is ErrorCode.MODEL_CONFLICT
    stopping = asyncio.create_task(scene.prober.stop())
    for _ in range(5):
        await asyncio.sleep(0)
    # To cancel it again would have cut its end short.
    assert not stopping.done()
    assert scene.prober.trials
    scene.may_leave.set()
    await stopping
    assert scene.prober.trials == {}
    assert scene.told[-1] == "given back"


async def test_a_stop_ends_the_probe_and_lets_none_begin(scene: Scene) -> None:
    scene.ended = None
    waiting = asyncio.create_task(scene.probe())
    await scene.begun.wait()
    await scene.prober.stop()
    for probing in (waiting, scene.probe()):
        with pytest.raises(CodedError) as raised:
            await probing
        assert raised.value.code is ErrorCode.SHUTTING_DOWN


def result(
    backend: str, outcome: Literal["pass", "fail", "skipped"], speed: float | None = None
) -> BackendProbe:
    return BackendProbe(
        backend=backend,
        backend_version="1",
        outcome=outcome,
        reason=f"{backend} says so",
        tokens_per_s=speed,
    )


def test_the_fastest_that_passed_is_recommended() -> None:
    results = [result("a", "pass", 10), result("b", "pass", 20), result("c", "fail", 30)]
    assert recommend(results, ()) == ("b", "b 1 passed, 20 tokens/s")
    assert recommend(results, {"b"})[0] == "a"
    assert recommend(results[:1], {"a"})[0] == "a"


def test_of_equals_the_first_is_recommended() -> None:
    assert recommend([result("a", "pass"), result("b", "pass")], ())[0] == "a"


def test_without_a_pass_all_reasons_are_told() -> None:
    found = recommend([result("a", "fail"), result("b", "skipped")], ())
    assert found == (None, "no backend passed: a: a says so; b: b says so")
