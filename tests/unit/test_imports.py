"""The rooms of the design: who may import whom, and what the pure ones must not touch."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("protocol", "weights", "worker", "supervisor")
#: Everybody may import them; they import the standard library and msgspec only.
SHARED = ("protocol", "weights")
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

#: Third-party packages that only these modules (or folders) may import.
ONLY_IN = {
    "zmq": {"worker/transport.py", "worker/session.py", "supervisor/channel.py"},
    "starlette": {"supervisor/gateway/"},
    "uvicorn": {"supervisor/gateway/"},
    "websockets": {"supervisor/gateway/"},
    "mlx": {"worker/backends/"},
    "mlx_lm": {"worker/backends/"},
    "llama_cpp": {"worker/backends/"},
    "transformers": {"worker/backends/"},
    "numpy": {"worker/backends/"},
    "jinja2": {"worker/chat/"},
    "llguidance": {"worker/constraints.py"},
    # Only the program that the supervisor starts for each download.
    "huggingface_hub": {"supervisor/downloads/engine.py", "supervisor/downloads/hub.py"},
}
#: They hold the context that sockets are made from, but make none.
ONLY_IN["zmq"] |= {
    "supervisor/actor.py",
    "supervisor/services.py",
}

PURE = (
    "lifecycle/*",
    "quarantine",
    "admission",
    "watchdog",
    "memory",
    "eviction",
    "geometry",
    "memory_plan",
    "compatibility",
    "regressions",
    "pace",
    "downloads/selection",
    "changes",
    "names",
    "presets",
    "resumption",
    "health",
)
IMPURE_MODULES = {"asyncio", "zmq", "os", "time", "random", "threading", "subprocess", "pathlib"}

#: Inside the supervisor: a module may import those of lower levels (and, within
#: the gateway, each other). Modules without a level import nothing of ours but
#: protocol, settings and views.
LEAVES_MAY_IMPORT = {
    "settings": {"presets"},
    "names": {"ids", "presets"},
    "lifecycle": {"quarantine"},
    "registry": {"compatibility", "jsonfile"},
    "regressions": {"compatibility"},
    "accounts": {"jsonfile", "quarantine"},
    "blocklist": {"admission"},
    "process": {"marks", "quarantine"},
    "footprint": {"cgroup_memory"},
    "geometry": {"gguf"},
    "traits": {"geometry"},
    "gguf_model": {"geometry", "gguf", "traits"},
    "modelfolder": {"geometry", "traits"},
    "memory_plan": {"geometry", "modelfiles"},
    "memory_lessons": {"jsonfile"},
    "modelfiles": {"gguf_model", "modelfolder", "traits"},
    "catalog": {"admission", "gguf_model", "modelfiles"},
    "canary": {"stream"},
    "embedding_canary": {"canary", "stream"},
    "stream": {"resumption"},
    "entries": {"resumption", "stream"},
    "convicts": {"incidents"},
    "suspects": {"entries", "resumption"},
    "inquiries": {"entries", "resumption"},
    "turns": {"entries", "inquiries", "line", "suspects"},
    "requests": {
        "line",
        "suspects",
        "turns",
        "entries",
        "pace",
        "places",
        "resumption",
        "seeds",
        "stream",
    },
    "ward": {"entries", "requests"},
    "incidents": {"jsonfile"},
    "summary": {"terminal"},
    "asking": {"client", "terminal"},
    "casefile": {"incidents"},
    "status": {"journal", "lifecycle", "quarantine", "resumption"},
    "ledger": {"jsonfile"},
}
EVERYONE_MAY_IMPORT = {"settings", "views"}
NOT_LEAVES = {
    "recorder",
    "records",
    "resting",
    "proof",
    "memory_room",
    "memory_share",
    "memory_watch",
    "portrait",
    "spares",
    "worker",
    "traffic",
    "standing",
    "idle_watch",
    "autoload",
    "services",
    "gate",
    "generation",
    "sideworker",
    "isolation",
    "trial",
    "probe",
    "actor",
    "loads",
    "fleet",
    "main",
    "cli",
    "commands",
    "client",
    "config",
    "chat_session",
    "pull",
    "watching",
    "overview",
    "sweep",
}


def imports(path: Path) -> set[str]:
    """Dotted names of everything a module imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_rooms_do_not_reach_into_each_other(path: Path) -> None:
    room = name_of(path).split("/")[0]
    allowed = {room} if room in SHARED else {room, *SHARED}
    assert top_level(path) & {*ROOMS, "tests", "scripts"} <= allowed


@pytest.mark.parametrize("room", SHARED)
def test_shared_rooms_need_msgspec_only(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        assert top_level(path) <= {*sys.stdlib_module_names, "msgspec", room}, path


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_libraries_stay_in_their_room(path: Path) -> None:
    name = name_of(path)
    for library, places in ONLY_IN.items():
        if library in top_level(path):
            assert any(name == place or name.startswith(place) for place in places), library


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_touch_no_clock_and_no_system(name: str) -> None:
    found = list((ROOT / "supervisor").glob(f"{name}.py"))
    assert found
    for path in found:
        assert not top_level(path) & IMPURE_MODULES, path


def supervisor_imports(path: Path) -> set[str]:
    """Our own supervisor modules that a module imports, by their first name."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("supervisor.")}


@pytest.mark.parametrize("path", sorted((ROOT / "supervisor").glob("*.py")), ids=name_of)
def test_leaves_do_not_import_each_other(path: Path) -> None:
    if path.stem not in NOT_LEAVES:
        allowed = LEAVES_MAY_IMPORT.get(path.stem, set()) | EVERYONE_MAY_IMPORT
        assert supervisor_imports(path) <= allowed


def test_nothing_below_imports_what_is_above() -> None:
    order = [
        "resting",
        "gate",
        "records",
        "generation",
        "sideworker",
        "trial",
        "probe",
        "isolation",
        "standing",
        "actor",
        "loads",
        "memory_watch",
        "idle_watch",
        "overview",
        "fleet",
        "gateway",
        "main",
        "cli",
    ]
    for level, name in enumerate(order):
        files = [ROOT / "supervisor" / f"{name}.py"]
        if name == "gateway":
            files = list((ROOT / "supervisor" / "gateway").rglob("*.py"))
        for path in files:
            assert not supervisor_imports(path) & set(order[level + 1 :]), path


def test_no_cycles() -> None:
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in MODULES
    }
    edges = {name: imports(path) & graph.keys() - {name} for name, path in graph.items()}
    while leaves := [name for name, targets in edges.items() if not targets]:
        edges = {n: t - set(leaves) for n, t in edges.items() if n not in leaves}
    assert not edges
