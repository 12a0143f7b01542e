"""The backend bare in a process: `admit` and `step` in a loop, no server, no sockets.

Takes the same plans as the client and answers them the same way. What it makes is
tokens; text is made only where a plan asks for it, after the clock has stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmark.plan import Answer, Plan, Reply, Request
from protocol.chat import ChatMessage
from protocol.messages import Load, Sampling
from worker.backends import create_backend
from worker.backends.base import Backend, SequenceSpec
from worker.chat.conversation import Conversation

#: Ids must never come twice: the backend may keep what it made under them.
_ids = iter(range(1, sys.maxsize))


class _Sequence:
    """One request; admitted when the first one has so many tokens."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.id = next(_ids)
        self.answer = Answer()
        self.tokens: list[int] = []
        self.admitted = False
        self.ended = False

    def admit(self, backend: Backend, began: float) -> None:
        body = self.request.body
        self.admitted = True
        self.answer.sent = time.monotonic() - began
        chat = Conversation([ChatMessage(**message) for message in body["messages"]])
        prompt = backend.encode_rendered(backend.render_chat(chat))
        self.answer.prompt_tokens = len(prompt)
        backend.admit(
            SequenceSpec(
                sequence_id=self.id,
                prompt=prompt,
                max_tokens=body["max_tokens"],
                sampling=_sampling(body),
                ignore_eos=True,
            )
        )


def _sampling(body: dict[str, Any]) -> Sampling:
    names = ("temperature", "top_p", "top_k", "min_p", "seed")
    return Sampling(**{name: body[name] for name in names})


def run(backend: Backend, plan: Plan) -> list[Answer]:
    sequences = [_Sequence(request) for request in plan.requests]
    running = {sequence.id: sequence for sequence in sequences}
    awaited = sequences if plan.until is None else [sequences[plan.until]]
    began = time.monotonic()
    deadline = began + plan.timeout_s
    while not all(sequence.ended for sequence in awaited):
        for sequence in sequences:
            if sequence.admitted or sequence.ended:
                continue
            if len(sequences[0].tokens) >= (sequence.request.after_reads or 0):
                sequence.admit(backend, began)
            elif sequences[0].ended:
                sequence.ended, sequence.answer.error = True, "the first answer ended too soon"
        produced = backend.step()
        now = time.monotonic()
        for produced_token in produced:
            sequence = running[produced_token.sequence_id]
            sequence.tokens.append(produced_token.token)
            sequence.answer.pieces.append(now - began)
            limit = sequence.request.body["max_tokens"]
            sequence.ended = produced_token.is_end or len(sequence.tokens) >= limit
        if now > deadline:
            for sequence in sequences:
                sequence.answer.error = f"no end after {plan.timeout_s:.0f} s"
            break
    for sequence in sequences:
        if sequence.admitted and not sequence.ended:
            backend.cancel(sequence.id)
        sequence.answer.tokens = len(sequence.tokens)
        if plan.want_text:
            detokenizer = backend.new_detokenizer()
            pieces = [detokenizer.add(token) for token in sequence.tokens]
            sequence.answer.text = "".join([*pieces, detokenizer.finish()])
    return [sequence.answer for sequence in sequences]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="tokens, for all sequences")
    arguments = parser.parse_args()
    # What a native library prints must not get into the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    backend = create_backend("mlx" if arguments.model.is_dir() else "llama")
    options = Load(
        path=str(arguments.model),
        context_length=arguments.context,
        max_sequences=arguments.sequences,
        threads=arguments.threads,
    )
    backend.load(options, lambda _: None)
    out.write(b'"ready"\n')
    out.flush()
    decode = msgspec.json.Decoder(Plan).decode
    for line in sys.stdin.buffer:
        out.write(msgspec.json.encode(Reply(run(backend, decode(line)))) + b"\n")
        out.flush()
    backend.close()


if __name__ == "__main__":
    main()
