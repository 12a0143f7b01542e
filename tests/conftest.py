"""Models for the tests: tiny random ones, and the demo model in both formats."""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
from steps import cache_dir

from tests.support.client_models import serve_client_models
from tests.support.server import NO_HUB, Server, serve

# How long an example takes says nothing on a machine that others use as well.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# MLX would compile kernels with the system's compiler; interpreted ones are as
# fast for small models and need none. Set before anything imports mlx, and
# inherited by every worker process that a test starts.
os.environ["MLX_DISABLE_COMPILE"] = "1"

# Whatever a test starts by itself: it finds no hub.
os.environ["HF_ENDPOINT"] = NO_HUB

# What starts the tests may ignore these, as nohup and a shell's background do, and every process
# that a test starts and interrupts would inherit that.
for number, handler in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

ROOT = Path(__file__).resolve().parent.parent
SUPPORT = ROOT / "tests" / "support"


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GGUF of a million parameters; loads and answers within a second."""
    from tests.support.tiny_gguf import write_tiny_gguf

    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_mlx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as an mlx-lm directory; skips where MLX is not installed."""
    pytest.importorskip("mlx.core")
    from tests.support.tiny_mlx import write_tiny_mlx

    return write_tiny_mlx(tmp_path_factory.mktemp("models") / "tiny-mlx")


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """SmolLM2-135M-Instruct; fetched once for this user, not once per run."""
    fetched = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo_model.py"],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Path(fetched.stdout.strip())


@pytest.fixture(scope="session")
def demo_mlx(demo_gguf: Path) -> Path:
    """The demo model as an mlx-lm directory; skips where MLX is not installed.

    Kept in the cache folder under what it was made from.
    """
    pytest.importorskip("mlx.core")
    from tests.support.gguf_to_mlx import gguf_to_mlx

    maker = hashlib.sha256((SUPPORT / "gguf_to_mlx.py").read_bytes()).hexdigest()[:12]
    directory = cache_dir() / "test-models" / f"{demo_gguf.stem}-mlx-{maker}"
    if not directory.is_dir():
        with _scratch_beside(directory) as scratch:
            gguf_to_mlx(demo_gguf, scratch / "model").rename(directory)
    return directory


@contextmanager
def _scratch_beside(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def real_server(
    tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path, tiny_mlx: Path, demo_gguf: Path
) -> Iterator[Server]:
    """A server with a real model on each real backend, and the demo model, all routable."""
    models = {"tiny-gguf": tiny_gguf, "tiny-mlx": tiny_mlx, "demo": demo_gguf}
    arguments = [f"--model={name}={path}" for name, path in models.items()]
    with serve(tmp_path_factory.mktemp("real") / "home", *arguments) as server:
        for name in models:
            server.await_tracked(name)
            server.await_state(name, "routable")
        yield server


@pytest.fixture(scope="session")
def client_server(
    tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path, demo_gguf: Path
) -> Iterator[Server]:
    """What ``tests.support.client_models`` describes, for tests that leave it as it is."""
    with serve_client_models(tmp_path_factory.mktemp("clients"), tiny_gguf, demo_gguf) as server:
        yield server
