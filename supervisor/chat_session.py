"""A conversation in the terminal: it remembers its turns and prints as text arrives."""

from __future__ import annotations

import contextlib
import sys

from supervisor.client import Client, ClientError
from supervisor.terminal import plain

_FAREWELLS = ("/exit", "/quit")


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

        Ctrl-C ends the answer where it is, and is passed on; what was said until then counts.
        """
        messages = [*self._messages, {"role": "user", "content": question}]
        said: list[str] = []
        answer = self._client.chat(
            self._model, messages, max_tokens=self._max_tokens, temperature=self._temperature
        )
        try:
            for text in answer:
                said.append(text)
                sys.stdout.write(plain(text))
                sys.stdout.flush()
        except KeyboardInterrupt:
            answer.close()
            self._remember(messages, said)
            if not said:
                print(flush=True)
            raise
        finally:
            if said:
                print(flush=True)
        self._remember(messages, said)

    def _remember(self, messages: list[dict[str, str]], said: list[str]) -> None:
        self._messages = [*messages, {"role": "assistant", "content": "".join(said)}]

    def converse(self) -> None:
        """Ask line after line until the end of input. An error ends a turn, not the session.

        Raises ``ClientError`` when there is no such model, before the first question.
        """
        self._check_model()
        # Importing it is what gives input() line editing and history.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        print(
            f"Talking to {self._model}. Ctrl-C stops an answer, Ctrl-D or /exit ends.", flush=True
        )
        while True:
            try:
                question = input("> ")
            except (EOFError, KeyboardInterrupt):
                print(flush=True)
                return
            except UnicodeDecodeError:
                _complain("the line is not valid UTF-8")
                continue
            if question.strip() in _FAREWELLS:
                return
            if not question.strip():
                continue
            # Ctrl-C has ended the answer, and that is all it was for.
            with contextlib.suppress(KeyboardInterrupt):
                try:
                    self.ask(question)
                except ClientError as error:
                    _complain(str(error))

    def _check_model(self) -> None:
        try:
            self._client.check_model(self._model)
        except ClientError as error:
            if error.code != "model_not_ready":
                raise
            # It may be by the time the first question has been typed.
            _complain(str(error))


def _complain(message: str) -> None:
    print(f"error: {plain(message)}", file=sys.stderr, flush=True)
