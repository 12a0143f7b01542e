"""The models that other tests run on are what those tests take them for."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.support import bad_gguf
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_mlx import write_tiny_mlx
from tests.support.tiny_vocab import tiny_vocab

PROMPTS = (
    "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhat is the capital of France? 你好 🎉<|im_end|>\n<|im_start|>assistant\n",
)
TOKENS = 24
DAMAGES: dict[str, Callable[[Path, Path], Path]] = {
    "truncated": bad_gguf.write_truncated,
    "truncated header": lambda path, _: bad_gguf.write_truncated_header(path),
    "garbage": lambda path, _: bad_gguf.write_garbage(path),
    "empty": lambda path, _: bad_gguf.write_empty(path),
    "future version": bad_gguf.write_future_version,
    "bad tensor count": bad_gguf.write_bad_tensor_count,
    "bad metadata count": bad_gguf.write_bad_metadata_count,
}


def llama(path: Path) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, verbose=False)


def greedy_llama(path: Path, prompt: str) -> tuple[list[int], str]:
    model = llama(path)
    prompt_ids = model.tokenize(prompt.encode(), add_bos=False, special=True)
    ids = list(islice(model.generate(prompt_ids, temp=0.0, repeat_penalty=1.0), TOKENS))
    text: str = model.detokenize(ids).decode()
    model.close()
    return ids, text


def greedy_mlx(directory: Path, prompt: str) -> tuple[list[int], str]:
    mlx_lm = pytest.importorskip("mlx_lm")
    model, tokenizer = mlx_lm.load(str(directory))
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    ids = [r.token for r in mlx_lm.stream_generate(model, tokenizer, prompt_ids, max_tokens=TOKENS)]
    return ids, tokenizer.decode(ids)


def assert_readable(ids: Sequence[int], text: str) -> None:
    assert len(ids) == TOKENS
    assert text.strip()
    assert text.isprintable()
    assert len(set(ids)) > TOKENS // 2


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tiny_gguf_writes_readable_text(tiny_gguf: Path, prompt: str) -> None:
    assert_readable(*greedy_llama(tiny_gguf, prompt))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tiny_mlx_writes_readable_text(tiny_mlx: Path, prompt: str) -> None:
    assert_readable(*greedy_mlx(tiny_mlx, prompt))


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "qwen3"},
        {"quantised": True},
        {"architecture": "qwen3", "quantised": True, "shards": 3},
        {"extra_embedding_rows": 60},
    ],
    ids=str,
)
def test_every_kind_of_tiny_mlx_writes_readable_text(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    directory = write_tiny_mlx(tmp_path / "model", **options)
    assert_readable(*greedy_mlx(directory, PROMPTS[0]))


def test_one_seed_is_one_model_in_both_formats(tiny_gguf: Path, tiny_mlx: Path) -> None:
    assert greedy_llama(tiny_gguf, PROMPTS[0]) == greedy_mlx(tiny_mlx, PROMPTS[0])


def test_llama_cpp_splits_text_as_the_shared_tokenizer_does(tiny_gguf: Path) -> None:
    text = "Hello 你好 🎉, the capital\n\tof France: <think>naïve</think>"
    model = llama(tiny_gguf)
    ids = model.tokenize(text.encode(), add_bos=False, special=True)
    assert ids == tiny_vocab().tokenizer.encode(text).ids
    assert model.detokenize(ids).decode() == text
    model.close()


def test_a_stuck_model_repeats_one_token(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "stuck.gguf", flaw="stuck")
    ids, _ = greedy_llama(path, PROMPTS[0])
    assert len(set(ids)) == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_llama_cpp_refuses_a_damaged_file(tmp_path: Path, tiny_gguf: Path, damage: str) -> None:
    with pytest.raises(ValueError, match="Failed to load model"):
        llama(DAMAGES[damage](tmp_path / "bad.gguf", tiny_gguf))


@pytest.mark.parametrize(
    "options", [{"architecture": "nosucharch"}, {"extra_embedding_rows": 64}], ids=str
)
def test_llama_cpp_refuses_a_model_that_does_not_fit(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="Failed to load model"):
        llama(write_tiny_gguf(tmp_path / "odd.gguf", **options))


def test_the_demo_model_answers_in_both_formats(demo_gguf: Path, demo_mlx: Path) -> None:
    assert "Paris" in greedy_llama(demo_gguf, PROMPTS[1])[1]
    assert "Paris" in greedy_mlx(demo_mlx, PROMPTS[1])[1]
