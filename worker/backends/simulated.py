"""A backend without a model: plays a script, breaks when told.

Serves tests of the gateway and the fault harness; the supervisor refuses it
unless it is explicitly enabled. A script is a JSON file, see ``Script``.
"""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Collection
from pathlib import Path

import msgspec

from protocol.errors import ErrorCode
from protocol.messages import Load, Loaded, ModelKind
from worker.backends.base import (
    Detokenizer,
    Embedder,
    LoadRefused,
    ReportProgress,
    SequenceSpec,
    StepToken,
    TokenTable,
)
from worker.backends.simulated_embedding import SimulatedEmbedder
from worker.chat.conversation import Conversation
from worker.fault_acts import FaultyLink, cause
from worker.faults import BOOT_FAULTS_ENV, FAULTS_ENV, Fault, FaultPlan, FaultPoint, read_faults
from worker.link import Link

#: Prompt text is one token per UTF-8 byte; scripted tokens follow.
BYTE_TOKENS = 256


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the simulated model says and does. Delays in seconds.

    A prompt is computed ``prefill_chunk`` tokens a step (0: all at once), each of which
    takes ``prefill_delay_s``. An answer is ``tokens`` once, or for ever with ``repeat``;
    with ``ignore_eos`` it always repeats. Each token may be any text, also an empty one.
    No mask keeps it from its script. ``chat_template`` renders nothing; it tells what the
    answers mean, as that of a real model would. A ``kind`` that is no
    generator makes vectors of the bytes of its inputs, for which ``prefill_delay_s`` and
    faults at ``prompt`` hold.
    """

    tokens: list[str] = msgspec.field(default_factory=lambda: ["Hello", ",", " world", "."])
    repeat: bool = False
    chat_template: str | None = None
    context_length: int = 4096
    kind: ModelKind = ModelKind.GENERATE
    load_delay_s: float = 0.0
    prefill_chunk: int = 0
    prefill_delay_s: float = 0.0
    step_delay_s: float = 0.0
    faults: list[Fault] = []


class _ByteDetokenizer:
    """Joins the UTF-8 bytes of tokens."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(self._pieces[token])

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class SimulatedBackend:
    """See ``base.Backend``."""

    name = "simulated"
    version = "1"

    def __init__(self) -> None:
        self._script = Script()
        self._plan = FaultPlan()
        self._link: Link | None = None
        self._pieces: list[bytes] = []
        self._running: dict[int, tuple[SequenceSpec, int]] = {}
        self._prefilling: dict[int, int] = {}  # tokens still to be computed, by sequence
        self.prefilled = 0

    def wrap_link(self, link: Link) -> Link:
        """See ``link.LinkWrapper``: what is faulty here may also be what is said."""
        if os.environ.get(FAULTS_ENV) and (boot_faults := os.environ.get(BOOT_FAULTS_ENV)):
            self._plan.add(read_faults(Path(boot_faults)), Path(boot_faults))
        self._link = link
        self._strike(FaultPoint.SPAWN)
        return FaultyLink(link, self._plan)

    def load(self, options: Load, report: ReportProgress) -> Loaded:
        path = Path(options.path)
        try:
            self._script = msgspec.json.decode(path.read_bytes(), type=Script)
        except (OSError, msgspec.MsgspecError) as error:
            raise LoadRefused(ErrorCode.MODEL_INCOMPLETE, f"bad script: {error}") from error
        if self._script.faults and not os.environ.get(FAULTS_ENV):
            raise LoadRefused(
                ErrorCode.INVALID_VALUE, "this script has faults, and they are not enabled here"
            )
        self._plan.add(self._script.faults, path)
        self._pieces = [bytes([value]) for value in range(BYTE_TOKENS)]
        self._pieces += [token.encode() for token in self._script.tokens]
        self._strike(FaultPoint.LOAD)
        ticks = 10
        for tick in range(ticks):
            time.sleep(self._script.load_delay_s / ticks)
            report((tick + 1) / ticks)
        return Loaded(
            architecture="simulated",
            context_length=options.context_length or self._script.context_length,
            max_sequences=options.max_sequences,
            vocab_size=self._end_token + 1,
            has_chat_template=True,
            weights_bytes=path.stat().st_size,
            kind=self._script.kind,
            dimensions=0 if (embedder := self.embedder) is None else embedder.dimensions,
        )

    @property
    def _end_token(self) -> int:
        return BYTE_TOKENS + len(self._script.tokens)

    @property
    def chat_template(self) -> str | None:
        return self._script.chat_template

    def render_chat(self, conversation: Conversation) -> str:
        return "".join(f"{m.role}: {m.content}\n" for m in conversation.messages)

    def encode_rendered(self, text: str) -> list[int]:
        return self.encode_text(text)

    def encode_text(self, text: str, *, add_special: bool = True) -> list[int]:
        return list(text.encode())

    def new_detokenizer(self, markers: Collection[str] = ()) -> Detokenizer:
        return _ByteDetokenizer(self._pieces)

    def token_bytes(self, token: int) -> bytes:
        return self._pieces[token] if token < len(self._pieces) else b""

    def vocabulary(self) -> TokenTable | None:
        return TokenTable(
            pieces=self._pieces,
            special={self._end_token: "<end>"},
            end_tokens=frozenset([self._end_token]),
            encode=self.encode_text,
        )

    @property
    def embedder(self) -> Embedder | None:
        if self._script.kind is ModelKind.GENERATE:
            return None
        return SimulatedEmbedder(
            self._script, lambda text: self._strike(FaultPoint.PROMPT, prompt=text)
        )

    def admit(self, spec: SequenceSpec) -> None:
        self._strike(FaultPoint.PROMPT, prompt=self._text(spec))
        self._running[spec.sequence_id] = (spec, spec.sampled)
        self._prefilling[spec.sequence_id] = len(spec.prompt)

    def step(self) -> list[StepToken]:
        time.sleep(self._script.step_delay_s)
        produced = []
        for sequence_id, (spec, position) in list(self._running.items()):
            if sequence_id in self._prefilling and not self._prefill(sequence_id):
                continue
            self._strike(FaultPoint.TOKEN, n=position, prompt=self._text(spec))
            count = len(self._script.tokens)
            endless = self._script.repeat or spec.ignore_eos
            is_end = position >= count and not endless
            token = self._end_token if is_end else BYTE_TOKENS + position % count
            produced.append(StepToken(sequence_id, token, is_end))
            if is_end or position + 1 >= spec.sampled + spec.max_tokens:
                del self._running[sequence_id]
            else:
                self._running[sequence_id] = (spec, position + 1)
        return produced

    def _prefill(self, sequence_id: int) -> bool:
        """Compute a chunk; whether the prompt is complete."""
        left = self._prefilling[sequence_id]
        chunk = min(left, self._script.prefill_chunk or left)
        time.sleep(self._script.prefill_delay_s)
        self.prefilled += chunk
        self._prefilling[sequence_id] = left - chunk
        if left > chunk:
            return False
        del self._prefilling[sequence_id]
        return True

    def computed(self, sequence_id: int) -> int:
        spec, _ = self._running[sequence_id]
        return len(spec.prompt) - self._prefilling.get(sequence_id, 0)

    def cancel(self, sequence_id: int) -> None:
        self._running.pop(sequence_id, None)
        self._prefilling.pop(sequence_id, None)

    def close(self) -> None:
        self._strike(FaultPoint.CLOSE)
        self._running.clear()
        self._prefilling.clear()

    def _strike(self, at: FaultPoint, *, n: int = 0, prompt: str = "") -> None:
        for fault in self._plan.due(at, n=n, prompt=prompt):
            cause(fault, self._link)

    def _text(self, spec: SequenceSpec) -> str:
        if not self._script.faults:
            return ""
        return bytes(t for t in spec.prompt if t < BYTE_TOKENS).decode(errors="replace")
