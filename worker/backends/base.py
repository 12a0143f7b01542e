"""The interface between the engine and an inference library.

A backend works on token ids and many sequences at once: ``admit`` adds one,
``step`` moves all of them on, ``cancel`` drops one between two steps. Text,
stop strings and limits are the engine's business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Load, Loaded, Sampling
from worker.chat.conversation import Conversation

#: Called during a load with the fraction done (0..1).
ReportProgress = Callable[[float], None]


class LoadRefused(CodedError):
    """The model cannot be loaded, for a reason that has a code."""


class PromptRefused(CodedError):
    """The prompt cannot be rendered or tokenised; the request is at fault."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(ErrorCode.INVALID_VALUE, message, param=param)


class NonFiniteLogits(Exception):
    """The model produced NaN or infinity where a sequence asked for a check."""


class TokenMask(Protocol):
    """Which tokens one sequence may go on with: the state of a constraint."""

    def allowed(self) -> bytes | bytearray | memoryview:
        """One bit per token of the vocabulary, the lowest bit of a byte first; 1: allowed."""

    def accept(self, token: int) -> None:
        """The backend sampled this token; called once per token, in order."""


@dataclass(frozen=True, slots=True)
class TokenTable:
    """What the tokens of a model stand for.

    ``pieces``: the bytes that each adds to an answer, by id; none for one that adds
    nothing. ``special``: tokens that are no text but marks of their own, with their
    names: the control tokens, and what ``is_mark`` says of others that were added.
    ``encode`` makes tokens of a text, without one that begins a sequence; any thread may
    call it, also while others use the backend.
    """

    pieces: Sequence[bytes]
    special: Mapping[int, str]
    end_tokens: frozenset[int]
    encode: Callable[[str], list[int]]


def is_mark(text: str) -> bool:
    """Whether a token that was added to a vocabulary looks like a mark, as ``<think>`` does."""
    return len(text) > 2 and text.startswith("<") and text.endswith(">")


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One sequence to generate.

    ``prompt`` is never empty and, with ``max_tokens``, fits the context. With
    ``ignore_eos`` end-of-generation tokens are never sampled. ``mask`` limits what
    is sampled; where it allows nothing, or only the end, the answer ends, also with
    ``ignore_eos``. ``top_logprobs`` asks for log probabilities, of the token sampled and
    of so many of the likeliest (0: of the token alone, None: of none).

    The token at position k of the answer is drawn from a function of the seed and k
    alone: ``sampled`` is how many positions are over, for a sequence that is taken
    up again with the tokens it had made at the end of its ``prompt``. The last
    ``stepwise`` of those are computed one a step, as when they were made: the sums of a
    batch of other size may differ in their last digits, and with them what is likeliest.
    ``mask`` knows all of them.

    Without ``cache_prompt`` all of the prompt is computed, whatever is in the prompt cache, and
    nothing of it is kept there.
    """

    sequence_id: int
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    ignore_eos: bool = False
    validate_logits: bool = False
    mask: TokenMask | None = None
    top_logprobs: int | None = None
    sampled: int = 0
    stepwise: int = 0
    cache_prompt: bool = True

    @property
    def head(self) -> Sequence[int]:
        """What of the prompt is computed in any pieces."""
        return self.prompt[: len(self.prompt) - self.stepwise]

    @property
    def steps(self) -> Sequence[int]:
        """What of the prompt is computed one a step."""
        return self.prompt[len(self.prompt) - self.stepwise :]


class TokenLogprobs(NamedTuple):
    """Natural log probabilities before temperature and filters, likeliest first."""

    logprob: float
    top: Sequence[tuple[int, float]]


class StepToken(NamedTuple):
    """One token sampled for one sequence; ``is_end`` marks end-of-generation tokens.

    ``cached_tokens``, told with a sequence's first token: how much of its prompt was
    found in the KV cache.
    """

    sequence_id: int
    token: int
    is_end: bool
    cached_tokens: int = 0
    logprobs: TokenLogprobs | None = None


class Detokenizer(Protocol):
    """Turns one sequence's tokens into text, holding back incomplete characters."""

    def add(self, token: int) -> str:
        """Return the text that became complete with this token."""

    def finish(self) -> str:
        """Return what was held back; an incomplete character becomes U+FFFD."""


class EmbedInput(NamedTuple):
    """One sequence to make a vector of, and how much of the vector (None: all of it)."""

    tokens: Sequence[int]
    dimensions: int | None = None


class Embedder(Protocol):
    """A model that makes a vector, or a score, of a whole sequence of tokens.

    All calls come from the backend's thread.
    """

    @property
    def dimensions(self) -> int:
        """Of a vector; 1 for a reranker's score."""

    @property
    def batch_tokens(self) -> int:
        """About how many tokens should be computed at once, if the inputs are short."""

    @property
    def batch_sequences(self) -> int:
        """How many sequences may be computed at once."""

    def encode_input(self, text: str) -> list[int]:
        """Tokenise, with what the model wants around it. Raises ``PromptRefused``."""

    def encode_pair(self, query: str, document: str) -> list[int]:
        """Both, as a reranker wants to see them. Raises ``PromptRefused``."""

    def embed(
        self, inputs: Sequence[EmbedInput], advance: Callable[[], None]
    ) -> list[bytes | None]:
        """A vector for each input, as of ``protocol.messages``; None for one that is not finite.

        No input is empty or longer than the context. ``advance`` is called as parts of
        the work are done. After an exception the state is undefined: the process ends.
        """


class Backend(Protocol):
    """One inference library with at most one model.

    All calls come from one thread. After any exception from ``admit``, ``step``
    or ``cancel`` the state is undefined: the process ends.
    """

    @property
    def name(self) -> str:
        """``mlx``, ``llama`` or ``simulated``."""

    @property
    def version(self) -> str:
        """Version of the library, part of the key failures are counted under."""

    @property
    def prefilled(self) -> int:
        """Prompt tokens computed so far, by which a step without tokens shows that it moved on."""

    def load(self, options: Load, report: ReportProgress) -> Loaded:
        """Load the model; called once. Raises ``LoadRefused``, or anything on a fault."""

    @property
    def chat_template(self) -> str | None:
        """The source of the model's chat template; None: it has none, or a broken one."""

    def render_chat(self, conversation: Conversation) -> str:
        """Render the chat template up to the answer. Raises ``PromptRefused``."""

    def encode_rendered(self, text: str) -> list[int]:
        """Tokenise what ``render_chat`` returned. Raises ``PromptRefused``."""

    def encode_text(self, text: str, *, add_special: bool = True) -> list[int]:
        """Tokenise raw text; the beginning-of-sequence token comes first if the model wants
        one, unless ``add_special`` is False."""

    def new_detokenizer(self, markers: Collection[str] = ()) -> Detokenizer:
        """A detokeniser for one answer. Of special tokens it shows ``markers`` only."""

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, special tokens too; empty where nobody can tell."""

    def vocabulary(self) -> TokenTable | None:
        """All tokens; None if what they stand for is not known.

        Takes up to a second. The one method for another thread, once the model is loaded.
        """

    @property
    def embedder(self) -> Embedder | None:
        """What to use of a model that generates nothing, instead of the methods below."""

    def admit(self, spec: SequenceSpec) -> None:
        """Add a sequence. The caller keeps to ``Loaded.max_sequences``."""

    def step(self) -> list[StepToken]:
        """Run one prefill chunk and/or one decode step.

        The tokens of a sequence come in order; there are several where guesses were
        right, and none after one that ``is_end`` or is its last. An empty list means that
        only prefill work was done, if ``prefilled`` has grown, or nothing at all. A step
        takes seconds at most, however long a prompt is, unless the machine is so slow that
        a few tokens take longer. A sequence whose token ``is_end``, or that has
        ``max_tokens`` tokens, is gone afterwards.
        """

    def computed(self, sequence_id: int) -> int:
        """Tokens of the prompt of a sequence without an answer that are in the KV cache."""

    def cancel(self, sequence_id: int) -> None:
        """Drop a sequence; unknown ids are ignored (it may just have ended)."""

    def close(self) -> None:
        """Release the model. Called once, also after a failed load."""
