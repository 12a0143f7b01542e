"""What constraints cost: the vocabulary, a compile, a mask, and other answers' tokens.

On the demo model, or the GGUF file or MLX folder that is named; PYTHONPATH has to have
the repository and scripts/. Masks are timed along an answer that the model gives. What
they cost the others in a batch is in the last lines: of steps taken in turns with and
without a mask, the lower quartile, as what disturbs a machine only ever adds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from demo_model import demo_model

from protocol.chat import Constraint, ConstraintKind
from protocol.messages import Load, Sampling
from worker.backends import create_backend
from worker.backends.base import Backend, SequenceSpec
from worker.constraints import GrammarMask, Grammars

TOKENS = 120
REPETITIONS = 10
PROMPT = "A person, as a JSON object with all that is known of them:\n"
ADDRESS = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "maxLength": 60},
        "city": {"type": "string", "pattern": "^[A-Z][a-z]+( [A-Z][a-z]+)*$"},
        "postcode": {"type": "string", "pattern": "^[0-9]{5}$"},
    },
    "required": ["street", "city", "postcode"],
    "additionalProperties": False,
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "born": {"type": "string", "format": "date"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "role": {"enum": ["student", "teacher", "engineer", "painter"]},
        "addresses": {"type": "array", "items": ADDRESS, "minItems": 1, "maxItems": 3},
        "skills": {"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 8},
        "remark": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["name", "born", "age", "role", "addresses", "skills", "remark"],
    "additionalProperties": False,
}
CONSTRAINTS = {
    "json_object": Constraint(ConstraintKind.JSON),
    "schema of a person": Constraint(ConstraintKind.SCHEMA, json.dumps(PERSON)),
    "regular expression": Constraint(ConstraintKind.REGEX, "([A-Z][a-z]+ ){200}"),
}


class TimedMask:
    """A mask that keeps what each token took, in seconds: to allow some, and to accept one."""

    def __init__(self, mask: GrammarMask) -> None:
        self._mask = mask
        self.seconds: list[float] = []

    def allowed(self) -> bytes:
        before = self._mask.seconds
        allowed = self._mask.allowed()
        self.seconds.append(self._mask.seconds - before)
        return allowed

    def accept(self, token: int) -> None:
        before = self._mask.seconds
        self._mask.accept(token)
        self.seconds[-1] += self._mask.seconds - before


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else demo_model()
    backend = create_backend("mlx" if path.is_dir() else "llama")
    load = Load(str(path), context_length=2048, max_sequences=4, prompt_cache_bytes=0)
    model = backend.load(load, lambda _fraction: None)
    begun = time.perf_counter()
    table = backend.vocabulary()
    if table is None:
        sys.exit("the tokens of this model do not stand for bytes")
    read = time.perf_counter()
    grammars = Grammars(table, model.vocab_size)
    built = time.perf_counter()
    print(f"{path.name} on {backend.name}, {model.vocab_size:,} tokens")
    print(f"vocabulary: read in {_ms(read - begun)}, indexed in {_ms(built - read)}")
    prompt = backend.encode_text(PROMPT)
    for name, constraint in CONSTRAINTS.items():
        begun = time.perf_counter()
        mask = TimedMask(grammars.create_mask(constraint))
        compiled = time.perf_counter() - begun
        _run(backend, [_spec(1, prompt, mask)])
        print(f"{name}: compiled in {_ms(compiled)}, masks in µs: {_spread(mask.seconds)}")
    for name, constraint in CONSTRAINTS.items():
        print(f"one of two with {name}: {_beside(backend, grammars, prompt, constraint)}")
    backend.close()


def _beside(backend: Backend, grammars: Grammars, prompt: list[int], constraint: Constraint) -> str:
    """What a step of two answers takes, in turns with and without a mask for one of them."""
    plain: list[float] = []
    masked: list[float] = []
    spent: list[float] = []
    for _ in range(REPETITIONS):
        plain += _run(backend, [_spec(1, prompt), _spec(2, prompt)])
        mask = TimedMask(grammars.create_mask(constraint))
        masked += _run(backend, [_spec(1, prompt), _spec(2, prompt, mask)])
        spent += mask.seconds
    without, beside = (statistics.quantiles(steps)[0] for steps in (plain, masked))
    return (
        f"a step takes {_ms(without)}, with the mask {(beside - without) * 1e6:+.0f} µs, "
        f"of which the grammar {statistics.median(spent) * 1e6:.0f}"
    )


def _spec(number: int, prompt: list[int], mask: TimedMask | None = None) -> SequenceSpec:
    sampling = Sampling(temperature=0.8, seed=1)
    return SequenceSpec(number, prompt, TOKENS, sampling, ignore_eos=True, mask=mask)


def _run(backend: Backend, specs: list[SequenceSpec]) -> list[float]:
    """Seconds of each step in which all of the sequences got a token."""
    return list(_steps(backend, specs))


def _steps(backend: Backend, specs: list[SequenceSpec]) -> Iterator[float]:
    for spec in specs:
        backend.admit(spec)
    left = {spec.sequence_id: spec.max_tokens for spec in specs}
    while left:
        begun = time.perf_counter()
        tokens = backend.step()
        seconds = time.perf_counter() - begun
        if len({token.sequence_id for token in tokens}) == len(specs):
            yield seconds
        for token in tokens:
            left[token.sequence_id] -= 1
            if token.is_end or not left[token.sequence_id]:
                del left[token.sequence_id]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _spread(seconds: list[float]) -> str:
    ordered = sorted(value * 1e6 for value in seconds)
    worst, high = ordered[-1], ordered[int(len(ordered) * 0.95)]
    return f"median {statistics.median(ordered):.0f}, 95 % {high:.0f}, most {worst:.0f}"


if __name__ == "__main__":
    main()
