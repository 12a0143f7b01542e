"""Quarantines of models that nobody has loaded since the start of the server.

They have no actor; what is known of them is their account. An account is that of one
file and backend version: the quarantine of a file that was replaced, or of a backend
that was upgraded, stops nobody, and does not speak for the model any more.
"""

from __future__ import annotations

from collections.abc import Iterable

from supervisor.accounts import AccountKey, AccountStore
from supervisor.compatibility import Record
from supervisor.incidents import IncidentStore
from supervisor.quarantine import Policy
from supervisor.status import resting_readiness
from supervisor.views import ModelView


class Resting:
    """Asked about models that are not tracked. ``records`` are the registry's, oldest first."""

    def __init__(
        self,
        accounts: AccountStore,
        incidents: IncidentStore,
        policy: Policy,
        records: Iterable[Record],
    ) -> None:
        self._accounts = accounts
        self._incidents = incidents
        self._policy = policy
        #: What each model was last run as; the quarantine of another key is history.
        self._last_run = {
            record.model: AccountKey(
                record.model, record.digest, record.backend, record.backend_version
            )
            for record in records
            if record.digest is not None and (record.outcome == "pass" or record.text("kind"))
        }

    def admitted(self, key: AccountKey) -> None:
        """The model is run as this from now on."""
        self._last_run[key.model] = key

    def models(self) -> set[str]:
        """The ids of all models that rest, tracked or not."""
        return {key.model for key in self._accounts.all_quarantined() if self._speaks(key)}

    def view(self, model_id: str) -> ModelView | None:
        """The model object of one that rests in quarantine, None for any other."""
        keys = [key for key in self._accounts.quarantined(model_id) if self._speaks(key)]
        if not keys:
            return None
        key = max(keys, key=lambda key: self._accounts.get(key).times[-1:])
        incidents = self._incidents.list(model=model_id, limit=1)
        return ModelView(
            id=model_id,
            path=None,
            backend=key.backend,
            backend_version=key.backend_version,
            pid=None,
            generation=0,
            readiness=resting_readiness(self._accounts.get(key), self._policy),
            unloading=False,
            memory_gb=None,
            memory_planned_gb=None,
            loaded_at=None,
            context_length=None,
            request_count=0,
            in_flight=0,
            queued=0,
            last_used_at=None,
            keep_alive_sec=None,
            pinned=False,
            last_incident_id=incidents[0].id if incidents else None,
        )

    def _speaks(self, key: AccountKey) -> bool:
        return self._last_run.get(key.model, key) == key
