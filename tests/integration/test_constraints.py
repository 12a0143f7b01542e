"""Whatever a schema asks for, an answer that ends has it: on a model that writes at random."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from protocol.chat import Constraint, ConstraintKind
from protocol.errors import ErrorCode
from protocol.messages import Accepted, FinishReason, Generate, Load, Rejected, Sampling
from tests.support.tiny_vocab import TURN_START, tiny_vocab
from worker.backends import create_backend
from worker.backends.base import LoadRefused, SequenceSpec, StepToken
from worker.constraints import Grammars
from worker.engine import Engine
from worker.vitals import Vitals

SEQUENCES = 4
MAX_TOKENS = 700
PROMPT = "The capital of France"


class Rig:
    """A backend with its engine; ``answers`` runs requests together, to the end."""

    def __init__(self, name: str, path: Path) -> None:
        self.backend = create_backend(name)
        load = Load(str(path), context_length=1024, max_sequences=SEQUENCES, threads=1)
        self.model = self.backend.load(load, lambda _fraction: None)
        self.engine = Engine(self.backend, self.model, Vitals())
        self._ids = count(1)

    def close(self) -> None:
        self.engine.close()
        self.backend.close()

    def answers(
        self, *constraints: Constraint | None, **options: Any
    ) -> list[tuple[str, FinishReason | None] | Rejected]:
        """Text and finish of each, or its refusal."""
        defaults: dict[str, Any] = {"prompt": PROMPT, "max_tokens": MAX_TOKENS}
        requests = [
            Generate(next(self._ids), constraint=each, **(defaults | options))
            for each in constraints
        ]
        texts = {request.request_id: "" for request in requests}
        finishes: dict[int, FinishReason | None] = dict.fromkeys(texts)
        refusals: dict[int, Rejected] = {}
        answered = [self.engine.submit(request) for request in requests]
        assert [answer is None for answer in answered] == [c is not None for c in constraints]
        while not self.engine.idle:
            progress = self.engine.step()
            refusals |= {r.request_id: r for r in progress.settled if isinstance(r, Rejected)}
            for delta in progress.deltas:
                texts[delta.request_id] += delta.text
                finishes[delta.request_id] = delta.finish
        return [refusals.get(i) or (texts[i], finishes[i]) for i in texts]

    def answer(self, constraint: Constraint | None, **options: Any) -> tuple[str, Any]:
        (answer,) = self.answers(constraint, **options)
        assert not isinstance(answer, Rejected), answer
        return answer


@contextmanager
def rig_of(name: str, path: Path) -> Iterator[Rig]:
    rig = Rig(name, path)
    yield rig
    rig.close()


@pytest.fixture(scope="module", params=["llama", "mlx"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    try:
        create_backend(request.param)
    except LoadRefused as error:
        pytest.skip(error.message)
    model = {"llama": "tiny_gguf", "mlx": "tiny_mlx"}[request.param]
    with rig_of(request.param, request.getfixturevalue(model)) as rig:
        yield rig


def schema(value: object) -> Constraint:
    return Constraint(ConstraintKind.SCHEMA, json.dumps(value))


def regex(text: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, text)


def lark(text: str) -> Constraint:
    return Constraint(ConstraintKind.LARK, text)


GREEDY = Sampling(temperature=0)
PERSON = schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)

# --- schemas ------------------------------------------------------------------

# Control characters have no spelling without \u; these have one of their own.
TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]) | st.sampled_from("\n\t")
)
SCALARS = st.none() | st.booleans() | st.integers(-1000, 1000) | TEXTS.filter(lambda t: len(t) < 9)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def bounded(draw: st.DrawFn, low: int, high: int, least: str, most: str) -> dict[str, int]:
    """Two keywords for the bounds; the upper one always, so that an answer ends."""
    first, second = sorted((draw(st.integers(low, high)), draw(st.integers(low, high))))
    return draw(st.sampled_from([{}, {least: first}])) | {most: second}


STRINGS = bounded(0, 8, "minLength", "maxLength").map(lambda b: {"type": "string"} | b)
PATTERNS = st.sampled_from(
    ["^[a-f]{1,5}$", r"^\d{4}-\d{2}$", "^(red|green|blue)$", r"^\w{2,6}$", "^[^a-z]{3}$", "^é?ü+x$"]
).map(lambda pattern: {"type": "string", "pattern": pattern})
INTEGERS = bounded(-300, 300, "minimum", "maximum").map(
    lambda b: {"type": "integer", "minimum": b["maximum"] - 70} | b
)
MULTIPLES = st.integers(2, 9).map(
    lambda n: {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": n}
)
NUMBERS = bounded(-300, 300, "minimum", "maximum").map(lambda b: {"type": "number"} | b)
FORMATS = st.sampled_from(["date", "uuid", "ipv4", "time"]).map(
    lambda name: {"type": "string", "format": name}
)
CHOICES = st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values})
LEAVES = st.one_of(
    STRINGS,
    PATTERNS,
    INTEGERS,
    MULTIPLES,
    NUMBERS,
    FORMATS,
    CHOICES,
    VALUES.map(lambda value: {"const": value}),
    st.sampled_from(["boolean", "null"]).map(lambda name: {"type": name}),
    st.just({"type": ["boolean", "null"]}),
)


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    properties = draw(st.dictionaries(TEXTS, inner, max_size=4))
    required = (
        draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    )
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def arrays(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    bounds = bounded(0, 4, "minItems", "maxItems")
    plain = st.tuples(inner, bounds).map(lambda p: {"type": "array", "items": p[0]} | p[1])
    tuples = st.lists(inner, min_size=1, max_size=3).map(
        lambda each: {
            "type": "array",
            "prefixItems": each,
            "items": False,
            "minItems": len(each),
        }
    )
    return plain | tuples


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        arrays(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each}),
    ),
    max_leaves=6,
)
SCHEMAS |= SCHEMAS.map(lambda each: {"$ref": "#/$defs/it", "$defs": {"it": each}})


def check(text: str, wanted: dict[str, Any]) -> None:
    text.encode()
    jsonschema.Draft202012Validator(wanted).validate(json.loads(text))


cut: list[bool] = []

#: Schemas that are answered together, how hot, and the seed.
Batch = tuple[list[dict[str, Any]], float, int]
BATCHES = given(
    st.tuples(
        st.lists(SCHEMAS, min_size=SEQUENCES, max_size=SEQUENCES),
        st.sampled_from([1.5, 2.0]),
        st.integers(0, 2**32),
    )
)


def some(examples: int) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, suppress_health_check=checks)


def check_batch(rig: Rig, batch: Batch) -> None:
    wanted, temperature, seed = batch
    sampling = Sampling(temperature=temperature, seed=seed)
    answers = rig.answers(*map(schema, wanted), sampling=sampling)
    for each, answer in zip(wanted, answers, strict=True):
        assert not isinstance(answer, Rejected), (each, answer)
        text, finish = answer
        cut.append(finish is FinishReason.LENGTH)
        if finish is FinishReason.STOP:
            check(text, each)


@pytest.mark.parametrize("rig", ["llama"], indirect=True)
@some(100)
@BATCHES
def test_what_ends_is_valid(rig: Rig, batch: Batch) -> None:
    check_batch(rig, batch)


@pytest.mark.parametrize("rig", ["mlx"], indirect=True)
@some(15)
@BATCHES
def test_what_ends_is_valid_on_mlx(rig: Rig, batch: Batch) -> None:
    check_batch(rig, batch)


def test_few_were_cut_short() -> None:
    assert sum(cut) <= len(cut) / 50


def test_any_object(rig: Rig) -> None:
    # Left to itself the model would not find an end.
    eager = {tiny_vocab().id_of('"'): 4.0, tiny_vocab().id_of("}"): 4.0}
    ended = 0
    for seed in range(3):
        hot = Sampling(temperature=2.0, seed=seed, logit_bias=eager)
        for answer in rig.answers(*[Constraint(ConstraintKind.JSON)] * SEQUENCES, sampling=hot):
            assert not isinstance(answer, Rejected)
            text, finish = answer
            if finish is FinishReason.STOP:
                ended += 1
                assert isinstance(json.loads(text), dict)
    assert ended


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_regex(rig: Rig, ignore_eos: bool) -> None:
    for seed in range(8):
        hot = Sampling(temperature=2.0, seed=seed)
        wanted = r"(yes|no): [a-zé]{3,10}( \d)?"
        text, finish = rig.answer(regex(wanted), sampling=hot, ignore_eos=ignore_eos)
        assert finish is FinishReason.STOP
        assert re.fullmatch(wanted, text)


def test_lark_with_special_tokens_and_a_schema(rig: Rig) -> None:
    grammar = (
        f"start: {TURN_START} <tool_call> "
        '%json {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], '
        '"additionalProperties": false} </tool_call>'
    )
    text, finish = rig.answer(lark(grammar), sampling=Sampling(temperature=2.0, seed=1))
    assert finish is FinishReason.STOP
    assert text.startswith("<tool_call>{")
    assert text.endswith("}</tool_call>")
    body = text.removeprefix("<tool_call>").removesuffix("</tool_call>")
    assert json.loads(body)["n"] in (1, 2)


def test_forced_text_has_the_tokens_of_the_tokenizer(rig: Rig) -> None:
    wanted = '"The capital of France is Paris"'
    request = Generate(9001, prompt="x", constraint=schema({"const": wanted.strip('"')}))
    assert rig.engine.submit(request) is None
    tokens: list[int] = []
    while not rig.engine.idle:
        for delta in rig.engine.step().deltas:
            tokens += delta.tokens
    *text, end = tokens
    assert text == tiny_vocab().tokenizer.encode(wanted).ids
    table = rig.backend.vocabulary()
    assert table is not None
    assert end in table.end_tokens


def test_length_is_length(rig: Rig) -> None:
    text, finish = rig.answer(regex("a{50,60}"), max_tokens=5)
    assert finish is FinishReason.LENGTH
    assert set(text) == {"a"}


# --- the company it keeps -----------------------------------------------------


def steps(rig: Rig, *specs: SequenceSpec) -> dict[int, list[StepToken]]:
    answers: dict[int, list[StepToken]] = {each.sequence_id: [] for each in specs}
    left = {each.sequence_id: each.max_tokens for each in specs}
    for each in specs:
        rig.backend.admit(each)
    while left:
        for token in rig.backend.step():
            answers[token.sequence_id].append(token)
            left[token.sequence_id] -= 1
            if token.is_end or not left[token.sequence_id]:
                del left[token.sequence_id]
    return answers


def test_the_others_answer_as_without_them(rig: Rig) -> None:
    table = rig.backend.vocabulary()
    assert table is not None
    grammars = Grammars(table, rig.model.vocab_size)
    prompts = [rig.backend.encode_text(text) for text in (PROMPT, "She said", "Hello", "What")]
    plain = [
        SequenceSpec(number, prompt, 60, GREEDY, ignore_eos=True, top_logprobs=2)
        for number, prompt in enumerate(prompts)
    ]
    alone = {each.sequence_id: steps(rig, each)[each.sequence_id] for each in plain}
    masked = [
        replace(plain[1], mask=grammars.create_mask(PERSON)),
        replace(plain[2], mask=grammars.create_mask(regex("[a-z]{9}!"))),
    ]
    together = steps(rig, plain[0], *masked, plain[3])
    for number in (0, 3):
        assert_alike(together[number], alone[number])
    detokenizer = rig.backend.new_detokenizer()
    written = "".join(detokenizer.add(each.token) for each in together[2])
    assert re.fullmatch("[a-z]{9}!", written)
    assert together[1][-1].is_end


def assert_alike(made: list[StepToken], expected: list[StepToken]) -> None:
    """Greedy answers may part where two tokens are as good as equally likely.

    In another batch the logits differ in their last bits.
    """
    for token, known in zip(made, expected, strict=True):
        if token.token != known.token:
            assert known.logprobs is not None
            (first, best), (second, next_best) = known.logprobs.top
            assert {token.token, known.token} == {first, second}
            assert best - next_best < 0.01
            return


# --- refusals -----------------------------------------------------------------


def test_refused_while_others_are_served(rig: Rig) -> None:
    unsupported = schema({"type": "array", "uniqueItems": True, "contains": {}})
    refused, served = rig.answers(unsupported, PERSON, sampling=Sampling(seed=5))
    assert isinstance(refused, Rejected)
    assert (refused.code, refused.param) == (ErrorCode.INVALID_VALUE, "response_format")
    assert '"contains", "uniqueItems"' in refused.message
    assert not isinstance(served, Rejected)
    check(served[0], json.loads(PERSON.text))


def test_a_prompt_at_fault_is_refused_before_anything_is_compiled(rig: Rig) -> None:
    answer = rig.engine.submit(Generate(9002, prompt="", constraint=PERSON))
    assert isinstance(answer, Rejected)
    assert answer.param == "prompt"
    assert rig.engine.idle


def test_accepted_before_it_starts(rig: Rig) -> None:
    assert rig.engine.submit(Generate(9003, prompt="x", max_tokens=1, constraint=PERSON)) is None
    settled, started = 0, 0
    for step in range(1000):
        progress = rig.engine.step()
        if progress.settled:
            assert isinstance(progress.settled[0], Accepted)
            settled = step
        if progress.started:
            started = step
            break
    assert settled <= started
    rig.engine.cancel(9003)
