"""GGUF files, good and bad, through a running server: the right code at once."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import bad_gguf
from tests.support.server import Server, polls, serve
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_mlx import write_tiny_mlx

#: Makes a bad file at the first path, perhaps out of the good one at the second.
Make = Callable[[Path, Path], object]


def without_source(make: Callable[[Path], object]) -> Make:
    return lambda path, whole: make(path)


def made_with(**options: Any) -> Make:
    return lambda path, whole: write_tiny_gguf(path, **options)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with one good model in use, which no bad one may disturb."""
    folder = tmp_path_factory.mktemp("gguf")
    good = write_tiny_gguf(folder / "good.gguf")
    with serve(folder / "home", f"--model={good}") as running:
        running.await_state("good", "routable")
        yield running


def assert_refused(server: Server, path: Path, status: int, code: str) -> str:
    """The load is refused with this code, nothing is left of it, the good model is well."""
    pid = server.model("good")["pid"]
    answer = server.load(str(path))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    for _ in polls(10):
        if [worker.pid for worker in server.workers()] == [pid]:
            break
    assert [worker.pid for worker in server.workers()] == [pid]
    assert server.chat("good", max_tokens=2).status_code == 200
    message = error["message"]
    assert isinstance(message, str)
    return message


@pytest.mark.parametrize(
    ("make", "status", "code"),
    [
        (without_source(bad_gguf.write_empty), 409, "model_incomplete"),
        (bad_gguf.write_truncated, 409, "model_incomplete"),
        (without_source(bad_gguf.write_truncated_header), 409, "model_incomplete"),
        (without_source(bad_gguf.write_garbage), 422, "model_unsupported_backend"),
        (bad_gguf.write_future_version, 422, "model_unsupported_backend"),
        (bad_gguf.write_bad_tensor_count, 409, "model_incomplete"),
        (bad_gguf.write_bad_metadata_count, 409, "model_incomplete"),
        (made_with(architecture="nosucharch"), 422, "model_unsupported_arch"),
        (made_with(architecture="llada"), 422, "model_unsupported_arch"),
        (made_with(extra_embedding_rows=7), 409, "model_incomplete"),
        (made_with(flaw="nan"), 409, "model_canary_failed"),
        (made_with(flaw="stuck"), 409, "model_canary_failed"),
    ],
    ids=[
        *(
            "empty",
            "truncated",
            "cut-header",
            "garbage",
            "future",
            "tensor-count",
            "metadata-count",
        ),
        *("unknown-arch", "diffusion", "vocabulary", "nan-weights", "stuck-weights"),
    ],
)
def test_a_bad_gguf(
    server: Server,
    tmp_path: Path,
    tiny_gguf: Path,
    make: Make,
    status: int,
    code: str,
    request: pytest.FixtureRequest,
) -> None:
    name = f"bad-{request.node.callspec.id}"
    path = tmp_path / f"{name}.gguf"
    make(path, tiny_gguf)
    if code == "model_canary_failed":
        # Counted, so the server tries again: unload it to be left with the good one.
        answer = server.load(str(path))
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        server.http.post("/admin/models/unload", json={"model_id": name})
        return
    assert_refused(server, path, status, code)


def test_a_model_in_parts(server: Server, tmp_path: Path) -> None:
    first, second, *_ = sorted(
        write_tiny_gguf(tmp_path / "split.gguf", tensors_per_part=16).parent.iterdir()
    )
    answer = server.load("split", path=str(first))
    assert answer.status_code == 200, answer.text
    assert server.chat("split", max_tokens=2).status_code == 200
    server.http.post("/admin/models/unload", json={"model_id": "split"})
    second.unlink()
    assert second.name in assert_refused(server, first, 409, "model_incomplete")


def test_a_missing_path(server: Server, tmp_path: Path) -> None:
    assert_refused(server, tmp_path / "nowhere.gguf", 404, "model_not_found")


def no_config(path: Path) -> str:
    (path / "config.json").unlink()
    return "config.json"


def missing_shard(path: Path) -> str:
    shutil.rmtree(path)
    write_tiny_mlx(path, shards=3)
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    return shard.name


def truncated_weights(path: Path) -> str:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return weights.name


def no_tokenizer(path: Path) -> str:
    (path / "tokenizer.json").unlink()
    return "tokenizer"


@pytest.mark.parametrize("spoil", [no_config, missing_shard, truncated_weights, no_tokenizer])
def test_an_incomplete_mlx_folder_names_what_is_missing(
    server: Server, tmp_path: Path, tiny_mlx: Path, spoil: Callable[[Path], str]
) -> None:
    path = tmp_path / "incomplete"
    shutil.copytree(tiny_mlx, path)
    missing = spoil(path)
    assert missing in assert_refused(server, path, 409, "model_incomplete")


def test_an_mlx_folder_of_an_unknown_architecture(server: Server, tmp_path: Path) -> None:
    path = write_tiny_mlx(tmp_path / "odd", model_type="nosucharch")
    assert_refused(server, path, 422, "model_unsupported_arch")


def test_a_folder_that_is_no_model(server: Server, tmp_path: Path) -> None:
    assert_refused(server, tmp_path, 409, "model_incomplete")


def test_a_model_without_a_chat_template_takes_prompts_only(server: Server, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "base.gguf", chat_template=None)
    assert server.load(str(path)).status_code == 200
    refused = server.chat("base")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
    plain = server.http.post(
        "/v1/completions", json={"model": "base", "prompt": "Hello", "max_tokens": 3}
    )
    assert plain.status_code == 200
    server.http.post("/admin/models/unload", json={"model_id": "base"})


def test_a_hostile_chat_template_runs_no_code(server: Server, tmp_path: Path) -> None:
    stolen = tmp_path / "stolen"
    template = (
        "{{ cycler.__init__.__globals__.os.system('touch " + str(stolen) + "') }}"
        "{{ messages[0].content }}"
    )
    path = write_tiny_gguf(tmp_path / "hostile.gguf", chat_template=template)
    assert server.load(str(path)).status_code == 200
    refused = server.chat("hostile")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
    assert not stolen.exists()
    server.http.post("/admin/models/unload", json={"model_id": "hostile"})
