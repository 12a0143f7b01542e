"""Faults strike where and as often as ordered, and are out of reach of real backends."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.codec import CodecError, FromWorkerDecoder
from protocol.messages import FromWorker, Hello, Loaded, ToWorker
from worker.backends.simulated import SimulatedBackend
from worker.fault_acts import FaultyLink, cause
from worker.faults import Fault, FaultKind, FaultPlan, FaultPoint
from worker.link import LinkWrapper

WORKER = Path(__file__).resolve().parents[3] / "worker"
HELLO = Hello(1, "nonce", 1, 2, "simulated", "1")
LOADED = Loaded("simulated", 1, 1, 1, True, 1)


class FakeLink:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[FromWorker] = []
        self.frames: list[bytes] = []

    def send(self, message: FromWorker) -> None:
        self.sent.append(message)

    def send_frame(self, frame: bytes) -> None:
        self.frames.append(frame)

    def wait(self) -> ToWorker:
        raise NotImplementedError

    def has_news(self, wait_s: float) -> bool:
        raise NotImplementedError

    def pending(self) -> Iterator[ToWorker]:
        raise NotImplementedError


def plan_of(folder: Path, *faults: Fault) -> FaultPlan:
    plan = FaultPlan()
    plan.add(faults, folder / "model.sim.json")
    return plan


def test_a_fault_strikes_so_often_over_all_generations(tmp_path: Path) -> None:
    fault = Fault(FaultPoint.TOKEN, FaultKind.MARK, n=2, prompt_contains="poison", times=2)

    def strikes() -> int:
        plan = plan_of(tmp_path, fault)
        return len(list(plan.due(FaultPoint.TOKEN, n=2, prompt="some poison")))

    assert not list(plan_of(tmp_path, fault).due(FaultPoint.TOKEN, n=1, prompt="poison"))
    assert not list(plan_of(tmp_path, fault).due(FaultPoint.TOKEN, n=2, prompt="water"))
    assert [strikes() for _ in range(4)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (FaultKind.SILENT, []),
        (FaultKind.TWICE, [HELLO, HELLO]),
        (FaultKind.WRONG_VERSION, [Hello(2, "nonce", 1, 2, "simulated", "1")]),
        (FaultKind.WRONG_NONCE, [Hello(1, "00000", 1, 2, "simulated", "1")]),
        (FaultKind.OLD_GENERATION, [Hello(1, "nonce", 1, 1, "simulated", "1")]),
    ],
)
def test_a_handshake_that_goes_wrong(
    tmp_path: Path, kind: FaultKind, expected: list[FromWorker]
) -> None:
    link = FakeLink()
    faulty = FaultyLink(link, plan_of(tmp_path, Fault(FaultPoint.HELLO, kind)))
    faulty.send(HELLO)
    assert link.sent == expected


def test_loaded_twice(tmp_path: Path) -> None:
    link = FakeLink()
    faulty = FaultyLink(link, plan_of(tmp_path, Fault(FaultPoint.LOADED, FaultKind.TWICE)))
    faulty.send(LOADED)
    assert link.sent == [LOADED, LOADED]


@pytest.mark.parametrize(
    "kind",
    [
        FaultKind.CORRUPT_FRAME,
        FaultKind.EMPTY_FRAME,
        FaultKind.TRUNCATED_FRAME,
        FaultKind.WRONG_TAG,
    ],
)
def test_bad_frames_are_bad(kind: FaultKind) -> None:
    link = FakeLink()
    cause(Fault(FaultPoint.TOKEN, kind), link)
    for frame in link.frames:
        with pytest.raises(CodecError):
            FromWorkerDecoder()(frame)
    assert link.frames


def test_late_frames_are_well_formed() -> None:
    link = FakeLink()
    cause(Fault(FaultPoint.TOKEN, FaultKind.STALE_FRAMES), link)
    assert len([FromWorkerDecoder()(frame) for frame in link.frames]) == 4


def test_only_the_simulated_backend_stands_in_the_way_of_its_link() -> None:
    assert isinstance(SimulatedBackend(), LinkWrapper)
    for module, name in (("llama", "LlamaBackend"), ("mlx", "MlxBackend")):
        tree = ast.parse((WORKER / "backends" / f"{module}.py").read_text())
        (backend,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
        assert not backend.bases
        methods = {node.name for node in backend.body if isinstance(node, ast.FunctionDef)}
        assert "load" in methods
        assert "wrap_link" not in methods


def test_only_the_simulated_backend_imports_faults() -> None:
    allowed = {"backends/simulated.py", "faults.py", "fault_acts.py"}
    for path in WORKER.rglob("*.py"):
        if str(path.relative_to(WORKER)) not in allowed:
            assert "worker.fault" not in path.read_text(), path


def test_a_worker_without_the_simulated_backend_has_no_faults_in_memory() -> None:
    code = (
        "import sys, worker.session, worker.guard; "
        "from worker.backends import create_backend; create_backend('llama'); "
        "print([name for name in sys.modules if 'fault' in name and 'worker' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
