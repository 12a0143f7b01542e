"""A conversation in the terminal: it remembers its turns and prints as text arrives."""

from __future__ import annotations

import contextlib
import sys

from supervisor.client import Client, ClientError


class Session:
    def __init__(
        self,
        client: Client,
        model: str,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
    ) -> None:
        self._client = client
        self._model = model
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._messages: list[dict[str, str]] = []
        if system is not None:
            self._messages.append({"role": "system", "content": system})

    def ask(self, question: str) -> None:
        """Print the answer and remember both. Raises ``ClientError``; then nothing is remembered.

        Ctrl-C ends the answer where it is; what was said until then counts.
        """
        messages = [*self._messages, {"role": "user", "content": question}]
        said: list[str] = []
        answer = self._client.chat(
            self._model, messages, max_tokens=self._max_tokens, temperature=self._temperature
        )
        try:
            for text in answer:
                said.append(text)
                sys.stdout.write(text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            answer.close()
        finally:
            if said:
                print(flush=True)
        self._messages = [*messages, {"role": "assistant", "content": "".join(said)}]

    def converse(self) -> None:
        """Ask line after line until the end of input. An error ends a turn, not the session."""
        # Importing it is what gives input() line editing and history.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        print(f"Talking to {self._model}. Ctrl-C stops an answer, Ctrl-D ends.", flush=True)
        while True:
            try:
                question = input("> ")
            except (EOFError, KeyboardInterrupt):
                print(flush=True)
                return
            if not question.strip():
                continue
            try:
                self.ask(question)
            except ClientError as error:
                code = f" ({error.code})" if error.code else ""
                print(f"error: {error.message}{code}", file=sys.stderr, flush=True)
