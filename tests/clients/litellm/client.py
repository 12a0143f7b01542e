"""LiteLLM on the other end of ``tests/support/foreign.py``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

# The tests run without a network; LiteLLM would ask for a newer price list first.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

BASE_URL = os.environ["BASE_URL"]
COMMON = {"api_base": f"{BASE_URL}/v1", "api_key": "none", "max_retries": 0}
# Its adapter adds the version to the address by itself.
ANTHROPIC = {**COMMON, "api_base": BASE_URL}


def completion(**options: Any) -> Any:
    return litellm.completion(**_of(options), **options).model_dump()


def stream(**options: Any) -> Any:
    """All chunks, and the answer that the library makes of them."""
    chunks = list(litellm.completion(stream=True, **_of(options), **options))
    whole = litellm.stream_chunk_builder(chunks)
    return {"chunks": _dumped(chunks), "whole": whole.model_dump()}


def text_completion(**options: Any) -> Any:
    return litellm.text_completion(**COMMON, **options).model_dump()


def responses(**options: Any) -> Any:
    return litellm.responses(**COMMON, **options).model_dump()


def embedding(**options: Any) -> Any:
    return litellm.embedding(**COMMON, **options).model_dump()


def rerank(**options: Any) -> Any:
    return litellm.rerank(**COMMON, **options).model_dump()


def _of(options: dict[str, Any]) -> dict[str, Any]:
    return ANTHROPIC if options["model"].startswith("anthropic/") else COMMON


def _dumped(models: Iterable[Any]) -> list[Any]:
    return [model.model_dump() for model in models]


CALLS: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (completion, stream, text_completion, responses, embedding, rerank)
}


def main() -> None:
    # Whatever the library prints must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": CALLS[request["call"]](**request["arguments"])}
        except Exception as error:
            status = getattr(error, "status_code", None)
            answer = {
                "error": {"type": type(error).__name__, "message": str(error), "status": status}
            }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
