"""The benchmark reads the same answer from a recording, however its packets were cut."""

import itertools

from benchmark.wire import read_answer
from hypothesis import given
from hypothesis import strategies as st

EVENTS = [
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"One\\n"}}]}\n\n',
    b": keep-alive\n\n",
    b'data: {"choices":[{"delta":{"content": "two"}}]}\n\n',
    b'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5}}\n\n',
    b"data: [DONE]\n\n",
]
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ANSWER = HEAD + b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in EVENTS) + b"0\r\n\r\n"


@given(st.lists(st.integers(0, len(ANSWER)), max_size=12))
def test_any_cut_of_a_stream_is_the_same_answer(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(ANSWER)]
    recording = [
        (float(end), ANSWER[start:end]) for start, end in itertools.pairwise(edges) if end > start
    ]
    answer = read_answer(0.0, recording, 5, want_text=True)
    assert (answer.text, answer.tokens, answer.prompt_tokens) == ("One\ntwo", 5, 7)
    assert not answer.error
    assert len(answer.pieces) == 2
    # Each piece arrived with the packet that completed its line.
    for at, event in zip(answer.pieces, EVENTS[1::2], strict=False):
        assert at >= ANSWER.index(event) + len(event) - 1


def test_an_error_in_place_of_an_answer_or_in_the_middle_of_it_is_told() -> None:
    refused = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy"
    assert read_answer(0.0, [(1.0, refused)], 5, want_text=False).error == "HTTP 429: busy"
    broken = (
        b"HTTP/1.1 200 OK\r\n\r\n" + EVENTS[1] + b'data: {"error":{"code":"model_crashed"}}\n\n'
    )
    answer = read_answer(0.0, [(1.0, broken)], 5, want_text=False)
    assert "model_crashed" in answer.error
    assert answer.tokens == 1
    assert read_answer(0.0, [], 5, want_text=False).error.startswith("HTTP 0")
