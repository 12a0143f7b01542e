"""Requests that have killed their model's worker alone, and are not let in again for a while.

Known by their fingerprints only, which the incidents keep: so also after a restart.
"""

from __future__ import annotations

import time

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Detokenize, Inquiry, Job, Tokenize
from supervisor.incidents import Fingerprints, Incident

#: For so long the same request is refused.
TERM_S = 3600.0


class Convicts:
    """Knows what is in ``incidents``, and what ``note`` is told."""

    def __init__(self, fingerprints: Fingerprints, incidents: list[Incident]) -> None:
        self._fingerprints = fingerprints
        #: Fingerprint: incident id, and until when, in epoch seconds.
        self._terms: dict[str, tuple[str, float]] = {}
        for incident in incidents:
            self.note(incident)

    def note(self, incident: Incident) -> None:
        """Remember whom it convicts, if anybody."""
        until = incident.timestamp + TERM_S
        if incident.convicted is not None and until > time.time():
            self._terms[incident.convicted] = incident.id, until

    def check(self, model_id: str, request: Job | Inquiry) -> None:
        """Raise ``request_poisoned`` for a request that was convicted within ``TERM_S``."""
        if not self._terms or isinstance(request, Detokenize):
            return
        if isinstance(request, Tokenize):
            request = request.generate
        now = time.time()
        self._terms = {name: term for name, term in self._terms.items() if term[1] > now}
        term = self._terms.get(self._fingerprints.of(model_id, request))
        if term is not None:
            raise CodedError(
                ErrorCode.REQUEST_POISONED,
                f"this request has crashed model {model_id!r} twice, the second time while it "
                "ran alone: change it, or wait an hour",
                details={"incident_id": term[0]},
            )
