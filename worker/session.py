"""The life of a worker after its guard is up: handshake, load, serve, exit."""

from __future__ import annotations

import os
import traceback

import zmq

from protocol.errors import CodedError, ErrorCode
from protocol.handshake import EXIT_FAULT, WorkerBoot
from protocol.messages import (
    PROTOCOL_VERSION,
    BackendFault,
    Cancel,
    Generate,
    Hello,
    Load,
    Loaded,
    LoadFailed,
    LoadProgress,
    Phase,
    Shutdown,
    Step,
    ToWorker,
)
from worker.backends import create_backend
from worker.backends.base import Backend
from worker.engine import Engine
from worker.link import Link, LinkWrapper
from worker.transport import DataLink, Heart
from worker.vitals import Vitals


def run(boot: WorkerBoot) -> int:
    """Connect, serve until told to stop or broken, and return the exit status."""
    vitals = Vitals()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = DataLink(context, boot.data_endpoint)
    heart = Heart(context, boot.beat_endpoint, vitals, boot.beat_interval_s)
    heart.start()
    try:
        return _load_and_serve(boot, link, vitals)
    finally:
        heart.stop()
        link.close()
        context.term()


def _load_and_serve(boot: WorkerBoot, link: Link, vitals: Vitals) -> int:
    try:
        backend = create_backend(boot.backend)
    except CodedError as refusal:
        link.send(LoadFailed(refusal.code, refusal.message))
        return EXIT_FAULT
    if isinstance(backend, LinkWrapper):
        link = backend.wrap_link(link)
    link.send(
        Hello(
            protocol_version=PROTOCOL_VERSION,
            nonce=boot.nonce,
            pid=os.getpid(),
            generation=boot.generation,
            backend=backend.name,
            backend_version=backend.version,
        )
    )
    try:
        request = link.wait()
        if isinstance(request, Shutdown):
            return 0
        if not isinstance(request, Load):
            raise TypeError(f"expected a load, got {type(request).__name__}")
        model = _load(backend, request, link, vitals)
        if model is None:
            return EXIT_FAULT
        return _serve(backend, model, link, vitals)
    finally:
        backend.close()


def _load(backend: Backend, request: Load, link: Link, vitals: Vitals) -> Loaded | None:
    def report(fraction: float) -> None:
        vitals.advance()
        link.send(LoadProgress(fraction))

    vitals.phase = Phase.LOAD
    try:
        model = backend.load(request, report)
    except CodedError as refusal:
        link.send(LoadFailed(refusal.code, refusal.message))
        return None
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        link.send(LoadFailed(ErrorCode.MODEL_LOADER_CRASHED, reason))
        return None
    vitals.phase = Phase.IDLE
    link.send(model)
    return model


def _serve(backend: Backend, model: Loaded, link: Link, vitals: Vitals) -> int:
    engine = Engine(backend, model, vitals)
    try:
        while True:
            if engine.idle and not _handle(link.wait(), engine, link):
                return 0
            for message in link.pending():
                if not _handle(message, engine, link):
                    return 0
            if not engine.idle and (deltas := engine.step()):
                link.send(Step(deltas))
    except Exception as error:
        traceback.print_exc()
        link.send(BackendFault(f"{type(error).__name__}: {error}"))
        return EXIT_FAULT


def _handle(message: ToWorker, engine: Engine, link: Link) -> bool:
    """Carry out one message; False when it was the last."""
    match message:
        case Generate():
            link.send(engine.submit(message))
        case Cancel():
            if (delta := engine.cancel(message.request_id)) is not None:
                link.send(Step([delta]))
        case Load():
            raise TypeError("a worker loads one model only")
        case Shutdown():
            return False
    return True
