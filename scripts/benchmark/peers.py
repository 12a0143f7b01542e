"""The servers to compare with: how each is started, and what it must be asked differently."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from benchmark.children import Child, Player, free_port, running
from benchmark.contenders import MODEL, HttpInstance, Instance, Setup
from benchmark.probes import tree
from benchmark.ready import await_http, await_routed


class LlamaServer:
    """llama.cpp's own server: everything in one process."""

    name = "llama-server"

    def __init__(self, binary: Path | None) -> None:
        self._binary = binary

    def _memory(self, setup: Setup) -> list[str]:
        """One KV cache for all, as here."""
        return ["--ctx-size", str(setup.pool), "--kv-unified"]

    def missing(self) -> str | None:
        if self._binary is None:
            return "not measured: give its path with --llama-server"
        if not self._binary.is_file():
            return f"not measured: there is no {self._binary}"
        return None

    @contextmanager
    def run(self, setup: Setup, client: Player) -> Iterator[Instance]:
        port = free_port()
        command = [*self._command(setup, port), "--model", str(setup.model), "--alias", MODEL]
        with running(Child(command)) as child:
            await_http(child, port, "/health")
            yield HttpInstance(client, child, port, gateway=[], workers=[child.pid])

    def _command(self, setup: Setup, port: int) -> list[str]:
        """Its own defaults but for what has to be the same everywhere."""
        return [
            *(str(self._binary), "--host", "127.0.0.1", "--port", str(port), "--no-webui"),
            *self._memory(setup),
            *("--parallel", str(setup.sequences)),
            *("--threads", str(setup.threads), "--threads-batch", str(setup.threads)),
        ]


class LlamaSplit(LlamaServer):
    """The same with a KV cache that is divided: what it does by itself for ``--parallel``."""

    name = "llama-server split"

    def _memory(self, setup: Setup) -> list[str]:
        return ["--ctx-size", str(setup.context * setup.sequences), "--no-kv-unified"]


class LlamaRouter(LlamaServer):
    """llama.cpp's router: a gateway process and a process per model, as here."""

    name = "llama-server router"

    @contextmanager
    def run(self, setup: Setup, client: Player) -> Iterator[Instance]:
        port = free_port()
        with tempfile.TemporaryDirectory(prefix="opta-bench-") as folder:
            preset = Path(folder) / "models.ini"
            preset.write_text(
                f"version = 1\n\n[{MODEL}]\nmodel = {setup.model}\nload-on-startup = true\n"
            )
            command = [*self._command(setup, port), "--models-preset", str(preset)]
            # The router is also to use no cache of the user's.
            with running(Child(command, environment={"LLAMA_CACHE": folder})) as child:
                await_http(child, port, "/health")
                await_routed(child, port, MODEL)
                workers = tree(child.pid)
                yield HttpInstance(client, child, port, gateway=[child.pid], workers=workers)


#: Says whether llama_cpp.server can run, and which tokens end an answer: it has
#: no ignore_eos, so they are made impossible by their bias.
_PROBE = """
import sys, json, llama_cpp
import llama_cpp.server.__main__
parameters = llama_cpp.llama_model_default_params()
parameters.vocab_only = True
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), parameters)
vocabulary = llama_cpp.llama_model_get_vocab(model)
tokens = range(llama_cpp.llama_vocab_n_tokens(vocabulary))
print(json.dumps([t for t in tokens if llama_cpp.llama_vocab_is_eog(vocabulary, t)]))
"""


class LlamaCppPython:
    """The server that comes with llama-cpp-python; it runs one request at a time."""

    name = "llama_cpp.server"

    def __init__(self, python: Path, model: Path) -> None:
        self._python = python
        self._model = model

    @cached_property
    def _end_tokens(self) -> list[int] | None:
        command = [str(self._python), "-c", _PROBE, str(self._model)]
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
            done = subprocess.run(command, capture_output=True, timeout=120, check=True)
            tokens: list[int] = json.loads(done.stdout.splitlines()[-1])
            return tokens
        return None

    def missing(self) -> str | None:
        if self._end_tokens is None:
            return (
                f"not installed: {self._python} lacks it; make a venv, "
                "pip install 'llama-cpp-python[server]' into it, "
                "and give its python with --peers-python"
            )
        return None

    @contextmanager
    def run(self, setup: Setup, client: Player) -> Iterator[Instance]:
        port = free_port()
        command: list[str | Path] = [
            *(self._python, "-m", "llama_cpp.server", "--host", "127.0.0.1", "--port", str(port)),
            *("--model", setup.model, "--model_alias", MODEL, "--n_gpu_layers", "-1"),
            *("--n_ctx", str(setup.context), "--n_threads", str(setup.threads)),
            *("--n_threads_batch", str(setup.threads), "--verbose", "false"),
            # As it comes, a second request cuts the first one off.
            *("--interrupt_requests", "false", "--logits_all", "false"),
        ]
        bias = {str(token): -100.0 for token in self._end_tokens or []}
        extra = {"ignore_eos": None, "logit_bias": bias, "stream_options": None}
        with running(Child(command)) as child:
            await_http(child, port, "/v1/models")
            yield HttpInstance(client, child, port, gateway=[], workers=[child.pid], extra=extra)


class MlxServer:
    """The server that comes with mlx-lm."""

    name = "mlx_lm.server"

    def __init__(self, python: Path, model: Path) -> None:
        self._python = python
        self._model = model

    @cached_property
    def _installed(self) -> bool:
        command = [str(self._python), "-c", "import mlx_lm.server"]
        try:
            return not subprocess.run(command, capture_output=True, timeout=120).returncode
        except (OSError, subprocess.SubprocessError):
            return False

    def missing(self) -> str | None:
        if not self._installed:
            return (
                f"not installed: {self._python} lacks it; pip install mlx-lm into a venv "
                "and give its python with --peers-python"
            )
        return None

    @contextmanager
    def run(self, setup: Setup, client: Player) -> Iterator[Instance]:
        port = free_port()
        command: list[str | Path] = [
            *(self._python, "-m", "mlx_lm.server", "--host", "127.0.0.1", "--port", str(port)),
            *("--model", setup.model, "--log-level", "ERROR"),
            *("--decode-concurrency", str(setup.sequences)),
        ]
        bias = {str(token): -100.0 for token in mlx_end_tokens(self._model)}
        # It batches only requests without a seed.
        extra = {"model": "default_model", "ignore_eos": None, "seed": None, "logit_bias": bias}
        with running(Child(command)) as child:
            await_http(child, port, "/health")
            yield HttpInstance(client, child, port, gateway=[], workers=[child.pid], extra=extra)


def mlx_end_tokens(folder: Path) -> list[int]:
    """The tokens that end an answer, from the folder's configuration."""
    tokens: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((folder / name).read_text()).get("eos_token_id")
            tokens.update(found if isinstance(found, list) else [] if found is None else [found])
    return sorted(tokens)
