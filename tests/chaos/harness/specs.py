"""The faults that are tried, as data: what is done, where, and what has to come of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from supervisor.settings import Settings


class Phase(StrEnum):
    SPAWN = "spawn"
    LOAD = "load"
    CANARY = "canary"
    PREFILL = "prefill"
    DECODE = "decode"
    IDLE = "idle"
    UNLOAD = "unload"


class Expect(StrEnum):
    """What has to come of a fault. Whatever it strikes during an unload, that ends."""

    #: Counted once; routable again by itself, in the next generation.
    RECOVERS = "recovers"
    #: Nothing happens: same generation, nothing counted.
    UNHARMED = "unharmed"
    QUARANTINED = "quarantined"
    #: Refused with its code and not tracked any more; nothing counted.
    DROPPED = "dropped"


LOADING = (Phase.SPAWN, Phase.LOAD, Phase.CANARY)
SERVING = (Phase.PREFILL, Phase.DECODE)
#: Those in which a script of the simulated backend can strike.
SCRIPTED = (*LOADING, *SERVING, Phase.IDLE, Phase.UNLOAD)
WORKING = (Phase.LOAD, Phase.CANARY, *SERVING)
ALIVE = (*WORKING, Phase.IDLE)

#: A prompt with this word sets off what waits for a request.
STRIKE = "strike"
#: One that takes several steps to compute, see ``SLOW_PREFILL``.
LONG_STRIKE = STRIKE + " after a long while" * 60
#: Where a fault of a script is put to strike in a phase, see ``worker.faults``.
PLACES: dict[Phase, dict[str, object]] = {
    Phase.SPAWN: {"at": "spawn"},
    Phase.LOAD: {"at": "load"},
    Phase.CANARY: {"at": "token", "n": 3},
    Phase.PREFILL: {"at": "prompt", "prompt_contains": STRIKE},
    Phase.DECODE: {"at": "token", "n": 5, "prompt_contains": STRIKE},
    Phase.IDLE: {"at": "idle"},
    Phase.UNLOAD: {"at": "close"},
}


@dataclass(frozen=True)
class FaultSpec:
    """One fault. Either ``acts``, done by the victim's script one after the other (a
    place in an act goes before that of the phase), or a ``number`` sent from outside.

    ``kinds`` are the failure kinds under which it may be counted, ``codes`` how the
    load may be answered (empty: as the phase and ``hangs`` make it), ``within_s``
    the longest that detection may take; a ``plain`` death has its own, see ``case``.
    ``prompt`` is what a request in prefill or decode asks. ``settings`` are more settings
    of the server, ``needs`` one without which the fault is not tried. ``quick`` are the
    phases of the quick run.
    """

    name: str
    phases: tuple[Phase, ...]
    acts: tuple[dict[str, Any], ...] = ()
    number: signal.Signals | None = None
    expect: Expect = Expect.RECOVERS
    kinds: frozenset[str] = frozenset({"signal"})
    codes: tuple[str, ...] = ()
    hangs: bool = False
    times: int | None = 1
    within_s: float = 1.0
    victims: tuple[str, ...] = ("simulated",)
    prompt: str = STRIKE
    script: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    quick: tuple[Phase, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether it is a death that nothing has to be waited for."""
        deaths = {"signal", "exit"}
        return self.expect is Expect.RECOVERS and not self.hangs and self.kinds <= deaths


@dataclass(frozen=True)
class Case:
    spec: FaultSpec
    phase: Phase
    victim: str

    @property
    def name(self) -> str:
        return f"{self.spec.name}-{self.phase}-{self.victim}".replace(" ", "-")


def cases(faults: list[FaultSpec], *, quick: bool) -> Iterator[Case]:
    for spec in faults:
        for victim in spec.victims:
            for phase in spec.quick if quick else spec.phases:
                yield Case(spec, phase, victim)


def is_missing(spec: FaultSpec) -> bool:
    """Whether this version of the product has not got what the fault is about."""
    return bool(spec.needs) and spec.needs not in Settings.__struct_fields__


def acts(*kinds: str, **options: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"kind": kind, **options} for kind in kinds)


def _kinds(*names: str) -> frozenset[str]:
    return frozenset(names)


#: A hang is seen once its phase's limit is over; see ``rig`` for the limits.
HANG: dict[str, Any] = {
    "hangs": True,
    "kinds": _kinds("hang", "load_timeout", "canary"),
    "within_s": 6.0,
}
WIRE: dict[str, Any] = {
    "kinds": _kinds("protocol"),
    "phases": (Phase.SPAWN, *ALIVE),
}
HELLO: dict[str, Any] = {"phases": (Phase.SPAWN,), "kinds": _kinds("protocol")}
REAL: dict[str, Any] = {"victims": ("llama", "mlx")}
OUTSIDE = (Phase.SPAWN, Phase.LOAD, Phase.CANARY, Phase.PREFILL, Phase.DECODE, Phase.IDLE)
BACKEND = _kinds("backend_exception", "loader")
_GROWTH = 32 * 1024**2
#: Six seconds for the long prompt, three times the limit; a moment for a short one.
SLOW_PREFILL: dict[str, Any] = {
    "prompt": LONG_STRIKE,
    "script": {"prefill_chunk": 60, "prefill_delay_s": 0.3},
}
#: Growing to the limit takes a second, in which the phase must not end.
MEMORY: dict[str, Any] = {
    "kinds": _kinds("memory"),
    "within_s": 8.0,
    "settings": {"OPTA_LMX_WORKER_MEMORY_LIMIT_BYTES": str(400 * 1024**2)},
    "needs": "worker_memory_limit_bytes",
    "prompt": LONG_STRIKE,
    "script": {
        **{"load_delay_s": 3.0, "step_delay_s": 0.1},
        **{"prefill_chunk": 60, "prefill_delay_s": 0.15},
    },
}

#: The same without a fault, for what the phase itself does to the bystanders.
CALM = FaultSpec("none", SCRIPTED, acts("mark"), expect=Expect.UNHARMED)
CALM_REAL = FaultSpec("none", SCRIPTED, number=signal.Signals.SIGURG, expect=Expect.UNHARMED)

FAULTS = [
    # --- sudden death ---
    FaultSpec("SIGKILL", SCRIPTED, acts("kill"), quick=SCRIPTED),
    FaultSpec("SIGSEGV", SCRIPTED, acts("segfault"), quick=(Phase.DECODE,)),
    FaultSpec("SIGABRT", SCRIPTED, acts("abort")),
    FaultSpec("SIGBUS", SCRIPTED, acts("bus")),
    FaultSpec(
        "os._exit(0)",
        SCRIPTED,
        acts("exit", status=0),
        kinds=_kinds("exit"),
        quick=(Phase.LOAD,),
    ),
    FaultSpec("SIGTERM", (Phase.IDLE,), number=signal.SIGTERM, kinds=_kinds("signal", "exit")),
    FaultSpec(
        "crash after Loaded",
        (Phase.CANARY,),
        acts("kill", at="loaded"),
        # The message may die with its sender.
        codes=("model_canary_failed", "model_loader_crashed"),
        quick=(Phase.CANARY,),
    ),
    FaultSpec(
        "crash at every load",
        (Phase.LOAD,),
        acts("segfault"),
        expect=Expect.QUARANTINED,
        times=None,
        within_s=15.0,
        quick=(Phase.LOAD,),
    ),
    FaultSpec("exception", ALIVE, acts("raise"), kinds=BACKEND, quick=(Phase.DECODE,)),
    FaultSpec("exception", (Phase.SPAWN,), acts("raise"), kinds=_kinds("exit")),
    FaultSpec(
        "refusal",
        (Phase.LOAD,),
        acts("refuse", code="model_unsupported_arch"),
        expect=Expect.DROPPED,
        codes=("model_unsupported_arch",),
        times=None,
        quick=(Phase.LOAD,),
    ),
    # --- standing still ---
    FaultSpec("SIGSTOP", SCRIPTED, acts("stop"), quick=(Phase.DECODE,), **HANG),
    FaultSpec("GIL held", SCRIPTED, acts("hold_gil"), quick=(Phase.PREFILL,), **HANG),
    FaultSpec("GIL held until the dump", WORKING, acts("doze"), **HANG),
    FaultSpec("frozen, beats on", SCRIPTED, acts("hang"), quick=(Phase.LOAD, Phase.IDLE), **HANG),
    FaultSpec("SIGTERM ignored, frozen", SCRIPTED, acts("ignore_term", "hang"), quick=(), **HANG),
    FaultSpec(
        "SIGTERM ignored",
        (Phase.UNLOAD,),
        acts("ignore_term", "hang"),
        quick=(Phase.UNLOAD,),
    ),
    FaultSpec(
        "slow load that advances",
        (Phase.LOAD,),
        acts("mark"),
        expect=Expect.UNHARMED,
        script={"load_delay_s": 4.0},
        quick=(Phase.LOAD,),
    ),
    FaultSpec(
        "slow prefill that advances",
        (Phase.PREFILL,),
        acts("mark"),
        expect=Expect.UNHARMED,
        quick=(Phase.PREFILL,),
        **SLOW_PREFILL,
    ),
    FaultSpec(
        "GIL held for a while",
        (*SERVING, Phase.IDLE),
        acts("hold_gil", seconds=1),
        expect=Expect.UNHARMED,
        quick=(Phase.DECODE,),
    ),
    # --- memory and output ---
    FaultSpec("failed allocation", ALIVE, acts("exhaust"), kinds=BACKEND, quick=(Phase.DECODE,)),
    FaultSpec("failed native allocation", ALIVE, acts("exhaust_native"), quick=(Phase.LOAD,)),
    FaultSpec("memory growth", WORKING, acts("grow", size=_GROWTH), **MEMORY),
    FaultSpec(
        "memory growth",
        (Phase.IDLE,),
        acts("grow", at="loaded", size=_GROWTH),
        quick=(Phase.IDLE,),
        **{**MEMORY, "script": {}},
    ),
    FaultSpec(
        "output flood",
        SCRIPTED,
        acts("flood", seconds=2),
        expect=Expect.UNHARMED,
        quick=(Phase.DECODE,),
    ),
    FaultSpec("helper holds the pipes", SCRIPTED, acts("helper", "kill"), quick=(Phase.DECODE,)),
    FaultSpec(
        "detached helper", (Phase.DECODE, Phase.IDLE, Phase.UNLOAD), acts("detached_helper", "kill")
    ),
    FaultSpec(
        "detached helper that floods",
        SCRIPTED,
        acts("flooding_helper", "kill"),
        quick=(Phase.DECODE,),
    ),
    FaultSpec("helper, then SIGSTOP", (Phase.DECODE,), acts("helper", "stop"), **HANG),
    # --- on the wire ---
    FaultSpec("corrupt frame", acts=acts("corrupt_frame"), quick=(Phase.DECODE,), **WIRE),
    FaultSpec("empty frame", acts=acts("empty_frame"), **WIRE),
    FaultSpec("truncated frame", acts=acts("truncated_frame"), quick=(Phase.LOAD,), **WIRE),
    FaultSpec("wrong tag", acts=acts("wrong_tag"), **WIRE),
    FaultSpec(
        "oversized frame",
        acts=acts("oversized_frame", size=64 * 1024**2),
        quick=(Phase.DECODE,),
        # It takes its time to cross.
        **{**WIRE, "within_s": 4.0},
    ),
    FaultSpec(
        "frames of a dead generation",
        # The requests that it speaks of run again, under the same ids.
        SERVING,
        acts("ghost", "kill"),
        quick=(Phase.PREFILL,),
    ),
    FaultSpec(
        "late frames",
        ALIVE,
        acts("stale_frames"),
        expect=Expect.UNHARMED,
        quick=(Phase.DECODE,),
    ),
    FaultSpec("no Loaded", (Phase.LOAD,), acts("silent", at="loaded"), quick=(), **HANG),
    FaultSpec(
        "Loaded twice",
        (Phase.CANARY,),
        acts("twice", at="loaded"),
        expect=Expect.UNHARMED,
        quick=(Phase.CANARY,),
    ),
    FaultSpec("wrong version", acts=acts("wrong_version", at="hello"), quick=(), **HELLO),
    FaultSpec("wrong nonce", acts=acts("wrong_nonce", at="hello"), quick=(Phase.SPAWN,), **HELLO),
    FaultSpec("Hello of an old generation", acts=acts("old_generation", at="hello"), **HELLO),
    FaultSpec("Hello twice", acts=acts("twice", at="hello"), **HELLO),
    FaultSpec("corrupt Hello", acts=acts("corrupt_frame", "silent", at="hello"), **HELLO),
    FaultSpec("no Hello", (Phase.SPAWN,), acts("silent", at="hello"), quick=(Phase.SPAWN,), **HANG),
    # --- a canary that proves nothing ---
    *(
        FaultSpec(
            f"{name} canary output",
            (Phase.CANARY,),
            acts("mark"),
            expect=Expect.QUARANTINED,
            kinds=_kinds("canary"),
            times=None,
            within_s=15.0,
            script={"tokens": [token], "repeat": True},
            quick=(Phase.CANARY,) if token == "!" else (),
        )
        for name, token in (("garbage", "!"), ("unreadable", "\ufffd"), ("empty", ""))
    ),
    # --- real backends ---
    FaultSpec(
        "SIGKILL", (*OUTSIDE, Phase.UNLOAD), number=signal.SIGKILL, quick=(Phase.DECODE,), **REAL
    ),
    FaultSpec("SIGSEGV", OUTSIDE, number=signal.SIGSEGV, quick=(), **REAL),
    FaultSpec("SIGABRT", OUTSIDE, number=signal.SIGABRT, quick=(), **REAL),
    FaultSpec("SIGSTOP", OUTSIDE, number=signal.SIGSTOP, **{**REAL, **HANG, "within_s": 16.0}),
    FaultSpec(
        "ggml abort by a bad file",
        (Phase.LOAD,),
        expect=Expect.QUARANTINED,
        codes=("model_loader_crashed",),
        within_s=30.0,
        victims=("llama-abort",),
        quick=(Phase.LOAD,),
    ),
    FaultSpec(
        "refused by the library",
        (Phase.LOAD,),
        expect=Expect.DROPPED,
        codes=("model_incomplete",),
        within_s=30.0,
        victims=("llama-shapes",),
        quick=(Phase.LOAD,),
    ),
    FaultSpec(
        "NaN weights",
        (Phase.CANARY,),
        expect=Expect.QUARANTINED,
        kinds=_kinds("canary", "backend_exception"),
        codes=("model_canary_failed",),
        within_s=40.0,
        victims=("llama-nan", "mlx-nan"),
    ),
]
