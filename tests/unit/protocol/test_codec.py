"""Every message survives the wire; every other frame is refused, not misread."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import chat as c
from protocol import messages as m
from protocol.codec import CodecError, Encoder, FromWorkerDecoder, ToWorkerDecoder
from protocol.errors import ErrorCode
from protocol.records import Message

ids = st.integers(0, 2**63 - 1)
text = st.text(st.characters(codec="utf-8"))
floats = st.floats(allow_nan=False, allow_infinity=False)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | floats | text,
    lambda inner: st.lists(inner) | st.dictionaries(text, inner),
    max_leaves=5,
)
schemas = st.dictionaries(text, json_values, max_size=3)
logprobs = st.builds(
    c.TokenLogprob,
    ids,
    st.binary(),
    floats,
    st.lists(st.builds(c.TokenLogprob, ids, st.binary(), floats), max_size=2),
)
extras = st.builds(
    c.Extras,
    text,
    ids,
    st.lists(st.builds(c.ToolCallPiece, ids, st.none() | text, st.none() | text, text)),
    st.lists(logprobs),
    st.none() | text,
)

chat_messages = st.builds(
    c.ChatMessage,
    role=text,
    content=text,
    tool_calls=st.lists(st.builds(c.ToolCall, text, text, text), max_size=2),
    tool_call_id=st.none() | text,
)

generates = st.builds(
    m.Generate,
    request_id=ids,
    messages=st.none() | st.lists(chat_messages),
    prompt=st.none() | text | st.lists(ids),
    sampling=st.builds(
        m.Sampling,
        temperature=floats,
        seed=st.none() | st.integers(-(2**63), 2**64 - 1),
        logit_bias=st.dictionaries(ids, floats, max_size=4),
    ),
    stop=st.lists(text, max_size=4),
    tools=st.lists(st.builds(c.Tool, text, st.none() | text, schemas), max_size=2),
    tool_choice=st.sampled_from(c.ToolChoice),
    template_options=schemas,
    constraint=st.none() | st.builds(c.Constraint, st.sampled_from(c.ConstraintKind), text),
)

to_worker = st.one_of(
    st.builds(m.Load, path=text, context_length=st.none() | ids),
    generates,
    st.builds(m.Tokenize, ids, generates, st.booleans(), st.booleans()),
    st.builds(m.Detokenize, ids, st.lists(ids), text, st.sampled_from(m.Priority)),
    st.builds(
        m.Embed,
        ids,
        st.lists(text | st.lists(ids), max_size=4),
        st.none() | text,
        st.none() | ids,
    ),
    st.builds(m.Cancel, request_id=ids),
    st.just(m.Shutdown()),
)
from_worker = st.one_of(
    st.builds(m.Hello, ids, text, ids, ids, text, text),
    st.builds(m.LoadProgress, floats),
    st.builds(m.Loaded, text, ids, ids, ids, st.booleans(), ids, st.sampled_from(m.ModelKind)),
    st.builds(m.LoadFailed, st.sampled_from(ErrorCode), text),
    st.builds(m.Accepted, ids, ids),
    st.builds(m.Rejected, ids, st.sampled_from(ErrorCode), text, st.none() | text),
    st.builds(
        m.Step,
        st.lists(
            st.builds(
                m.Delta,
                ids,
                text,
                st.lists(ids),
                st.none() | st.sampled_from(m.FinishReason),
                st.none() | extras,
            )
        ),
    ),
    st.builds(m.Tokenized, ids, ids, st.lists(ids)),
    st.builds(m.Detokenized, ids, text),
    st.builds(m.Embedded, ids, st.lists(st.binary()), st.booleans()),
    st.builds(m.Beat, st.sampled_from(m.Phase), ids, ids),
    st.builds(m.BackendFault, text),
)


@given(to_worker)
def test_messages_to_the_worker_survive(message: m.ToWorker) -> None:
    assert ToWorkerDecoder()(Encoder()(message)) == message


@given(from_worker)
def test_messages_from_the_worker_survive(message: m.FromWorker) -> None:
    assert FromWorkerDecoder()(Encoder()(message)) == message


@given(from_worker)
def test_directions_are_not_interchangeable(message: m.FromWorker) -> None:
    with pytest.raises(CodecError):
        ToWorkerDecoder()(Encoder()(message))


@given(st.binary())
def test_any_other_frame_is_a_codec_error(frame: bytes) -> None:
    for decode in (ToWorkerDecoder(), FromWorkerDecoder()):
        try:
            decoded = decode(frame)
        except CodecError:
            continue
        assert isinstance(decoded, Message)


@given(from_worker, st.data())
def test_a_cut_frame_is_a_codec_error(message: m.FromWorker, data: st.DataObject) -> None:
    frame = Encoder()(message)
    cut = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(CodecError):
        FromWorkerDecoder()(frame[:cut])


def test_a_field_appended_by_a_later_version_is_ignored() -> None:
    frame = msgspec.msgpack.encode(["Beat", "decode", 7, 1, "from the future"])
    assert FromWorkerDecoder()(frame) == m.Beat(m.Phase.DECODE, 7, 1)


def test_a_request_without_the_newest_field_is_read() -> None:
    """As an older supervisor would send it: fields are only ever appended."""
    request = m.Generate(1, prompt="x", accepted_at=5.0)
    frame = msgspec.msgpack.decode(msgspec.msgpack.encode(request))
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(frame[:-1]), type=m.Generate)
    assert old == msgspec.structs.replace(request, accepted_at=None)
