"""From a name that a call has asked for to the models that may serve it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from protocol.errors import CodedError, ErrorCode
from supervisor.catalog import AvailableModel
from supervisor.gate import NO_OPTIONS
from supervisor.gateway.candidates import Attempt, Candidates
from supervisor.gateway.endpoint import Gateway
from supervisor.names import ANY, Known, Route, Standing, any_of, next_of
from supervisor.views import ModelView

#: What a model is for, by ``ModelView.kind``; before it is loaded that is not known.
GENERATE = "generate"

#: Models that ``auto`` tries to load at most when none is configured: not the whole disk.
MAX_LOADED = 3

T = TypeVar("T")


async def candidates(
    gateway: Gateway, name: str, route: Route, attempt: Attempt[T], kind: str = GENERATE
) -> Candidates[T]:
    """``kind`` is what ``auto`` has to be able to do. Raises ``model_not_found`` for that when
    there is nothing at all."""
    ids = list(route.candidates)
    if ANY in ids:
        ids = await _with_any(gateway, name, ids, kind)

    def choose(left: Sequence[str]) -> str:
        if not gateway.settings.load_on_demand:
            # Then nobody waits for a model, and who cannot serve says so at once.
            return left[0]
        return next_of(left, lambda model_id: standing_of(gateway, model_id))

    return Candidates(name, ids, options_of(route), attempt, choose)


def options_of(route: Route) -> Mapping[str, Any]:
    """How a model of the route is loaded, if that has to be."""
    return NO_OPTIONS if route.preset is None else route.preset.load.options()


def named_model(
    gateway: Gateway, name: str, suits: Callable[[ModelView], bool] = lambda view: True
) -> str:
    """The id of the one model that an operator means: of several that a name stands for, the one
    that is tracked and, if that is not enough, ``suits``.

    The id of a tracked model is that model's in any case. Raises ``model_ambiguous``, or
    ``model_not_found`` when none of several is tracked.
    """
    route = gateway.names.routes.get(name)
    if route is None or _view(gateway, name) is not None:
        return name
    if ANY in route.candidates:
        raise _ambiguous(name, "whatever model there is")
    if len(route.candidates) == 1:
        return route.candidates[0]
    found = [view for each in route.candidates if (view := _view(gateway, each)) is not None]
    if not found:
        names = ", ".join(route.candidates)
        raise CodedError(
            ErrorCode.MODEL_NOT_FOUND,
            f"none of the models that {name!r} stands for is loaded: {names}",
            param="model",
        )
    if len(found) > 1:
        found = [view for view in found if suits(view)] or found
    if len(found) > 1:
        raise _ambiguous(name, " and ".join(view.id for view in found))
    return found[0].id


def _ambiguous(name: str, meaning: str) -> CodedError:
    message = f"{name!r} stands for {meaning}: say which, by its id"
    return CodedError(ErrorCode.MODEL_AMBIGUOUS, message, param="model_id")


def _view(gateway: Gateway, model_id: str) -> ModelView | None:
    try:
        return gateway.fleet.model(model_id)
    except CodedError:
        return None


async def _with_any(gateway: Gateway, name: str, ids: list[str], kind: str) -> list[str]:
    at = ids.index(ANY)
    found = any_of([_known(gateway, view, kind) for view in gateway.fleet.models()])
    if not found and gateway.settings.load_on_demand:
        found = await _loadable(gateway, kind)
    expanded = list(dict.fromkeys([*ids[:at], *found, *ids[at + 1 :]]))
    if not expanded:
        on_demand = "" if gateway.settings.load_on_demand else ", and none is loaded on demand"
        raise CodedError(
            ErrorCode.MODEL_NOT_FOUND,
            f"{name!r}: no model is loaded that could serve this{on_demand}",
            param="model",
        )
    return expanded


async def _loadable(gateway: Gateway, kind: str) -> list[str]:
    """What is on disk and could be loaded: the configured models, or if there are none others."""
    available = cast("list[AvailableModel]", (await gateway.fleet.records.available())["models"])
    # Those that are tracked have been found to be no help.
    tracked = {view.id for view in gateway.fleet.models()}
    found = [
        model.id
        for model in available
        if model.kind == kind
        and model.id not in tracked
        and any(option.usable for option in model.backends)
    ]
    configured = [each for each in gateway.names.configured if each in found]
    return configured or found[:MAX_LOADED]


def standing_of(gateway: Gateway, model_id: str) -> Standing:
    view = _view(gateway, model_id)
    return Standing.OTHER if view is None else _standing(view)


def _standing(view: ModelView) -> Standing:
    if view.unloading or view.readiness.state == "quarantined":
        return Standing.OTHER
    return Standing.ROUTABLE if view.readiness.state == "routable" else Standing.COMING


def _known(gateway: Gateway, view: ModelView, kind: str) -> Known:
    return Known(
        view.id,
        _standing(view),
        suits=view.kind in (None, kind),
        last_used_at=view.last_used_at,
        configured=view.id in gateway.names.configured,
    )
