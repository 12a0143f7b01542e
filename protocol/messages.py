"""Every message that crosses between the supervisor and a worker.

Frozen, tagged structs encoded as msgpack arrays: a field may be appended with a
default without breaking the other side; any other change raises
``PROTOCOL_VERSION``. Durations are seconds, sizes bytes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from protocol.chat import ChatMessage, Constraint, Extras, Tool, ToolChoice
from protocol.errors import ErrorCode
from protocol.records import Message, Record

PROTOCOL_VERSION = 2


class Phase(StrEnum):
    """What a worker is doing; the supervisor keeps one deadline per phase."""

    STARTING = "starting"
    LOAD = "load"
    IDLE = "idle"
    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(StrEnum):
    """Why a sequence ended. All but the last are OpenAI's ``finish_reason``."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CANCELLED = "cancelled"


class Priority(StrEnum):
    """The lane a request waits in."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class ModelKind(StrEnum):
    """What a loaded model is for: text, vectors, or how well documents answer a query."""

    GENERATE = "generate"
    EMBED = "embed"
    RERANK = "rerank"


class Sampling(Record, frozen=True):
    """How the next token is drawn.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and
    ``repetition_penalty`` 1 switch the respective filter off. The repetition
    penalty sees prompt and answer, presence and frequency penalties the answer
    only. Filters run before the temperature.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = {}


# --- supervisor to worker ----------------------------------------------------


class Load(Message, frozen=True):
    """Load the model at ``path``; the first message after the handshake.

    ``context_length`` is in tokens per sequence (None: the model's own, within
    the backend's default bound); ``threads`` None leaves the choice to the
    backend. ``prompt_cache_bytes`` bounds the KV cache kept of ended requests for
    later ones that begin alike (0: none is kept, None: the backend's default).
    ``draft_tokens`` is how many tokens are guessed ahead at most, by backends that can
    (0: none); what is sampled is the same. ``draft_path`` is a smaller model that guesses,
    for backends that can use one. ``tool_format`` names how the model writes
    tool calls, where its chat template does not tell (None: it does). An answer that goes on
    with at most ``exact_tokens`` has them computed one a step, as they were made.
    """

    path: str
    context_length: int | None = None
    max_sequences: int = 1
    threads: int | None = None
    prompt_cache_bytes: int | None = None
    draft_tokens: int = 0
    draft_path: str | None = None
    tool_format: str | None = None
    exact_tokens: int = 1024


class Generate(Message, frozen=True):
    """Run one request: either ``messages`` (a chat) or ``prompt`` (text or token ids).

    ``max_tokens`` None means: until the model stops or the context is full.
    ``validate_logits`` makes a NaN or infinite logit a backend fault; it costs a
    pass over the vocabulary per token, so only the canary asks for it. ``client``
    is whose request it is, for fairness: any text, equal for the same client.

    Of a chat only: ``tools`` and how they may be used, ``template_options``, further
    variables for the chat template. ``constraint`` is what the answer must match;
    ``top_logprobs`` asks for log probabilities, and for so many of the likeliest
    tokens (None: for none). ``echo`` puts the prompt's text before the answer. ``raw``:
    the answer to a chat is the text as the model writes it, with its reasoning and calls.
    Without ``cache_prompt`` all of the prompt is computed anew, and nothing of it is kept.

    ``resume_tokens`` are what a worker that is no more had made of the answer: it goes on
    behind them, and of what they mean nothing is told again. They count in ``max_tokens``.

    ``accepted_at``, in epoch seconds, is what a chat template takes for now, however often and
    whenever the request is run (None: the time of the run).
    """

    request_id: int
    messages: list[ChatMessage] | None = None
    prompt: str | list[int] | None = None
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    stop: list[str] = []
    ignore_eos: bool = False
    validate_logits: bool = False
    client: str = ""
    priority: Priority = Priority.NORMAL
    tools: list[Tool] = []
    tool_choice: ToolChoice = ToolChoice.AUTO
    named_tool: str | None = None
    parallel_tool_calls: bool = True
    template_options: dict[str, Any] = {}
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    echo: bool = False
    cache_prompt: bool = True
    raw: bool = False
    resume_tokens: list[int] = []
    accepted_at: float | None = None


class Tokenize(Message, frozen=True):
    """Tell the tokens of the prompt that ``generate`` would have, however many they are;
    nothing is generated. Answered by ``Tokenized`` or ``Rejected``.

    With ``count_only`` only their number is told. ``add_special``: a prompt that is text
    begins with what this model's prompts begin with.
    """

    request_id: int
    generate: Generate
    count_only: bool = False
    add_special: bool = True


class Detokenize(Message, frozen=True):
    """Tell the text of tokens, special ones too; answered by ``Detokenized`` or ``Rejected``."""

    request_id: int
    tokens: list[int]
    client: str = ""
    priority: Priority = Priority.NORMAL


class Embed(Message, frozen=True):
    """Make one vector of each of ``inputs``, texts or token ids.

    With a ``query``, which is for a reranker: how well each text answers it, as a vector
    of one number from 0 to 1. Other vectors have length 1, and the first ``dimensions``
    of the model's dimensions (None: all). ``client`` and ``priority`` as of ``Generate``.
    """

    request_id: int
    inputs: list[str | list[int]]
    query: str | None = None
    dimensions: int | None = None
    client: str = ""
    priority: Priority = Priority.NORMAL


class Cancel(Message, frozen=True):
    """Stop a request between two steps; answered by a ``cancelled`` delta."""

    request_id: int


class Shutdown(Message, frozen=True):
    """Stop after the current step and exit with status 0."""


# --- worker to supervisor ----------------------------------------------------


class Hello(Message, frozen=True):
    """First message of a worker, before it loads anything."""

    protocol_version: int
    nonce: str
    pid: int
    generation: int
    backend: str
    backend_version: str


class LoadProgress(Message, frozen=True):
    """``fraction`` (0..1) of the load is done."""

    fraction: float


class Loaded(Message, frozen=True):
    """The model is in memory and can take requests.

    ``context_length`` is in tokens per sequence; ``weights_bytes`` is the size
    of the weights as stored. ``tool_format`` and ``reasoning`` are how tool calls and
    reasoning are written, both empty without a chat template. ``dimensions``: of the
    vectors of a model that makes such, 1 for a reranker.
    """

    architecture: str
    context_length: int
    max_sequences: int
    vocab_size: int
    has_chat_template: bool
    weights_bytes: int
    tool_format: str = ""
    reasoning: str = ""
    kind: ModelKind = ModelKind.GENERATE
    dimensions: int = 0


class LoadFailed(Message, frozen=True):
    """The load ended in a failure that the worker could name; it exits afterwards."""

    code: ErrorCode
    message: str


class Accepted(Message, frozen=True):
    """The request is valid and waits for, or has, a slot."""

    request_id: int
    prompt_tokens: int


class Started(Message, frozen=True):
    """The prompt is in the KV cache and the first token is about to follow.

    ``cached_tokens`` of the prompt were there before and have not been computed.
    """

    request_id: int
    cached_tokens: int


class Prefilled(Message, frozen=True):
    """``computed`` of the ``total`` tokens of a prompt are in the KV cache, those found there
    counted in. Told about once a second until the request has started."""

    request_id: int
    computed: int
    total: int


class Rejected(Message, frozen=True):
    """The request is at fault; nothing was generated for it."""

    request_id: int
    code: ErrorCode
    message: str
    param: str | None = None


class Delta(Record, frozen=True):
    """What one step added to one request.

    ``text`` may be empty while a multi-byte character or a possible stop string
    is incomplete; ``tokens`` are the ids sampled since the last delta. The last
    delta of a request has a ``finish``. ``extras`` are rare, or at least not for all.
    """

    request_id: int
    text: str
    tokens: list[int]
    finish: FinishReason | None = None
    extras: Extras | None = None


class Step(Message, frozen=True):
    """All the deltas of one decode step."""

    deltas: list[Delta]


class Tokenized(Message, frozen=True):
    """``tokens`` is empty where only the count was asked for."""

    request_id: int
    count: int
    tokens: list[int] = []


class Detokenized(Message, frozen=True):
    """The text of the tokens that were asked about."""

    request_id: int
    text: str


class Embedded(Message, frozen=True):
    """The next vectors of an ``Embed``, in the order of its inputs; ``last``: there are no more.

    Each is 32-bit floats, little endian. What the inputs have of tokens together was
    said with ``Accepted``, and that the first of them are being computed with ``Started``.
    """

    request_id: int
    vectors: list[bytes]
    last: bool


class Beat(Message, frozen=True):
    """Sign of life from the worker's I/O thread.

    ``progress`` grows with every load callback, prefill chunk and decode step;
    ``in_hand`` is the number of requests not yet finished.
    """

    phase: Phase
    progress: int
    in_hand: int


class BackendFault(Message, frozen=True):
    """The backend raised while generating; the worker exits right after this."""

    message: str


#: What runs on a loaded model.
Job = Generate | Embed

#: What the worker answers without a slot, beside its requests.
Inquiry = Tokenize | Detokenize
InquiryAnswer = Tokenized | Detokenized

ToWorker = Load | Generate | Embed | Tokenize | Detokenize | Cancel | Shutdown
FromWorker = (
    Hello
    | LoadProgress
    | Loaded
    | LoadFailed
    | Accepted
    | Prefilled
    | Started
    | Rejected
    | Step
    | Tokenized
    | Detokenized
    | Embedded
    | Beat
    | BackendFault
)
