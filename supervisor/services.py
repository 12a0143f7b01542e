"""What all models of a server share."""

from __future__ import annotations

from dataclasses import dataclass, field

import zmq

from supervisor.accounts import AccountStore
from supervisor.channel import SocketFolder
from supervisor.convicts import Convicts
from supervisor.incidents import MAX_INCIDENTS, Fingerprints, IncidentStore
from supervisor.journal import Journal
from supervisor.ledger import WorkerLedger
from supervisor.marks import server_mark
from supervisor.memory_lessons import MemoryLessons
from supervisor.metrics import Metrics
from supervisor.oom_kills import OomKills
from supervisor.quarantine import Policy
from supervisor.registry import Registry
from supervisor.settings import Settings


@dataclass(slots=True)
class Services:
    """Made by the fleet, handed to every actor. A reload replaces ``settings``: look there
    when one is needed."""

    settings: Settings
    policy: Policy
    registry: Registry
    accounts: AccountStore
    incidents: IncidentStore
    fingerprints: Fingerprints
    convicts: Convicts
    ledger: WorkerLedger
    metrics: Metrics
    zmq_context: zmq.Context[zmq.Socket[bytes]]
    sockets: SocketFolder
    server_mark: str
    oom_kills: OomKills
    lessons: MemoryLessons
    journal: Journal = field(default_factory=Journal)
    #: Processes that did not end although they were killed.
    left_behind: set[int] = field(default_factory=set)

    async def flush(self) -> None:
        """Wait for all that is to be kept to be on disk."""
        for store in (self.registry, self.accounts, self.incidents, self.ledger, self.lessons):
            await store.flush()

    def close(self) -> None:
        """Give the sockets back; workers that are left are not heard any more."""
        # Not ``term``, which would wait for ever for a socket that was forgotten.
        self.zmq_context.destroy(linger=0)
        self.sockets.cleanup()


def open_services(settings: Settings, metrics: Metrics) -> Services:
    """Read the state of ``settings.home``, whose lock the caller holds."""
    home = settings.home
    registry, incidents, fingerprints = Registry(home), IncidentStore(home), Fingerprints(home)
    policy = Policy(
        threshold=settings.failure_threshold,
        window_s=settings.failure_window_s,
        delay_cap_s=settings.restart_delay_cap_s,
        decay_s=settings.failure_window_s,
    )
    return Services(
        settings=settings,
        policy=policy,
        registry=registry,
        accounts=AccountStore(home, policy, on_turn=registry.add_event),
        incidents=incidents,
        fingerprints=fingerprints,
        convicts=Convicts(fingerprints, incidents.list(limit=MAX_INCIDENTS)),
        ledger=WorkerLedger(home),
        metrics=metrics,
        zmq_context=zmq.Context(),
        sockets=SocketFolder(home),
        server_mark=server_mark(home),
        oom_kills=OomKills(),
        lessons=MemoryLessons(home),
    )
