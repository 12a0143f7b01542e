"""What all models of a server share."""

from __future__ import annotations

from dataclasses import dataclass

import zmq

from supervisor.accounts import AccountStore
from supervisor.channel import SocketFolder
from supervisor.footprint import OomKills
from supervisor.incidents import Fingerprints, IncidentStore
from supervisor.ledger import WorkerLedger
from supervisor.metrics import Metrics
from supervisor.quarantine import Policy
from supervisor.registry import Registry
from supervisor.settings import Settings


@dataclass(frozen=True, slots=True)
class Services:
    """Made by the fleet, handed to every actor."""

    settings: Settings
    policy: Policy
    registry: Registry
    accounts: AccountStore
    incidents: IncidentStore
    fingerprints: Fingerprints
    ledger: WorkerLedger
    metrics: Metrics
    zmq_context: zmq.Context[zmq.Socket[bytes]]
    sockets: SocketFolder
    server_mark: str
    oom_kills: OomKills
